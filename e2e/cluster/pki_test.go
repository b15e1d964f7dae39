package cluster

import (
	"crypto/x509"
	"path/filepath"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

func TestKubeconfigsReferToCertificatesOfTheCA(t *testing.T) {
	dir := t.TempDir()
	if err := writePKI(dir); err != nil {
		t.Fatal(err)
	}
	roots, err := cert.NewPool(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct {
		file, user, group, name string
		usage                   x509.ExtKeyUsage
	}{
		{"apiserver", "kube-apiserver", "", serviceIP, x509.ExtKeyUsageServerAuth},
		{"admin", "admin", "system:masters", "", x509.ExtKeyUsageClientAuth},
		{"node1", "system:node:node1", "system:nodes", "", x509.ExtKeyUsageClientAuth},
		{"node1-serving", "system:node:node1", "system:nodes", nodeSpecs[0].IP, x509.ExtKeyUsageServerAuth},
	} {
		certs, err := cert.CertsFromFile(filepath.Join(dir, want.file+".crt"))
		if err != nil {
			t.Fatal(err)
		}
		c := certs[0]
		if _, err := c.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{want.usage}, DNSName: want.name}); err != nil {
			t.Errorf("verifying the certificate %s: %v", want.file, err)
		}
		if c.Subject.CommonName != want.user || (want.group != "" && (len(c.Subject.Organization) != 1 || c.Subject.Organization[0] != want.group)) {
			t.Errorf("the certificate %s has an unexpected user or group in its subject %s", want.file, c.Subject)
		}
	}
	for _, user := range []string{"admin", "kcm", "scheduler", "node1", "node2"} {
		config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(dir, user+".kubeconfig"))
		if err != nil {
			t.Fatal(err)
		}
		if config.Host != "https://"+controlPlaneIP+":"+apiPort || config.CAFile != filepath.Join(dir, "ca.crt") ||
			config.CertFile != filepath.Join(dir, user+".crt") || config.KeyFile != filepath.Join(dir, user+".key") {
			t.Errorf("the kubeconfig of %s has an unexpected server or unexpected files: %s, %+v", user, config.Host, config.TLSClientConfig)
		}
	}
	if keys, err := keyutil.PublicKeysFromFile(filepath.Join(dir, "sa.pub")); err != nil || len(keys) != 1 {
		t.Errorf("reading the public key of ServiceAccounts: keys %v, error %v, want one key", keys, err)
	}
	if _, err := keyutil.PrivateKeyFromFile(filepath.Join(dir, "sa.key")); err != nil {
		t.Errorf("reading the private key of ServiceAccounts: %v", err)
	}
}
