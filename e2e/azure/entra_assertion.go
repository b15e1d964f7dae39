package azure

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1" // the x5t header is defined as SHA-1
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// selfIssued reports whether the issuer of an assertion is the client itself. The
// client must sign such an assertion with the key of one of its certificates. An
// assertion of any other issuer is a federated token.
func selfIssued(claims jwt.RegisteredClaims, clientID string) bool {
	return strings.EqualFold(claims.Issuer, clientID)
}

func (s *entra) authenticateByAssertion(x *requestContext, p principal, tenant, assertion string) error {
	var claims jwt.RegisteredClaims
	token, _, err := jwt.NewParser().ParseUnverified(assertion, &claims)
	if err != nil {
		return &entraError{401, "invalid_client", 50027, "JWT token is invalid or malformed."}
	}
	if selfIssued(claims, p.ClientID) {
		return s.authenticateByCertificate(x, p, tenant, token, claims, assertion)
	}
	return s.authenticateByFederation(p, token, claims, assertion)
}

func (s *entra) authenticateByCertificate(x *requestContext, p principal, tenant string, token *jwt.Token, claims jwt.RegisteredClaims, assertion string) error {
	if !strings.EqualFold(claims.Subject, p.ClientID) {
		return &entraError{401, "invalid_client", 700021, "Client assertion application identifier doesn't match 'client_id' parameter."}
	}
	i := slices.IndexFunc(p.certificates, func(c *x509.Certificate) bool { return hasThumbprint(c, token.Header) })
	if i < 0 {
		return badCertificate(p, "The certificate with identifier used to sign the client assertion is not registered on application.")
	}
	cert := p.certificates[i]
	if now := s.now(); now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return &entraError{401, "invalid_client", 1000502, "The provided certificate is not within its specified validity window."}
	}
	algorithms := algorithmsFor(cert.PublicKey)
	if len(algorithms) == 0 {
		return badCertificate(p, "The key of the certificate is of a kind that is not supported.")
	}
	if err := s.verify(assertion, func(*jwt.Token) (any, error) { return cert.PublicKey, nil }, algorithms...); err != nil {
		if timeError(err) {
			return outsideValidity()
		}
		return badCertificate(p, "Client assertion contains an invalid signature.")
	}
	base := "https://" + x.Host + "/" + tenant
	if !slices.ContainsFunc(claims.Audience, func(aud string) bool {
		return slices.Contains([]string{base + "/oauth2/v2.0/token", base + "/oauth2/token", base + "/v2.0", base + "/"}, aud)
	}) {
		return &entraError{401, "invalid_client", 700023, "Client assertion audience claim does not match Realm issuer."}
	}
	return nil
}

// algorithmsFor returns the signature algorithms for a certificate's key. Whether the
// real Entra ID accepts keys on elliptic curves is not documented. Public reports say
// that it does not: for federated tokens, it refuses ES256 with AADSTS5002738. A test
// with such a key proves that the client follows the standard. It does not prove that
// the real Entra ID accepts the assertion.
func algorithmsFor(key any) []string {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return []string{"RS256", "PS256"}
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return []string{"ES256"}
		case elliptic.P384():
			return []string{"ES384"}
		case elliptic.P521():
			return []string{"ES512"}
		}
	}
	return nil
}

// hasThumbprint reports whether the header of an assertion names the certificate, in
// x5t#S256 or, if that is absent, in x5t. The standard requires base64url; clients also
// send base64, with or without padding, and hexadecimal.
func hasThumbprint(c *x509.Certificate, header map[string]any) bool {
	sum256, sum1 := sha256.Sum256(c.Raw), sha1.Sum(c.Raw)
	if v, ok := header["x5t#S256"].(string); ok {
		return encodes(v, sum256[:])
	}
	v, ok := header["x5t"].(string)
	return ok && encodes(v, sum1[:])
}

func encodes(text string, sum []byte) bool {
	urlForm := strings.NewReplacer("+", "-", "/", "_", "=", "").Replace(text)
	return urlForm == base64.RawURLEncoding.EncodeToString(sum) || strings.EqualFold(text, hex.EncodeToString(sum))
}

func badCertificate(p principal, why string) error {
	return &entraError{401, "invalid_client", 700027, fmt.Sprintf("%s Client ID: %s.", why, p.ClientID)}
}

func outsideValidity() error {
	return &entraError{401, "invalid_client", 700024, "Client assertion is not within its valid time range."}
}

func timeError(err error) bool {
	return errors.Is(err, jwt.ErrTokenExpired) || errors.Is(err, jwt.ErrTokenNotValidYet) ||
		errors.Is(err, jwt.ErrTokenRequiredClaimMissing)
}

// verify checks the signature and the times of an assertion, with the clock skew of
// five minutes that the real Entra ID allows.
func (s *entra) verify(assertion string, key jwt.Keyfunc, algorithms ...string) error {
	_, err := jwt.ParseWithClaims(assertion, &jwt.RegisteredClaims{}, key, jwt.WithValidMethods(algorithms),
		jwt.WithTimeFunc(s.now), jwt.WithLeeway(5*time.Minute), jwt.WithExpirationRequired())
	return err
}

// federatedAlgorithms are the signature algorithms for tokens of other issuers. They
// include none for elliptic curves: a token that an API server signs with such a key is
// refused, as by the real Entra ID.
var federatedAlgorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}

// authenticateByFederation selects the federated credentials of p by the assertion's
// issuer, then its subject, then its audience, each compared exactly as written. If no
// credential is left after one of these steps, the error names the claim of that step.
// Otherwise, authenticateByFederation checks the algorithm, the signature and the times
// of the assertion, with the keys of the first credential that is left.
func (s *entra) authenticateByFederation(p principal, token *jwt.Token, claims jwt.RegisteredClaims, assertion string) error {
	if len(p.federated) == 0 {
		return &entraError{401, "invalid_client", 70025, fmt.Sprintf(
			"The client '%s' has no configured federated identity credentials.", p.ClientID)}
	}
	left := p.federated
	for _, step := range []struct {
		code  int
		what  string
		value string
		match func(FederatedCredential) bool
	}{
		{700211, "issuer", claims.Issuer, func(f FederatedCredential) bool { return f.Issuer == claims.Issuer }},
		{700213, "subject", claims.Subject, func(f FederatedCredential) bool { return f.Subject == claims.Subject }},
		{700212, "audience", strings.Join(claims.Audience, " "), func(f FederatedCredential) bool { return slices.Contains(claims.Audience, f.Audience) }},
	} {
		left = slices.DeleteFunc(slices.Clone(left), func(f FederatedCredential) bool { return !step.match(f) })
		if len(left) == 0 {
			return &entraError{401, "invalid_client", step.code, fmt.Sprintf(
				"No matching federated identity record found for presented assertion %s '%s'. "+
					"Please check your federated identity credential Subject, Audience and Issuer against the presented assertion.",
				step.what, step.value)}
		}
	}
	if alg := token.Method.Alg(); !slices.Contains(federatedAlgorithms, alg) {
		return &entraError{401, "invalid_client", 5002738, fmt.Sprintf("Invalid JWT token. '%s' is not a supported signature algorithm.", alg)}
	}
	keys, err := parseJWKS(left[0].JWKS)
	if err != nil {
		return err
	}
	if err := s.verify(assertion, keyByID(keys), federatedAlgorithms...); err != nil {
		if timeError(err) {
			return outsideValidity()
		}
		return &entraError{401, "invalid_client", 50013, "Assertion failed signature validation."}
	}
	return nil
}
