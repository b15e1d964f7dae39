package azure

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Claims are the claims of a token that the fake Azure issued.
type Claims struct {
	Audience   string           `json:"aud"`
	Issuer     string           `json:"iss"`
	IssuedAt   *jwt.NumericDate `json:"iat"`
	NotBefore  *jwt.NumericDate `json:"nbf"`
	Expires    *jwt.NumericDate `json:"exp"`
	AppID      string           `json:"appid"`
	AppIDACR   string           `json:"appidacr"`
	IDType     string           `json:"idtyp"`
	ObjectID   string           `json:"oid"`
	Subject    string           `json:"sub"`
	TenantID   string           `json:"tid"`
	TokenID    string           `json:"uti"` // unique; token_id in the log
	Version    string           `json:"ver"`
	ResourceID string           `json:"xms_mirid,omitempty"`
}

// The methods of jwt.Claims:

func (c Claims) GetExpirationTime() (*jwt.NumericDate, error) { return c.Expires, nil }
func (c Claims) GetIssuedAt() (*jwt.NumericDate, error)       { return c.IssuedAt, nil }
func (c Claims) GetNotBefore() (*jwt.NumericDate, error)      { return c.NotBefore, nil }
func (c Claims) GetIssuer() (string, error)                   { return c.Issuer, nil }
func (c Claims) GetSubject() (string, error)                  { return c.Subject, nil }
func (c Claims) GetAudience() (jwt.ClaimStrings, error)       { return jwt.ClaimStrings{c.Audience}, nil }

// Values of the appidacr claim: how the client authenticated.
const (
	acrSecret = "1"
	acrKey    = "2" // certificate, federated token or managed identity
)

// issuer signs tokens.
type issuer struct {
	key *rsa.PrivateKey
	kid string
	now func() time.Time
}

func newIssuer(key *rsa.PrivateKey, now func() time.Time) *issuer {
	sum := sha256.Sum256(x509.MarshalPKCS1PublicKey(&key.PublicKey))
	return &issuer{key: key, kid: base64.RawURLEncoding.EncodeToString(sum[:20]), now: now}
}

// minted is a token with its claims.
type minted struct {
	raw    string
	claims Claims
}

func (m minted) expires() time.Time { return m.claims.Expires.Time }

func (m minted) lifetime() time.Duration { return m.expires().Sub(m.claims.IssuedAt.Time) }

// mint issues a token for the identity. The aud claim is audience, byte for byte. The
// appidacr claim is appIDACR: acrSecret or acrKey.
func (i *issuer) mint(id Identity, audience, appIDACR string, lifetime time.Duration) (minted, error) {
	now := i.now().Truncate(time.Second)
	var uti [16]byte
	_, _ = rand.Read(uti[:])
	m := minted{claims: Claims{
		Audience: audience, Issuer: "https://sts.windows.net/" + id.TenantID + "/",
		IssuedAt:  jwt.NewNumericDate(now),
		NotBefore: jwt.NewNumericDate(now.Add(-5 * time.Minute)),
		Expires:   jwt.NewNumericDate(now.Add(lifetime)),
		AppID:     id.ClientID, AppIDACR: appIDACR, IDType: "app",
		ObjectID: id.ObjectID, Subject: id.ObjectID, TenantID: id.TenantID,
		TokenID: base64.RawURLEncoding.EncodeToString(uti[:]), Version: "1.0", ResourceID: id.ResourceID,
	}}
	token := jwt.NewWithClaims(jwt.SigningMethodRS256, m.claims)
	token.Header["kid"] = i.kid
	raw, err := token.SignedString(i.key)
	if err != nil {
		return minted{}, fmt.Errorf("signing a token: %w", err)
	}
	m.raw = raw
	return m, nil
}

// Keys verify the tokens and certificates of the fake Azure.
type Keys struct {
	JWKS json.RawMessage `json:"jwks"` // of the token signing key
	PEM  string          `json:"pem"`  // the same key
	CA   string          `json:"ca"`   // the certificate of the CA that signs the TLS certificate
}

func (i *issuer) keys(ca []byte) (Keys, error) {
	der, err := x509.MarshalPKIXPublicKey(&i.key.PublicKey)
	if err != nil {
		return Keys{}, fmt.Errorf("encoding the signing key: %w", err)
	}
	return Keys{
		JWKS: i.jwks(),
		PEM:  string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
		CA:   string(ca),
	}, nil
}

type jwk struct {
	Type string `json:"kty"`
	Use  string `json:"use,omitempty"`
	ID   string `json:"kid"`
	N    string `json:"n"`
	E    string `json:"e"`
}

type jwkSet struct {
	Keys []jwk `json:"keys"`
}

func (i *issuer) jwks() json.RawMessage {
	e := big.NewInt(int64(i.key.E)).Bytes()
	return encode(jwkSet{Keys: []jwk{{
		Type: "RSA", Use: "sig", ID: i.kid,
		N: base64.RawURLEncoding.EncodeToString(i.key.N.Bytes()), E: base64.RawURLEncoding.EncodeToString(e),
	}}})
}

// parseJWKS returns the RSA keys of a set, by key ID. A set without RSA keys is an error.
func parseJWKS(data []byte) (map[string]*rsa.PublicKey, error) {
	var set jwkSet
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("parsing a key set: %w", err)
	}
	keys := map[string]*rsa.PublicKey{}
	for _, k := range set.Keys {
		if k.Type != "RSA" {
			continue
		}
		n, errN := base64.RawURLEncoding.DecodeString(k.N)
		e, errE := base64.RawURLEncoding.DecodeString(k.E)
		if err := errors.Join(errN, errE); err != nil {
			return nil, fmt.Errorf("key %q of the key set: decoding the modulus and the exponent: %w", k.ID, err)
		}
		if len(n) == 0 || len(e) == 0 || len(e) > 4 {
			return nil, fmt.Errorf("key %q of the key set: the modulus or the exponent is empty, or the exponent is longer than 4 bytes", k.ID)
		}
		keys[k.ID] = &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}
	}
	if len(keys) == 0 {
		return nil, errors.New("the key set contains no RSA key")
	}
	return keys, nil
}

// Verify checks a token's signature and times and returns its claims.
func (k Keys) Verify(token string) (Claims, error) {
	var claims Claims
	keys, err := parseJWKS(k.JWKS)
	if err != nil {
		return claims, err
	}
	_, err = jwt.ParseWithClaims(token, &claims, keyByID(keys), jwt.WithValidMethods([]string{"RS256"}), jwt.WithExpirationRequired())
	if err != nil {
		return Claims{}, fmt.Errorf("verifying a token: %w", err)
	}
	return claims, nil
}

func keyByID(keys map[string]*rsa.PublicKey) jwt.Keyfunc {
	return func(t *jwt.Token) (any, error) {
		kid, _ := t.Header["kid"].(string)
		if key, ok := keys[kid]; ok {
			return key, nil
		}
		return nil, fmt.Errorf("the key set has no key with the ID %q, which the token names", kid)
	}
}

// encode returns compact JSON. Like Azure, it does not escape &, < and >, so that a
// resource is returned byte for byte. It panics if v cannot be encoded, which does
// not happen with the values in this package.
func encode(v any) []byte {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n"))
}
