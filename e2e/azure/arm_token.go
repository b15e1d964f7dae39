package azure

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/golang-jwt/jwt/v5"
)

// armAudiences are the audiences that the fake ARM accepts in tokens, in addition to
// the base URL of the request. A trailing slash is ignored.
var armAudiences = []string{"https://management.azure.com", "https://management.core.windows.net"}

// authorize checks the caller's token and stores its claims in x. It returns nil if
// the token is accepted or if the fake ARM requires none.
func (a *ARM) authorize(x *armRequestContext) *armError {
	if a.o.Verify == nil {
		return nil
	}
	unauthorized := func(code, message string) *armError {
		return &armError{Status: http.StatusUnauthorized, Code: code, Message: message}
	}
	scheme, token, _ := strings.Cut(x.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
		return unauthorized("AuthenticationFailed", "Authentication failed. The 'Authorization' header is missing.")
	}
	claims, err := a.o.Verify(strings.TrimSpace(token))
	switch {
	case errors.Is(err, jwt.ErrTokenExpired):
		return unauthorized("ExpiredAuthenticationToken", "The access token is expired.")
	case err != nil:
		return unauthorized("InvalidAuthenticationToken", "The access token is invalid.")
	}
	x.claims, x.entry.Caller = claims, claims.ObjectID
	if audience := strings.TrimSuffix(claims.Audience, "/"); !slices.Contains(armAudiences, audience) && audience != x.base() {
		return unauthorized("InvalidAuthenticationTokenAudience", "The access token has been obtained for wrong audience or resource '"+
			claims.Audience+"'. It should exactly match with one of the allowed audiences '"+strings.Join(armAudiences, "','")+"'.")
	}
	if a.o.Tenant != "" && !strings.EqualFold(claims.TenantID, a.o.Tenant) {
		return unauthorized("InvalidAuthenticationTokenTenant", "The access token is from the wrong issuer. It must match the tenant '"+
			a.o.Tenant+"' associated with this subscription.")
	}
	return nil
}

// verify checks the signature and the times of a token of this issuer, and returns
// its claims. For an expired token, the error wraps jwt.ErrTokenExpired.
func (i *issuer) verify(token string) (Claims, error) {
	var claims Claims
	_, err := jwt.ParseWithClaims(token, &claims, func(*jwt.Token) (any, error) { return &i.key.PublicKey, nil },
		jwt.WithValidMethods([]string{"RS256"}), jwt.WithExpirationRequired(), jwt.WithTimeFunc(i.now))
	if err != nil {
		return Claims{}, fmt.Errorf("verifying a token: %w", err)
	}
	return claims, nil
}
