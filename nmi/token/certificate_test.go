package token

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"software.sslmate.com/src/go-pkcs12"

	"github.com/podidentity/podidentity/identity"
)

// testCertificate is a key and its certificate.
type testCertificate struct {
	key crypto.Signer
	der []byte
}

func certify(key crypto.Signer, from, to time.Time) testCertificate {
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: from, NotAfter: to}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return testCertificate{key, der}
}

func certifyNow(key crypto.Signer) testCertificate {
	return certify(key, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
}

func newRSA(bits int) *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		panic(err)
	}
	return key
}

func newEC(curve elliptic.Curve) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

var (
	rsa2048 = sync.OnceValue(func() testCertificate { return certifyNow(newRSA(2048)) })
	ec256   = sync.OnceValue(func() testCertificate { return certifyNow(newEC(elliptic.P256())) })
)

func parsed(t testing.TB, all ...testCertificate) []*x509.Certificate {
	t.Helper()
	var certs []*x509.Certificate
	for _, c := range all {
		cert, err := x509.ParseCertificate(c.der)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, cert)
	}
	return certs
}

func inPEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func (c testCertificate) certPEM() []byte { return inPEM("CERTIFICATE", c.der) }

func (c testCertificate) keyPEM() []byte {
	der, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		panic(err)
	}
	return inPEM("PRIVATE KEY", der)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, []byte("\n")) }

func TestACertificateIsReadInEveryFormat(t *testing.T) {
	r, ec, ca := rsa2048(), ec256(), certifyNow(newEC(elliptic.P384()))
	pkcs1 := inPEM("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(r.key.(*rsa.PrivateKey)))
	sec1DER, err := x509.MarshalECPrivateKey(ec.key.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	sec1 := inPEM("EC PRIVATE KEY", sec1DER)
	older := certify(r.key, time.Now().Add(-2*time.Hour), time.Now().Add(time.Minute))
	base := func(b []byte) []byte { return []byte(base64.StdEncoding.EncodeToString(b)) }
	lines := func(b []byte) []byte {
		return join(slices.Collect(slices.Chunk(append(base(b), '\r', '\n'), 76))...)
	}
	file := encode(t, pkcs12.Modern2023, r, "password", ca)
	cases := []struct {
		name     string
		file     []byte
		password string
		want     testCertificate
		chain    int
	}{
		{"PKCS#8 last", join(r.certPEM(), r.keyPEM()), "", r, 1},
		{"PKCS#1 first", join(pkcs1, r.certPEM()), "", r, 1},
		{"SEC 1 with parameters", join(inPEM("EC PARAMETERS", []byte{6, 0}), sec1, ec.certPEM()), "", ec, 1},
		{"a chain in disorder", join([]byte("Bag Attributes\n"), ca.certPEM(), r.certPEM(), r.keyPEM()), "", r, 2},
		{"a renewed certificate beside the older", join(older.certPEM(), r.certPEM(), r.keyPEM()), "", r, 1},
		{"PEM beside a password it does not need", join(ec.certPEM(), ec.keyPEM()), "password", ec, 1},
		{"base64 of PEM", base(join(ec.certPEM(), ec.keyPEM())), "", ec, 1},
		{"PKCS#12", file, "password", r, 2},
		{"PKCS#12, a line as the password", file, "password\r\n", r, 2},
		{"base64 of PKCS#12", base(file), "password", r, 2},
		{"base64 of PKCS#12 in lines", lines(file), "password", r, 2},
		{"PKCS#12 with EC", encode(t, pkcs12.Modern2023, ec, "päss"), "päss", ec, 1},
		{"PKCS#12 with an empty password", encode(t, pkcs12.Modern2023, r, ""), "", r, 1},
		{"PKCS#12 without a password", encode(t, pkcs12.Passwordless, r, ""), "", r, 1},
		{"PKCS#12 of old", encode(t, pkcs12.LegacyRC2, r, "password"), "password", r, 1},
		{"PKCS#12 with 3DES", encode(t, pkcs12.LegacyDES, r, "password"), "password", r, 1},
		{"PKCS#12 with PBMAC1", encode(t, pkcs12.Modern2026, r, "password"), "password", r, 1},
	}
	unlock := patientOpener().open
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			data := map[string][]byte{"certificate": c.file}
			if c.password != "" {
				data["password"] = []byte(c.password)
			}
			pair, err := certificate(t.Context(), data, unlock, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			if !pair.key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(c.want.key.Public()) || !bytes.Equal(pair.chain[0].Raw, c.want.der) || len(pair.chain) != c.chain {
				t.Errorf("read another key or certificate, with a chain of %d", len(pair.chain))
			}
		})
	}
}

func TestEachInvalidCertificateHasItsOwnMessage(t *testing.T) {
	r, ec := rsa2048(), ec256()
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	small, p224, edwards := certifyNow(newRSA(1024)), certifyNow(newEC(elliptic.P224())), certifyNow(ed)
	expired := certify(ec.key, time.Now().Add(-48*time.Hour), time.Date(2020, 2, 3, 4, 5, 0, 0, time.UTC))
	future := certify(ec.key, time.Date(2120, 2, 3, 4, 5, 0, 0, time.UTC), time.Date(2121, 1, 1, 0, 0, 0, 0, time.UTC))
	legacyEncrypted := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-128-CBC,00"}, Bytes: []byte("x")})
	locked := encode(t, pkcs12.Modern2023, r, "password-of-it")
	cases := []struct {
		name     string
		file     []byte
		password string
		want     string
	}{
		{"nothing", nil, "", `nothing under the key "certificate"`},
		{"too much", make([]byte, maxCertificateData+1), "", "more than 128 KiB"},
		{"garbage", []byte("not a certificate"), "", "neither PEM nor PKCS#12"},
		{"base64 of garbage", []byte(base64.StdEncoding.EncodeToString([]byte("no"))), "", "neither PEM nor PKCS#12"},
		{"DER of another kind", r.der, "", "cannot be read as PKCS#12"},
		{"half a file", locked[:len(locked)/2], "password-of-it", "cannot be read as PKCS#12"},
		{"a missing password", locked, "", "requires a password"},
		{"a wrong password", locked, "another-password", "does not open"},
		{"a password of control characters", locked, "a\x00b", "bytes that are not text"},
		{"a PEM key with a password", join(r.certPEM(), inPEM("ENCRYPTED PRIVATE KEY", []byte("x"))), "", "PEM private key with a password"},
		{"a PEM key with a password, as of old", join(r.certPEM(), legacyEncrypted), "", "PEM private key with a password"},
		{"no key", r.certPEM(), "", "no private key"},
		{"two keys", join(r.certPEM(), r.keyPEM(), ec.keyPEM()), "", "several private keys"},
		{"no certificate", r.keyPEM(), "", "no certificate"},
		{"a certificate that is none", join(r.keyPEM(), inPEM("CERTIFICATE", []byte("x"))), "", `a certificate under the key "certificate" that cannot be read`},
		{"a key that is none", join(r.certPEM(), inPEM("PRIVATE KEY", []byte("x"))), "", `a private key under the key "certificate" that cannot be read`},
		{"a key beyond measure", join(r.certPEM(), inPEM("PRIVATE KEY", make([]byte, maxKeyDER+1))), "", "more than 16 KiB"},
		{"too long a chain", join(append(slices.Repeat([][]byte{ec.certPEM()}, maxChain+1), r.keyPEM())...), "", "more than 16 certificates"},
		{"a key of another certificate", join(r.certPEM(), ec.keyPEM()), "", "does not match any certificate"},
		{"a small key", join(small.certPEM(), small.keyPEM()), "", "RSA key of 1024 bits"},
		{"an unknown curve", join(p224.certPEM(), p224.keyPEM()), "", "EC key on a curve"},
		{"another kind of key", join(edwards.certPEM(), edwards.keyPEM()), "", "of a kind that Entra ID does not support"},
		{"expired", join(expired.certPEM(), expired.keyPEM()), "", "expired on 2020-02-03 04:05 UTC"},
		{"not valid yet", join(future.certPEM(), future.keyPEM()), "", "valid only from 2120-02-03 04:05 UTC"},
	}
	unlock := patientOpener().open
	seen := map[string]string{}
	for _, c := range cases {
		data := map[string][]byte{"certificate": c.file, "password": []byte(c.password)}
		_, err := certificate(t.Context(), data, unlock, time.Now())
		failed := contentError(Ref{"ns", "name"}, err)
		if failed.Class != Denied || failed.Reason != identity.SecretInvalid || !strings.HasPrefix(failed.Detail, "Secret ns/name has ") && !strings.HasPrefix(failed.Detail, "Secret ns/name holds ") || !strings.Contains(failed.Detail, c.want) {
			t.Errorf("%s: got %+v", c.name, failed)
		}
		if all := texts(failed); c.password != "" && strings.Contains(all, c.password) {
			t.Errorf("%s: the password is in the error: %s", c.name, all)
		}
		seen[failed.Detail] = c.name
	}
	if len(seen) < len(cases)-3 {
		t.Errorf("only %d different messages for %d invalid certificates", len(seen), len(cases))
	}
}

// TestACertificateSignsTheAssertionOfThePrincipal verifies the assertion like Entra ID.
func TestACertificateSignsTheAssertionOfThePrincipal(t *testing.T) {
	other := certifyNow(newEC(elliptic.P256()))
	cases := []struct {
		alg  string
		cert testCertificate
	}{
		{"PS256", rsa2048()},
		{"ES256", ec256()},
		{"ES384", certifyNow(newEC(elliptic.P384()))},
		{"ES512", certifyNow(newEC(elliptic.P521()))},
	}
	for _, c := range cases {
		t.Run(c.alg, func(t *testing.T) {
			t.Parallel()
			s := startEntraID(t)
			k := secretsWith(map[string][]byte{"certificate": join(other.certPEM(), c.cert.certPEM(), c.cert.keyPEM())})
			e := newTestEntra(t, s, k)
			seen := map[string]bool{}
			for range 2 {
				if _, err := e.Fetch(t.Context(), callFor(s.principal(Certificate))); err != nil {
					t.Fatal(err)
				}
				seen[checkAssertion(t, s, c.alg, c.cert, other)] = true
			}
			if len(seen) != 2 || k.reads != 1 {
				t.Errorf("two fetches sent %d different assertions, want 2, and read the Secret %d times, want once", len(seen), k.reads)
			}
		})
	}
}

// checkAssertion checks the last assertion sent, and returns its ID.
func checkAssertion(t *testing.T, s *entraID, alg string, own, other testCertificate) string {
	t.Helper()
	posts := s.sent()
	form := posts[len(posts)-1].form
	if form.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" || form.Get("grant_type") != "client_credentials" || form.Has("claims") || form.Has("client_secret") {
		t.Errorf("the token request has the form %v", form)
	}
	var claims jwt.RegisteredClaims
	got, err := jwt.ParseWithClaims(form.Get("client_assertion"), &claims, func(*jwt.Token) (any, error) { return own.key.Public(), nil },
		jwt.WithValidMethods([]string{alg}), jwt.WithAudience(s.URL+"/"+tenant+"/oauth2/v2.0/token"), jwt.WithIssuer(clientID), jwt.WithSubject(clientID), jwt.WithExpirationRequired())
	if err != nil {
		t.Fatal(err)
	}
	if life := time.Until(claims.ExpiresAt.Time); life < 9*time.Minute || life > 11*time.Minute || claims.ID == "" || claims.NotBefore == nil {
		t.Errorf("the assertion has the claims %+v", claims)
	}
	chain, _ := got.Header["x5c"].([]any)
	want := []any{base64.StdEncoding.EncodeToString(own.der), base64.StdEncoding.EncodeToString(other.der)}
	thumbprint := sha256.Sum256(own.der)
	named, _ := got.Header["x5t#S256"].(string)
	if !slices.Equal(chain, want) || strings.TrimRight(strings.NewReplacer("+", "-", "/", "_").Replace(named), "=") != base64.RawURLEncoding.EncodeToString(thumbprint[:]) {
		t.Errorf("the assertion has the header %v", got.Header)
	}
	return claims.ID
}

func TestAnExpiredCertificateIsReported(t *testing.T) {
	s := startEntraID(t)
	c := certify(ec256().key, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	e := newTestEntra(t, s, secretsWith(map[string][]byte{"certificate": join(c.certPEM(), c.keyPEM())}))
	p := s.principal(Certificate)
	if _, err := e.Fetch(t.Context(), callFor(p)); err != nil {
		t.Fatal(err)
	}
	e.client(p).expires = time.Now().Add(-time.Second)
	e.secrets = secretsWith(map[string][]byte{"certificate": join(certify(c.key, time.Now().Add(-time.Hour), time.Now().Add(-time.Second)).certPEM(), c.keyPEM())})
	if failed := mustFail(t, e, callFor(p)); failed.Reason != identity.SecretInvalid || !strings.Contains(failed.Detail, "expired on") {
		t.Errorf("for a certificate that expired after the first fetch: got %+v", failed)
	}
}

// unlockInProcess is an unlocker without a child process.
func unlockInProcess(_ context.Context, file []byte, password string) (contents, error) {
	return decodePKCS12(pkcs12Request{file, password}).contents(password != "")
}

// takesLong reports whether a file may be slow to open. It looks for an integer of more than 16 bits in the file and in
// the data that the file encodes as base64, because such an integer can be the number of hash iterations.
func takesLong(file []byte) bool {
	decoded, _ := base64.StdEncoding.DecodeString(string(bytes.Join(bytes.Fields(file), nil)))
	file = slices.Concat(file, decoded)
	for i := range file {
		if file[i] != 2 || i+1 == len(file) || file[i+1] < 3 || file[i+1] > 8 || i+2+int(file[i+1]) > len(file) {
			continue
		}
		if n := new(big.Int).SetBytes(file[i+2 : i+2+int(file[i+1])]); n.BitLen() > 16 {
			return true
		}
	}
	return false
}

func FuzzCertificate(f *testing.F) {
	r, ec := rsa2048(), ec256()
	f.Add(join(r.certPEM(), r.keyPEM()), "")
	f.Add(join(ec.keyPEM(), ec.certPEM(), r.certPEM()), "x")
	for _, encoder := range []*pkcs12.Encoder{pkcs12.LegacyRC2, pkcs12.LegacyDES, pkcs12.Modern2023, pkcs12.Modern2026} {
		f.Add(encode(f, encoder.WithIterations(3), ec, "password"), "password")
	}
	f.Add(encode(f, pkcs12.Passwordless, ec, "", r), "")
	f.Add([]byte(base64.StdEncoding.EncodeToString(encode(f, pkcs12.Passwordless, ec, ""))), "")
	f.Fuzz(func(t *testing.T, file []byte, password string) {
		if takesLong(file) {
			return
		}
		checkReading(t, map[string][]byte{"certificate": file, "password": []byte(password)}, true)
	})
}

// checkReading reads a Secret and checks that the result is a credential, or an error that contains no part of the
// Secret.
func checkReading(t *testing.T, data map[string][]byte, asCertificate bool) {
	t.Helper()
	var err error
	if asCertificate {
		var pair keyPair
		if pair, err = certificate(t.Context(), data, unlockInProcess, time.Now()); err == nil {
			if pair.key == nil || len(pair.chain) == 0 {
				t.Errorf("certificate returned neither a key pair nor an error")
			}
			return
		}
	} else {
		var secret string
		if secret, err = clientSecret(data); err == nil {
			if secret == "" {
				t.Error("clientSecret returned neither a secret nor an error")
			}
			return
		}
	}
	var bad flaw
	if !errors.As(err, &bad) {
		t.Fatalf("the error of an invalid Secret is not a flaw: %v", err)
	}
	failed := contentError(Ref{"some-namespace", "some-name"}, err)
	if failed.Class != Denied || failed.Reason != identity.SecretInvalid || !strings.HasPrefix(failed.Detail, "Secret some-namespace/some-name ") || len(failed.Detail) > 600 {
		t.Errorf("for an invalid Secret: got %+v", failed)
	}
	all := texts(failed)
	for key, value := range data {
		if len(value) >= 8 && strings.Contains(all, string(value)) && !strings.Contains(staticTexts, string(value)) {
			t.Errorf("the value of the key %q is in the error: %s", key, all)
		}
	}
}
