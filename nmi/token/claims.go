package token

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"

	"github.com/podidentity/podidentity/internal/text"
)

// clockSkew is the time by which the claim "not before" of a token of Entra ID precedes the issue of the token.
const clockSkew = 5 * time.Minute

// describe returns the token with the fields from its claims. The signature is not verified: the token came from Azure
// over a connection that this process opened, and clients get it unchanged. NMI uses the claims only to fill fields of
// the response and of the audit log, and to find the identity with a requested object_id among the identities that are
// bound to the pod anyway.
func describe(accessToken string, expiresOn, now time.Time) Token {
	t := Token{AccessToken: accessToken, ExpiresOn: expiresOn, NotBefore: now.Add(-clockSkew), Fetched: now}
	parts := strings.Split(accessToken, ".")
	if len(parts) != 3 {
		return t
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return t
	}
	var claims struct {
		NotBefore int64  `json:"nbf"`
		AppID     string `json:"appid"`
		ObjectID  string `json:"oid"`
		TokenID   string `json:"uti"`
	}
	if json.Unmarshal(payload, &claims) != nil {
		return t
	}
	if claims.NotBefore > 0 {
		t.NotBefore = time.Unix(claims.NotBefore, 0)
	}
	t.ClientID, t.ObjectID, t.ID = claims.AppID, claims.ObjectID, text.OneLine(claims.TokenID, maxErrorText)
	return t
}
