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

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// pki is the CA that signs the certificates of one cluster. The private key of the CA is only in memory.
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
			return fmt.Errorf("writing the kubeconfig of %s: %w", user, err)
		}
	}
	if err := writeServiceAccountKeys(dir); err != nil {
		return fmt.Errorf("writing the ServiceAccount keys: %w", err)
	}
	return nil
}

// validFrom is an hour ago, so that certificates remain valid if the clock is set back a little.
func validFrom() time.Time { return time.Now().Add(-time.Hour) }

func newCA(dir string) (*pki, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca, err := cert.NewSelfSignedCACert(cert.Config{CommonName: "podidentity-e2e", NotBefore: validFrom()}, key)
	if err != nil {
		return nil, err
	}
	return &pki{dir: dir, cert: ca, key: key}, writeCert(filepath.Join(dir, "ca.crt"), ca)
}

func (ca *pki) sign(r certRequest) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: r.user, Organization: r.groups},
		NotBefore:    validFrom(),
		NotAfter:     time.Now().AddDate(1, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
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
	signed, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	if err := writeCert(filepath.Join(ca.dir, r.file+".crt"), signed); err != nil {
		return err
	}
	return writeKey(filepath.Join(ca.dir, r.file+".key"), key)
}

func writeCert(path string, c *x509.Certificate) error {
	data, err := cert.EncodeCertificates(c)
	if err != nil {
		return err
	}
	return cert.WriteCert(path, data)
}

func writeKey(path string, key any) error {
	data, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return err
	}
	return keyutil.WriteKey(path, data)
}

// writeServiceAccountKeys writes an RSA key pair, because Entra ID accepts an assertion only with an RSA signature.
func writeServiceAccountKeys(dir string) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	data := pem.EncodeToMemory(&pem.Block{Type: keyutil.PublicKeyBlockType, Bytes: public})
	if err := keyutil.WriteKey(filepath.Join(dir, "sa.pub"), data); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, "sa.key"), key)
}

func writeKubeconfig(dir, user string) error {
	const name = "podidentity-e2e"
	config := clientcmdapi.NewConfig()
	config.Clusters[name] = &clientcmdapi.Cluster{
		Server:               "https://" + net.JoinHostPort(controlPlaneIP, apiPort),
		CertificateAuthority: filepath.Join(dir, "ca.crt"),
	}
	config.AuthInfos[user] = &clientcmdapi.AuthInfo{
		ClientCertificate: filepath.Join(dir, user+".crt"),
		ClientKey:         filepath.Join(dir, user+".key"),
	}
	config.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: user}
	config.CurrentContext = name
	return clientcmd.WriteToFile(*config, filepath.Join(dir, user+".kubeconfig"))
}
