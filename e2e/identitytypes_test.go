package e2e

import (
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// newApp registers an application in the fake Entra ID.
func newApp(t *testing.T, change func(*azure.App)) azure.Identity {
	t.Helper()
	n := serial.Add(1)
	a := azure.App{ClientID: fmt.Sprintf("a9900000-0000-4000-8000-%012d", n), ObjectID: fmt.Sprintf("a9900001-0000-4000-8000-%012d", n)}
	change(&a)
	must(t, fakeAzure.AddApp(t.Context(), a))
	return azure.Identity{ClientID: a.ClientID, ObjectID: a.ObjectID, TenantID: cluster.TenantID}
}

func withSecret(values ...string) func(*azure.App) {
	return func(a *azure.App) {
		for _, v := range values {
			a.Secrets = append(a.Secrets, azure.AppSecret{Value: v})
		}
	}
}

const exchangeAudience = "api://AzureADTokenExchange"

// trust adds a federated credential for the ServiceAccount to the application or managed identity.
func trust(t *testing.T, id azure.Identity, namespace, account string) {
	t.Helper()
	must(t, testCluster.Trust(t.Context(), id.ClientID, namespace, account))
}

// clusterIssuer is the issuer of the cluster's ServiceAccount tokens.
func clusterIssuer(t *testing.T) string {
	t.Helper()
	issuer, _, err := testCluster.Issuer(t.Context())
	must(t, err)
	return issuer
}

// boundYAML returns the manifests of an AzureIdentity with spec, and of its binding for the pods with selector.
func (s *testNamespace) boundYAML(name, selector, spec string) string {
	return fmt.Sprintf(`
---
apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentity
metadata: {namespace: %[1]s, name: %[2]s}
spec: %[4]s
---
apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentityBinding
metadata: {namespace: %[1]s, name: %[2]s-binding}
spec: {azureIdentity: %[2]s, selector: %[3]s}
`, s.name, name, selector, spec)
}

// bySecretSpec returns the spec of an AzureIdentity for a service principal whose credential is in the Secret. kind is
// the type: 1 for a client secret, 2 for a certificate. further are additional fields.
func bySecretSpec(kind int, id azure.Identity, secret string, further ...string) string {
	fields := append([]string{fmt.Sprintf("type: %d, clientID: %s, tenantID: %q, clientPassword: {name: %s}", kind, id.ClientID, id.TenantID, secret)}, further...)
	return "{" + strings.Join(fields, ", ") + "}"
}

func federatedSpec(id azure.Identity) string {
	return fmt.Sprintf("{type: 3, clientID: %s, tenantID: %s}", id.ClientID, id.TenantID)
}

func (s *testNamespace) secretYAML(name string, data map[string][]byte) string {
	text, _ := json.Marshal(data) // []byte is encoded as base64, like the data of a Secret
	return fmt.Sprintf(`
---
{apiVersion: v1, kind: Secret, metadata: {namespace: %s, name: %s}, data: %s}
`, s.name, name, text)
}

func TestAServicePrincipalAuthenticatesWithASecret(t *testing.T) {
	s := newNamespace(t)
	named, only, other := newApp(t, withSecret("named")), newApp(t, withSecret("only")), newApp(t, withSecret("several"))
	// One value ends with a newline, because editors end a file with a newline. NMI must remove the newline.
	s.apply(s.secretYAML("named", map[string][]byte{"clientSecret": []byte("named"), "beside": []byte("x")}) +
		s.secretYAML("only", map[string][]byte{"whatever": []byte("only\n")}) +
		s.secretYAML("several", map[string][]byte{"first": []byte("several"), "second": []byte("x")}) +
		s.boundYAML("named", "app", bySecretSpec(1, named, "named")) +
		s.boundYAML("only", "app", bySecretSpec(1, only, "only")) +
		s.boundYAML("several", "app", bySecretSpec(1, other, "several")))
	s.pod("p", "app", "node1")
	must(t, fakeAzure.ResetLog(t.Context()))
	for _, id := range []azure.Identity{named, only} {
		s.mustHaveTokenOf(s.ask("p", vault, "client_id="+id.ClientID), id, vault)
		s.mustHaveTokenOf(s.ask("p", vault+"/", "client_id="+id.ClientID), id, vault+"/") // another resource
		s.mustHaveTokenOf(s.ask("p", vault, "client_id="+id.ClientID), id, vault)
	}
	refused := s.ask("p", vault, "client_id="+other.ClientID)
	s.mustBeRefused(refused, 403, "secret_invalid")
	if !strings.Contains(refused.body["detail"], s.name+"/several") || !strings.Contains(refused.body["detail"], "clientSecret") {
		t.Errorf("the refusal does not name the Secret and the key: %s", refused.raw)
	}
	stats, err := fakeAzure.Stats(t.Context())
	must(t, err)
	if stats.Entra.ByCredential[azure.CredentialSecret] != 4 || stats.Entra.Token.Requests != 4 || stats.IMDS.Token.Requests != 0 {
		t.Errorf("six requests for four different tokens caused %v at Entra ID and %d requests to IMDS; want 4 and 0", stats.Entra.ByCredential, stats.IMDS.Token.Requests)
	}
}

func TestEachCommonFormatOfACertificateIsAccepted(t *testing.T) {
	s := newNamespace(t)
	byRSA, byP256 := newCertificate(t, rsaKey(t), nil), newCertificate(t, ecKey(t, elliptic.P256()), nil)
	byP384, byP521 := newCertificate(t, ecKey(t, elliptic.P384()), nil), newCertificate(t, ecKey(t, elliptic.P521()), nil)
	issued := newCertificate(t, rsaKey(t), &byRSA)
	const password = "pass word"
	cases := []struct {
		form     string
		of       certificate
		packed   []byte
		password string
	}{
		{"pfx-modern", byRSA, byRSA.pfx(t, password), password},
		{"pfx-legacy", byRSA, byRSA.pfx(t, password, "-legacy"), password},
		{"pfx-no-password", byRSA, byRSA.pfx(t, ""), ""},
		{"pfx-legacy-no-password", byRSA, byRSA.pfx(t, "", "-legacy"), ""},
		{"pfx-unencrypted", byRSA, byRSA.pfx(t, "", "-keypbe", "NONE", "-certpbe", "NONE"), ""},
		{"pfx-chain", issued, issued.pfx(t, password), password},
		{"pfx-p256", byP256, byP256.pfx(t, password), password},
		{"pem-rsa", byRSA, slices.Concat(byRSA.key, byRSA.cert), ""},
		{"pem-rsa-old", byRSA, slices.Concat(byRSA.cert, byRSA.legacyKey(t)), ""},
		{"pem-chain", issued, slices.Concat(issued.key, issued.chain, issued.cert), ""},
		{"pem-p256-old", byP256, slices.Concat(byP256.legacyKey(t), byP256.cert), ""},
		{"pem-p384", byP384, slices.Concat(byP384.key, byP384.cert), ""},
		{"pem-p521", byP521, slices.Concat(byP521.cert, byP521.key), ""},
	}
	apps := map[string]azure.Identity{}
	yaml := s.podYAML("p", "app", "node2", "pause")
	for _, c := range cases {
		apps[c.form] = newApp(t, func(a *azure.App) { a.Certificates = []string{string(c.of.cert)} })
		data := map[string][]byte{"certificate": c.packed}
		if c.password != "" {
			data["password"] = []byte(c.password)
		}
		yaml += s.secretYAML(c.form, data) + s.boundYAML(c.form, "app", bySecretSpec(2, apps[c.form], c.form))
	}
	s.apply(yaml)
	s.waitForPods()
	must(t, fakeAzure.ResetLog(t.Context()))
	for _, c := range cases {
		id := apps[c.form]
		var a answer
		eventually(t, 30*time.Second, func() error { // NMI limits how many new tokens a pod gets each second
			if a = s.ask("p", vault, "client_id="+id.ClientID); a.reason() == "pod_throttled" {
				return fmt.Errorf("%s: %s", c.form, a.raw)
			}
			return nil
		})
		if a.status != 200 {
			t.Errorf("%s: %d %s", c.form, a.status, a.raw)
			continue
		}
		s.mustHaveTokenOf(a, id, vault)
	}
	if stats, err := fakeAzure.Stats(t.Context()); err != nil || stats.Entra.ByCredential[azure.CredentialCertificate] != len(cases) || stats.Entra.Token.Requests != len(cases) {
		t.Errorf("%d tokens caused these requests at Entra ID, by credential: %v (error: %v)", len(cases), stats.Entra.ByCredential, err)
	}
}

func TestAPodsServiceAccountIsExchangedForAToken(t *testing.T) {
	s, app, managed := newNamespace(t), newApp(t, func(*azure.App) {}), newIdentity(t)
	must(t, fakeAzure.Detach(t.Context(), managed.ClientID)) // a federated identity need not be attached to the machine
	trust(t, app, s.name, "worker")
	trust(t, managed, s.name, "worker")
	s.apply(fmt.Sprintf("{apiVersion: v1, kind: ServiceAccount, metadata: {namespace: %s, name: worker}}", s.name) +
		s.boundYAML("app", "fed", federatedSpec(app)) + s.boundYAML("managed", "fed", federatedSpec(managed)) +
		asAccount("worker", s.podYAML("p", "fed", "node1", "pause")+s.podYAML("sister", "fed", "node1", "pause")))
	s.waitForPods()
	must(t, fakeAzure.ResetLog(t.Context()))
	for _, id := range []azure.Identity{app, managed} {
		a := s.ask("p", vault, "client_id="+id.ClientID)
		s.mustHaveTokenOf(a, id, vault)
		if again := s.ask("sister", vault, "client_id="+id.ClientID); again.token() != a.token() {
			t.Errorf("a pod with the same ServiceAccount got status %d and a different token: %s", again.status, again.raw)
		}
	}
	entries, err := fakeAzure.Log(t.Context(), 0)
	must(t, err)
	tokens := 0
	for _, e := range entries {
		if e.Service == "imds" && e.Class == "token" {
			t.Errorf("IMDS received a token request: %+v", e)
		}
		if e.Service == "entra" && e.Class == "token" {
			tokens++
			if e.Credential != azure.CredentialFederated || e.Subject != "system:serviceaccount:"+s.name+":worker" {
				t.Errorf("Entra ID received %+v", e)
			}
		}
	}
	if tokens != 2 {
		t.Errorf("two tokens caused %d requests to Entra ID", tokens)
	}
}

// asAccount returns yaml with name as the ServiceAccount of each pod.
func asAccount(name, yaml string) string {
	return strings.ReplaceAll(yaml, "\nspec:\n  nodeSelector:", "\nspec:\n  serviceAccountName: "+name+"\n  nodeSelector:")
}

func TestTokensOfAuxiliaryTenantsAreAnArray(t *testing.T) {
	s := newNamespace(t)
	tenants := []string{cluster.TenantID, "a0000000-0000-4000-8000-00000000000a", "a0000000-0000-4000-8000-00000000000b"}
	id := newApp(t, func(a *azure.App) { a.Tenants = tenants; withSecret("many")(a) })
	partly := newApp(t, withSecret("one")) // registered in the first tenant only
	s.apply(s.secretYAML("many", map[string][]byte{"clientSecret": []byte("many")}) + s.secretYAML("one", map[string][]byte{"clientSecret": []byte("one")}) +
		s.boundYAML("many", "app", bySecretSpec(1, id, "many", fmt.Sprintf("auxiliaryTenantIDs: [%s, %s]", tenants[1], strings.ToUpper(tenants[2])))) +
		s.boundYAML("partly", "app", bySecretSpec(1, partly, "one", fmt.Sprintf("auxiliaryTenantIDs: [%s]", tenants[1]))))
	s.pod("p", "app", "node1")
	must(t, fakeAzure.ResetLog(t.Context()))
	for range 2 { // the second time, NMI answers from its cache
		a := s.ask("p", vault, "client_id="+id.ClientID)
		var all []map[string]string
		if err := json.Unmarshal([]byte(a.raw), &all); a.status != 200 || err != nil || len(all) != len(tenants) {
			t.Fatalf("%d %s (%v)", a.status, a.raw, err)
		}
		for i, one := range all {
			in := id
			in.TenantID = tenants[i]
			text, _ := json.Marshal(one)
			claims, err := fakeAzure.Verify(one["access_token"])
			must(t, err)
			if in.TenantID = claims.TenantID; !strings.EqualFold(in.TenantID, tenants[i]) {
				t.Errorf("token %d is from tenant %s, want %s", i, claims.TenantID, tenants[i])
			}
			s.mustHaveTokenOf(answer{status: 200, body: one, raw: string(text)}, in, vault)
		}
	}
	if stats, err := fakeAzure.Stats(t.Context()); err != nil || stats.Entra.Token.Requests != 3 {
		t.Errorf("three tenants caused %d requests to Entra ID (%v)", stats.Entra.Token.Requests, err)
	}
	refused := s.ask("p", vault, "client_id="+partly.ClientID)
	s.mustBeRefused(refused, 403, "upstream_refused")
	if !strings.Contains(refused.body["error_description"], "AADSTS") {
		t.Errorf("the error of the tenant that refuses is missing: %s", refused.raw)
	}
	eventually(t, 20*time.Second, func() error {
		lines := s.lines("node1")
		if len(lines) == 0 {
			return errors.New("NMI's log has no line about a pod of the namespace")
		}
		line := lines[len(lines)-1]
		if line.Reason != "upstream_refused" || line.CorrelationID == "" || !strings.Contains(refused.raw, line.CorrelationID) {
			return fmt.Errorf("the last line of NMI's log is %s; want upstream_refused with the correlation ID of the answer", line.raw)
		}
		if line.TokenID != "" {
			t.Fatalf("the audit log names a token that no client received: %s", line.raw)
		}
		return nil
	})
}

func TestAnIdentityCanNameItsOwnAuthority(t *testing.T) {
	independent(t)
	s := newNamespace(t)
	endpoints := []string{"https://login.microsoftonline.com", "https://LOGIN.microsoftonline.com:443/", "https://10.10.0.254/"}
	shared := newCertificate(t, rsaKey(t), nil)
	apps := make([]azure.Identity, len(endpoints))
	yaml := s.secretYAML("both", map[string][]byte{"certificate": slices.Concat(shared.key, shared.cert)}) + s.podYAML("p", "app", "node2", "pause")
	for i, endpoint := range endpoints {
		apps[i] = newApp(t, func(a *azure.App) { a.Certificates = []string{string(shared.cert)} })
		yaml += s.boundYAML(fmt.Sprintf("e%d", i), "app", bySecretSpec(2, apps[i], "both", fmt.Sprintf("adEndpoint: %q", endpoint)))
	}
	s.apply(yaml)
	s.waitForPods()
	for i, id := range apps {
		a := s.ask("p", vault, "client_id="+id.ClientID)
		if a.status != 200 {
			t.Errorf("%s: %d %s", endpoints[i], a.status, a.raw)
			continue
		}
		s.mustHaveTokenOf(a, id, vault)
	}
}

func TestAPodCanUseIdentitiesOfAllTypes(t *testing.T) {
	independent(t)
	s, managed := newNamespace(t), newIdentity(t)
	cert := newCertificate(t, rsaKey(t), nil)
	bySecret, byCertificate := newApp(t, withSecret("hush")), newApp(t, func(a *azure.App) { a.Certificates = []string{string(cert.cert)} })
	federated := newApp(t, func(*azure.App) {})
	trust(t, federated, s.name, "default")
	s.bind("managed", "all", managed)
	s.apply(s.secretYAML("secret", map[string][]byte{"clientSecret": []byte("hush")}) +
		s.secretYAML("certificate", map[string][]byte{"certificate": slices.Concat(cert.cert, cert.key)}) +
		s.boundYAML("secret", "all", bySecretSpec(1, bySecret, "secret")) +
		s.boundYAML("certificate", "all", bySecretSpec(2, byCertificate, "certificate")) +
		s.boundYAML("federated", "all", federatedSpec(federated)) +
		s.podYAML("by-object", "all", "node1", "pause") + s.podYAML("by-client", "all", "node2", "pause"))
	s.waitForPods()
	s.mustBeRefused(s.ask("by-client", vault), 400, "multiple_identities")
	for _, id := range []azure.Identity{managed, bySecret, byCertificate, federated} {
		// On node1, no pod selects these identities by client ID, so NMI has no token that names their object IDs. NMI
		// must fetch tokens itself.
		s.mustHaveTokenOf(s.ask("by-object", vault, "object_id="+strings.ToUpper(id.ObjectID)), id, vault)
		s.mustHaveTokenOf(s.ask("by-client", vault, "client_id="+strings.ToUpper(id.ClientID)), id, vault)
	}
	s.mustBeRefused(s.ask("by-object", vault, "object_id=0b1ec700-0000-4000-8000-ffffffffffff"), 400, "identity_not_bound")
}
