package e2e

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// certificate is the certificate of an application. cert, key and chain are PEM. chain is the issuer's certificate, or
// nil for a self-signed certificate.
type certificate struct {
	cert, key, chain []byte
	signer           crypto.Signer
	parsed           *x509.Certificate
}

func rsaKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	return key
}

func ecKey(t *testing.T, curve elliptic.Curve) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	must(t, err)
	return key
}

// newCertificate issues a certificate. Without an issuer it is self-signed.
func newCertificate(t *testing.T, key crypto.Signer, issuer *certificate) certificate {
	t.Helper()
	return issueCertificate(t, key, issuer, time.Now().Add(time.Hour))
}

func expiredCertificate(t *testing.T, key crypto.Signer) certificate {
	t.Helper()
	return issueCertificate(t, key, nil, time.Now().Add(-time.Minute))
}

func issueCertificate(t *testing.T, key crypto.Signer, issuer *certificate, until time.Time) certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(int64(serial.Add(1))), Subject: pkix.Name{CommonName: "application"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: until,
	}
	parent, signer := template, key
	if issuer != nil {
		parent, signer = issuer.parsed, issuer.signer
	} else {
		template.IsCA, template.BasicConstraintsValid = true, true
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	must(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	c := certificate{cert: block("CERTIFICATE", der), key: block("PRIVATE KEY", private), signer: key}
	if issuer != nil {
		c.chain = issuer.cert
	}
	c.parsed, err = x509.ParseCertificate(der)
	must(t, err)
	return c
}

func block(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// legacyKey returns the key in the PEM format that preceded PKCS #8: PKCS #1 for RSA, SEC 1 for elliptic curves.
func (c certificate) legacyKey(t *testing.T) []byte {
	t.Helper()
	if key, ok := c.signer.(*rsa.PrivateKey); ok {
		return block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key))
	}
	der, err := x509.MarshalECPrivateKey(c.signer.(*ecdsa.PrivateKey))
	must(t, err)
	return block("EC PRIVATE KEY", der)
}

// pfx returns a PKCS #12 file that openssl has written, because users use openssl. A file written with NMI's own
// library would prove less. options are further options of openssl.
func (c certificate) pfx(t *testing.T, password string, options ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in.pem"), filepath.Join(dir, "out.pfx")
	must(t, os.WriteFile(in, slices.Concat(c.key, c.cert, c.chain), 0o600))
	args := append([]string{"pkcs12", "-export", "-in", in, "-out", out, "-passout", "pass:" + password}, options...)
	if output, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput(); err != nil {
		t.Fatalf("openssl %q: %v\n%s", args, err, output)
	}
	packed, err := os.ReadFile(out)
	must(t, err)
	return packed
}
