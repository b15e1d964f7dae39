package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// The sources of the tokens of fresh identities, which createAll gives to the identities in turn.
const (
	managed     = "msi"
	secret      = "secret"
	certificate = "certificate"
	federated   = "federated"
)

var sources = []string{managed, secret, certificate, federated}

// freshIdentity is an identity of one pod, for which no token was requested yet.
type freshIdentity struct {
	pod    int
	source string
	id     azure.Identity
	app    azure.App         // in Entra ID; empty for a managed identity
	spec   map[string]any    // of its AzureIdentity
	secret map[string][]byte // what its Secret holds; nil if it has none
}

func (n freshIdentity) name() string { return fmt.Sprintf("new-%d", n.pod) }

// credentials are what fresh identities authenticate with. All identities of the source certificate have the same
// certificate, but each has it in a Secret of its own, so NMI decrypts the PKCS #12 file separately for each identity.
type credentials struct {
	certificate, pkcs12 []byte
	trust               azure.FederatedCredential
}

const pkcs12Password = "pass word"

func (r *environment) newCredentials(ctx context.Context) (*credentials, error) {
	var p credentials
	issuer, keys, err := r.cluster.Issuer(ctx)
	if err != nil {
		return nil, err
	}
	p.trust = azure.FederatedCredential{
		Issuer: issuer, Subject: "system:serviceaccount:" + namespace + ":default", Audience: "api://AzureADTokenExchange", JWKS: keys,
	}
	if p.certificate, p.pkcs12, err = r.newCertificate(ctx); err != nil {
		return nil, fmt.Errorf("creating a certificate: %w", err)
	}
	return &p, nil
}

// newCertificate creates a certificate and packs it into a PKCS #12 file with openssl, as users do, so that NMI needs
// as many hash iterations to read the file as for a file of a user. It returns the certificate as PEM, and the contents
// of the file.
func (r *environment) newCertificate(ctx context.Context) (cert, packed []byte, err error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "application"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	in, out := filepath.Join(r.dir, "certificate.pem"), filepath.Join(r.dir, "certificate.pfx")
	if err := os.WriteFile(in, slices.Concat(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), cert), 0o600); err != nil {
		return nil, nil, err
	}
	pack := exec.CommandContext(ctx, "openssl", "pkcs12", "-export", "-in", in, "-out", out, "-passout", "pass:"+pkcs12Password)
	if output, err := pack.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("openssl pkcs12: %w: %s", err, output)
	}
	packed, err = os.ReadFile(out)
	return cert, packed, err
}

// freshIdentity describes the identity of the i-th pod.
func (p *credentials) freshIdentity(source string, i int) freshIdentity {
	n := freshIdentity{pod: i, source: source, id: azure.Identity{
		ClientID: fmt.Sprintf("be9c4002-0000-4000-8000-%012d", i+1), ObjectID: fmt.Sprintf("be9c4003-0000-4000-8000-%012d", i+1), TenantID: cluster.TenantID,
	}}
	if source == managed {
		n.id.ResourceID = fmt.Sprintf("/subscriptions/%s/resourcegroups/bench/providers/Microsoft.ManagedIdentity/userAssignedIdentities/%s", cluster.SubscriptionID, n.name())
		n.spec = managedSpec(n.id)
		return n
	}
	n.app = azure.App{ClientID: n.id.ClientID, ObjectID: n.id.ObjectID}
	n.spec = map[string]any{"clientID": n.id.ClientID, "tenantID": n.id.TenantID}
	switch source {
	case secret:
		value := rand.Text()
		n.app.Secrets = []azure.AppSecret{{Value: value}}
		n.secret, n.spec["type"] = map[string][]byte{"clientSecret": []byte(value)}, int64(1)
	case certificate:
		n.app.Certificates = []string{string(p.certificate)}
		n.secret, n.spec["type"] = map[string][]byte{"certificate": p.pkcs12, "password": []byte(pkcs12Password)}, int64(2)
	case federated:
		n.app.Federated = []azure.FederatedCredential{p.trust}
		n.spec["type"] = int64(3)
	}
	if n.secret != nil {
		n.spec["clientPassword"] = map[string]any{"name": n.name(), "namespace": namespace}
	}
	return n
}

// create creates the identity in the fake Azure, and its objects in the cluster. It changes the label of the identity's
// pod, so that the pod uses this identity instead of the shared one.
func (r *environment) create(ctx context.Context, k clients, n freshIdentity) error {
	var err error
	if n.source == managed {
		err = r.azure.AddIdentity(ctx, n.id)
	} else {
		err = r.azure.AddApp(ctx, n.app)
	}
	if err != nil {
		return err
	}
	if n.secret != nil {
		object := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: n.name()}, Data: n.secret}
		if _, err := k.kube.CoreV1().Secrets(namespace).Create(ctx, object, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	if err := k.makeIdentity(ctx, namespace, n.name(), n.name(), n.spec); err != nil {
		return err
	}
	label := fmt.Appendf(nil, `{"metadata":{"labels":{"aadpodidbinding":%q}}}`, n.name())
	_, err = k.kube.CoreV1().Pods(namespace).Patch(ctx, podName(n.pod), types.MergePatchType, label, metav1.PatchOptions{})
	return err
}
