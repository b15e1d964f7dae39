package azure

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Files in the state directory. They outlive the process, so that after a restart
// clients still trust the CA and earlier tokens are still valid.
const (
	signingKeyFile = "signing.key"
	caKeyFile      = "ca.key"
	tlsKeyFile     = "tls.key"
	tlsCertFile    = "tls.crt"
	// CAFile is the name of the CA certificate in the state directory. Clients of
	// the fake Entra ID and of the fake ARM must trust it.
	CAFile = "ca.crt"
)

const certLifetime = 365 * 24 * time.Hour

// state is the key material of a fake Azure.
type state struct {
	signing *rsa.PrivateKey
	caPEM   []byte
	tls     tls.Certificate
}

// openState reads the key material. It creates missing keys and certificates. It
// replaces a certificate that does not match the host names or the keys, or that has
// at most half of its lifetime left.
func openState(dir string, hosts []string) (*state, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("creating the state directory: %w", err)
	}
	signing, err := loadOrMakeKey(filepath.Join(dir, signingKeyFile))
	if err != nil {
		return nil, err
	}
	caKey, err := loadOrMakeKey(filepath.Join(dir, caKeyFile))
	if err != nil {
		return nil, err
	}
	ca, err := loadOrMakeCA(filepath.Join(dir, CAFile), caKey)
	if err != nil {
		return nil, err
	}
	key, err := loadOrMakeKey(filepath.Join(dir, tlsKeyFile))
	if err != nil {
		return nil, err
	}
	leaf, err := loadOrMakeLeaf(filepath.Join(dir, tlsCertFile), key, ca, caKey, hosts)
	if err != nil {
		return nil, err
	}
	return &state{
		signing: signing,
		caPEM:   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}),
		tls:     tls.Certificate{Certificate: [][]byte{leaf.Raw, ca.Raw}, PrivateKey: key, Leaf: leaf},
	}, nil
}

func loadOrMakeKey(file string) (*rsa.PrivateKey, error) {
	data, err := os.ReadFile(file)
	if err == nil {
		block, _ := pem.Decode(data)
		if block == nil {
			return nil, fmt.Errorf("key file %s is not PEM; if you delete the file, the fake Azure creates a new key", file)
		}
		parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parsing key file %s as PKCS#8: %w; delete the file to get a new key", file, err)
		}
		key, ok := parsed.(*rsa.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("key file %s holds a %T, not an RSA key; delete the file to get a new key", file, parsed)
		}
		return key, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading a key file: %w", err)
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fmt.Errorf("generating an RSA key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding an RSA key: %w", err)
	}
	return key, writePEM(file, "PRIVATE KEY", der, 0o600)
}

func loadOrMakeCA(file string, key *rsa.PrivateKey) (*x509.Certificate, error) {
	if cert, err := readCertificate(file); err != nil {
		return nil, err
	} else if cert != nil && key.PublicKey.Equal(cert.PublicKey) && fresh(cert) {
		return cert, nil
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "fake Azure CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	return makeCertificate(file, template, template, key, key)
}

func loadOrMakeLeaf(file string, key *rsa.PrivateKey, ca *x509.Certificate, caKey *rsa.PrivateKey, hosts []string) (*x509.Certificate, error) {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "fake Azure"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	have, err := readCertificate(file)
	if err != nil {
		return nil, err
	}
	if have != nil && key.PublicKey.Equal(have.PublicKey) && fresh(have) && have.CheckSignatureFrom(ca) == nil &&
		!slices.ContainsFunc(hosts, func(h string) bool { return have.VerifyHostname(h) != nil }) {
		return have, nil
	}
	return makeCertificate(file, template, ca, key, caKey)
}

func fresh(c *x509.Certificate) bool { return time.Until(c.NotAfter) > certLifetime/2 }

// makeCertificate signs and writes a certificate. A CA certificate is its own
// parent.
func makeCertificate(file string, template, parent *x509.Certificate, key, signer *rsa.PrivateKey) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("generating a serial number: %w", err)
	}
	template.SerialNumber = serial
	template.NotBefore = time.Now().Add(-time.Hour)
	template.NotAfter = time.Now().Add(certLifetime)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		return nil, fmt.Errorf("signing %s: %w", filepath.Base(file), err)
	}
	if err := writePEM(file, "CERTIFICATE", der, 0o644); err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// readCertificate returns nil without an error if the file does not exist.
func readCertificate(file string) (*x509.Certificate, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading a certificate file: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("certificate file %s is not PEM; if you delete the file, the fake Azure creates a new certificate", file)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parsing certificate file %s: %w; delete the file to get a new certificate", file, err)
	}
	return cert, nil
}

// writePEM replaces the file atomically: a reader never sees a part of it. The file has the given mode whatever the
// umask is, because clients of other users read the CA certificate.
func writePEM(file, kind string, der []byte, mode fs.FileMode) error {
	tmp := file + ".new"
	if err := os.WriteFile(tmp, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode); err != nil {
		return fmt.Errorf("writing %s: %w", filepath.Base(file), err)
	}
	if err := os.Chmod(tmp, mode); err != nil {
		return fmt.Errorf("writing %s: %w", filepath.Base(file), err)
	}
	if err := os.Rename(tmp, file); err != nil {
		return fmt.Errorf("writing %s: %w", filepath.Base(file), err)
	}
	return nil
}

// certificateHosts returns the configured host names and the IP address on which
// Entra ID and ARM listen, unless it is 0.0.0.0 or ::.
func certificateHosts(cfg Config) []string {
	hosts := slices.Concat(cfg.EntraHosts, cfg.ARMHosts)
	host, _, _ := net.SplitHostPort(cfg.EntraAddr)
	if addr, err := netip.ParseAddr(host); err == nil && !addr.IsUnspecified() && !slices.Contains(hosts, host) {
		hosts = append(hosts, host)
	}
	return hosts
}
