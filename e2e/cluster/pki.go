package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// pki signs the cluster's certificates. It is made anew for each cluster and never leaves the run folder.
type pki struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// certRequest is one certificate to sign: for a server when it has addresses, else for a client.
type certRequest struct {
	file, user string
	groups     []string
	ips, names []string
}

// writePKI writes the CA, all certificates, the ServiceAccount key pair and a kubeconfig for each user.
func writePKI(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, err := newCA(dir)
	if err != nil {
		return fmt.Errorf("making the cluster's CA: %w", err)
	}
	masters, nodes := []string{"system:masters"}, []string{"system:nodes"}
	requests := []certRequest{
		{file: "apiserver", user: "kube-apiserver",
			ips:   []string{"127.0.0.1", controlPlaneIP, serviceIP},
			names: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}},
		{file: "kubelet-client", user: "kube-apiserver-kubelet-client", groups: masters},
		{file: "admin", user: "admin", groups: masters},
		{file: "kcm", user: "system:kube-controller-manager"},
		{file: "scheduler", user: "system:kube-scheduler"},
	}
	users := []string{"admin", "kcm", "scheduler"}
	for _, n := range nodeSpecs {
		user := "system:node:" + n.Name
		requests = append(requests,
			certRequest{file: n.Name, user: user, groups: nodes},
			certRequest{file: n.Name + "-serving", user: user, groups: nodes, ips: []string{n.IP}, names: []string{n.Name}})
		users = append(users, n.Name)
	}
	for _, r := range requests {
		if err := ca.sign(r); err != nil {
			return fmt.Errorf("signing the certificate %s: %w", r.file, err)
		}
	}
	for _, user := range users {
		if err := writeKubeconfig(dir, user); err != nil {
			return err
		}
	}
	return writeServiceAccountKeys(dir)
}

func newCA(dir string) (*pki, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certTemplate("podidentity-e2e")
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &pki{dir: dir, cert: cert, key: key}, writePEM(filepath.Join(dir, "ca.crt"), "CERTIFICATE", der)
}

func certTemplate(user string, groups ...string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // the system's random source is gone
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: user, Organization: groups},
		NotBefore:    time.Now().Add(-time.Hour), // for a clock that is set back a little
		NotAfter:     time.Now().AddDate(1, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
}

func (ca *pki) sign(r certRequest) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := certTemplate(r.user, r.groups...)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if len(r.ips) > 0 {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		template.DNSNames = r.names
		for _, ip := range r.ips {
			template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(ca.dir, r.file+".crt"), "CERTIFICATE", der); err != nil {
		return err
	}
	return writeKey(filepath.Join(ca.dir, r.file+".key"), key)
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "EC PRIVATE KEY", der)
}

// writeServiceAccountKeys makes RSA keys, as real clusters have: Entra ID takes no other signature of a federated token.
func writeServiceAccountKeys(dir string) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", public); err != nil {
		return err
	}
	return writePEM(filepath.Join(dir, "sa.key"), "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key))
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func writeKubeconfig(dir, user string) error {
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: podidentity-e2e
  cluster: {server: "https://%[1]s:%[2]s", certificate-authority: %[3]s/ca.crt}
users:
- name: %[4]s
  user: {client-certificate: %[3]s/%[4]s.crt, client-key: %[3]s/%[4]s.key}
contexts:
- name: podidentity-e2e
  context: {cluster: podidentity-e2e, user: %[4]s}
current-context: podidentity-e2e
`, controlPlaneIP, apiPort, dir, user)
	return os.WriteFile(filepath.Join(dir, user+".kubeconfig"), []byte(text), 0o600)
}
