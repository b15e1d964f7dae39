package token

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Users who may write a Secret choose the data that is parsed here, in a process with rights over the node. Therefore
// these constants bound the data. The bounds allow every key that Entra ID accepts, with its certificate chain.
const (
	maxCertificateData = 128 << 10
	maxKeyDER          = 16 << 10
	maxChain           = 16
	minRSABits         = 2048
	maxRSABits         = 8192
)

// keyPair is a private key and its certificate chain. The first certificate is that of the key.
type keyPair struct {
	key   crypto.Signer
	chain []*x509.Certificate
}

// contents are the keys and certificates in a file.
type contents struct {
	keys         []any
	certificates []*x509.Certificate
}

// unlocker opens a PKCS#12 file. Its error is a flaw if the file is invalid or the password does not open it.
type unlocker func(ctx context.Context, file []byte, password string) (contents, error)

const writeCertificate = "write the certificate and its private key there, as PEM or PKCS#12"

// certificate returns the certificate and its key. Its error is a flaw if the content of the Secret is invalid.
func certificate(ctx context.Context, data map[string][]byte, unlock unlocker, now time.Time) (keyPair, error) {
	file := data[certificateKey]
	switch {
	case len(file) == 0:
		return keyPair{}, flaw("has nothing under the key \"certificate\"; " + writeCertificate)
	case len(file) > maxCertificateData:
		return keyPair{}, flaw("has more than 128 KiB under the key \"certificate\"; write only the certificate, its key and its chain")
	}
	var password string
	if value := data[passwordKey]; len(bytes.TrimRight(value, "\r\n")) > 0 {
		var err error
		if password, err = plainText(value, "password"); err != nil {
			return keyPair{}, err
		}
	}
	if !isPEM(file) && !isDER(file) {
		// Key Vault returns a PKCS#12 file as base64, and users write that text to the Secret.
		text := bytes.Join(bytes.Fields(file), nil)
		decoded, err := base64.StdEncoding.DecodeString(string(text))
		if err != nil || !isPEM(decoded) && !isDER(decoded) {
			return keyPair{}, flaw("has neither PEM nor PKCS#12 under the key \"certificate\"; " + writeCertificate)
		}
		file = decoded
	}
	read := readPEM
	if !isPEM(file) {
		read = func(file []byte) (contents, error) { return unlock(ctx, file, password) }
	}
	found, err := read(file)
	if err != nil {
		return keyPair{}, err
	}
	return found.pair(now)
}

func isPEM(b []byte) bool { return bytes.Contains(b, []byte("-----BEGIN ")) }

// isDER reports whether b starts with a SEQUENCE. A PKCS#12 file does; its base64 encoding does not.
func isDER(b []byte) bool { return len(b) > 0 && b[0] == 0x30 }

func readPEM(file []byte) (contents, error) {
	var found contents
	for {
		var block *pem.Block
		if block, file = pem.Decode(file); block == nil {
			return found, nil
		}
		if block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
			return found, flaw("has a PEM private key with a password under the key \"certificate\"; NMI does not support this; write the private key there without a password, or write a PKCS#12 file there and the password of that file under the key \"password\"")
		}
		var err error
		switch block.Type {
		case "CERTIFICATE":
			err = found.addCertificate(block.Bytes)
		case "PRIVATE KEY":
			err = found.addKey(block.Bytes, x509.ParsePKCS8PrivateKey)
		case "RSA PRIVATE KEY":
			err = found.addKey(block.Bytes, func(der []byte) (any, error) { return x509.ParsePKCS1PrivateKey(der) })
		case "EC PRIVATE KEY":
			err = found.addKey(block.Bytes, func(der []byte) (any, error) { return x509.ParseECPrivateKey(der) })
		}
		if err != nil {
			return found, err
		}
	}
}

func (c *contents) addCertificate(der []byte) error {
	if len(c.certificates) == maxChain {
		return flaw(fmt.Sprintf("has more than %d certificates under the key \"certificate\"; write only the certificate of the key and its chain", maxChain))
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return flaw("has a certificate under the key \"certificate\" that cannot be read; " + writeCertificate)
	}
	c.certificates = append(c.certificates, cert)
	return nil
}

func (c *contents) addKey(der []byte, parse func([]byte) (any, error)) error {
	if len(der) > maxKeyDER {
		return flaw("has a private key of more than 16 KiB under the key \"certificate\"; use an RSA key of 2048 to 4096 bits")
	}
	key, err := parse(der)
	if err != nil {
		return flaw("has a private key under the key \"certificate\" that cannot be read; write an RSA or EC key as PKCS#8, PKCS#1 or SEC 1")
	}
	c.keys = append(c.keys, key)
	return nil
}

// pair returns the key with its certificate chain. It returns a flaw if Entra ID does not accept the kind of key, if no
// certificate belongs to the key, or if the certificate is not valid now.
func (c contents) pair(now time.Time) (keyPair, error) {
	switch {
	case len(c.keys) == 0:
		return keyPair{}, flaw("has no private key under the key \"certificate\"; write the private key there as well, before or after the certificate")
	case len(c.keys) > 1:
		return keyPair{}, flaw("has several private keys under the key \"certificate\"; keep only the one that belongs to the certificate")
	case len(c.certificates) == 0:
		return keyPair{}, flaw("has a private key but no certificate under the key \"certificate\"; write the certificate there as well")
	}
	key, ok := c.keys[0].(crypto.Signer)
	if !ok {
		return keyPair{}, errUnusableKey
	}
	switch k := key.(type) {
	case *rsa.PrivateKey:
		if bits := k.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return keyPair{}, flaw(fmt.Sprintf("has an RSA key of %d bits under the key \"certificate\"; use one of %d to %d bits", bits, minRSABits, maxRSABits))
		}
	case *ecdsa.PrivateKey:
		if ecMethod(k) == nil {
			return keyPair{}, flaw("has under the key \"certificate\" an EC key on a curve that Entra ID does not support; use P-256, P-384 or P-521, or RSA")
		}
	default:
		return keyPair{}, errUnusableKey
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok {
		return keyPair{}, errUnusableKey
	}
	var own *x509.Certificate
	var others []*x509.Certificate
	for _, cert := range c.certificates {
		switch {
		case !public.Equal(cert.PublicKey):
			others = append(others, cert)
		case own == nil || cert.NotAfter.After(own.NotAfter): // a renewed certificate expires later
			own = cert
		}
	}
	const day = "2006-01-02 15:04 UTC"
	switch {
	case own == nil:
		return keyPair{}, flaw("has a private key under the key \"certificate\" that does not match any certificate there; write the certificate of this key")
	case now.After(own.NotAfter):
		return keyPair{}, flaw("has a certificate that expired on " + own.NotAfter.UTC().Format(day) + "; write a new one, and register it with the application")
	case now.Before(own.NotBefore):
		return keyPair{}, flaw("has a certificate that is valid only from " + own.NotBefore.UTC().Format(day) + "; check the clock of the node, or write a certificate that is valid now")
	}
	return keyPair{key: key, chain: slices.Insert(others, 0, own)}, nil
}

const errUnusableKey = flaw("has under the key \"certificate\" a private key of a kind that Entra ID does not support; use RSA, or EC on P-256, P-384 or P-521")

func ecMethod(key *ecdsa.PrivateKey) jwt.SigningMethod {
	switch key.Curve {
	case elliptic.P256():
		return jwt.SigningMethodES256
	case elliptic.P384():
		return jwt.SigningMethodES384
	case elliptic.P521():
		return jwt.SigningMethodES512
	}
	return nil
}

// ecAssertion returns the client assertion that MSAL would create if it supported EC keys: a JWT signed with key. MSAL
// supports only RSA keys.
func ecAssertion(p Principal, pair keyPair, key *ecdsa.PrivateKey) (string, error) {
	now := time.Now()
	assertion := jwt.NewWithClaims(ecMethod(key), jwt.MapClaims{
		"aud": p.Authority + "/" + p.TenantID + "/oauth2/v2.0/token",
		"iss": p.ClientID,
		"sub": p.ClientID,
		"jti": rand.Text(),
		"nbf": now.Unix(),
		"iat": now.Unix(),
		"exp": now.Add(10 * time.Minute).Unix(),
	})
	thumbprint := sha256.Sum256(pair.chain[0].Raw)
	assertion.Header["x5t#S256"] = base64.RawURLEncoding.EncodeToString(thumbprint[:])
	chain := make([]string, len(pair.chain))
	for i, cert := range pair.chain {
		chain[i] = base64.StdEncoding.EncodeToString(cert.Raw)
	}
	assertion.Header["x5c"] = chain
	return assertion.SignedString(key)
}
