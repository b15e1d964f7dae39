package e2e

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/podidentity/podidentity/e2e/azure"
)

// hostClient requests tokens for pods from NMI in a node's network namespace, like a process of the node.
type hostClient struct{ s *testNamespace }

func (h hostClient) token(node, query string, headers ...string) answer {
	s := h.s
	s.t.Helper()
	args := []string{"-s", "--max-time", "30", "-D", "/dev/stderr", "-w", "\n%{http_code}"}
	for _, h := range headers {
		args = append(args, "-H", h)
	}
	cmd, err := testCluster.InNodeCommand(s.t.Context(), node, "curl", append(args, "http://127.0.0.1:2579/host/token"+query)...)
	must(s.t, err)
	var out, header strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &header
	_ = cmd.Run() // without a response, the output has the status 000
	text, code, _ := cutLast(out.String(), "\n")
	a := answer{raw: text, body: map[string]string{}, headers: header.String()}
	_, _ = fmt.Sscan(code, &a.status)
	_ = json.Unmarshal([]byte(text), &a.body)
	return a
}

// headersFor returns the request headers that name a pod of the namespace.
func (h hostClient) headersFor(pod string) []string {
	return []string{"podns: " + h.s.name, "podname: " + pod}
}

// mustHaveTokenOf checks the token and the format that clients of AAD Pod Identity expect.
func (h hostClient) mustHaveTokenOf(a answer, id azure.Identity, resource string) {
	s := h.s
	s.t.Helper()
	var body struct {
		Token    map[string]string // all values must be strings
		ClientID string            `json:"clientid"`
	}
	if err := json.Unmarshal([]byte(a.raw), &body); a.status != 200 || err != nil {
		s.t.Fatalf("status %d (%v): %s", a.status, err, a.raw)
	}
	claims, err := fakeAzure.Verify(body.Token["access_token"])
	must(s.t, err)
	if claims.AppID != id.ClientID || claims.ObjectID != id.ObjectID || claims.Audience != resource || claims.TenantID != id.TenantID || body.ClientID != id.ClientID {
		s.t.Errorf("the token has the claims %+v, clientid is %s; want %+v and %s", claims, body.ClientID, id, resource)
	}
	for _, field := range []string{"access_token", "refresh_token", "expires_in", "expires_on", "not_before", "resource", "token_type"} {
		if value, has := body.Token[field]; !has || value == "" && field != "refresh_token" {
			s.t.Errorf("%s is %q in %s", field, value, a.raw)
		}
	}
	if body.Token["resource"] != resource || body.Token["token_type"] != "Bearer" || len(body.Token) != 7 {
		s.t.Errorf("the token is %s", a.raw)
	}
}

func TestAProcessOfTheNodeGetsTokensForThePodsOfTheNode(t *testing.T) {
	s, managed := newNamespace(t), newIdentity(t)
	host := hostClient{s}
	bySecret, federated := newApp(t, withSecret("hush")), newApp(t, func(*azure.App) {})
	trust(t, federated, s.name, "default")
	s.bind("managed", "managed", managed)
	s.apply(s.secretYAML("secret", map[string][]byte{"clientSecret": []byte("hush")}) +
		s.boundYAML("secret", "secret", bySecretSpec(1, bySecret, "secret")) +
		s.boundYAML("federated", "federated", federatedSpec(federated)) +
		s.podYAML("managed", "managed", "node1", "pause") + s.podYAML("secret", "secret", "node1", "pause") +
		s.podYAML("federated", "federated", "node1", "pause") + s.podYAML("unbound", "none", "node1", "pause"))
	s.waitForPods()
	must(t, fakeAzure.ResetLog(t.Context()))
	query := "?resource=" + url.QueryEscape(vault)
	for pod, id := range map[string]azure.Identity{"managed": managed, "secret": bySecret, "federated": federated} {
		a := host.token("node1", query, host.headersFor(pod)...)
		host.mustHaveTokenOf(a, id, vault)
		if !strings.Contains(a.raw, s.ask(pod, vault).token()) {
			t.Errorf("NMI gave a process of the node another token for pod %s than the pod itself gets", pod)
		}
	}
	s.mustBeRefused(host.token("node1", query, host.headersFor("unbound")...), 400, "no_matching_binding")

	ns, name := "podns: "+s.name, "podname: managed"
	elsewhere := make(chan answer, 1)
	go func() { elsewhere <- host.token("node2", query, ns, name) }()
	for what, got := range map[string]answer{
		"no headers":        host.token("node1", query),
		"no namespace":      host.token("node1", query, name),
		"no name":           host.token("node1", query, ns),
		"an empty name":     host.token("node1", query, ns, "podname;"),
		"two names":         host.token("node1", query, ns, name, "podname: secret"),
		"no resource":       host.token("node1", "", ns, name),
		"forwarded":         host.token("node1", query, ns, name, "X-Forwarded-For: 10.10.0.11"),
		"another namespace": host.token("node1", query, "podns: default", name), // slow: NMI waits, because the pod may be new
		"another node":      <-elsewhere,
	} {
		if strings.Contains(got.raw, "eyJ") || got.status < 400 || got.reason() == "" {
			t.Errorf("case %s: got %d %s; want a refusal with a reason", what, got.status, got.raw)
		}
		if strings.HasPrefix(what, "no ") && got.status != 400 {
			t.Errorf("case %s: got %d %s; want 400", what, got.status, got.raw)
		}
		t.Logf("%s: %d %s %s", what, got.status, got.reason(), got.body["error_description"])
	}
	checkNoPodReachedIMDS(t)
}

func TestPodsCannotUseTheEndpointForProcessesOfTheNode(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.apply(s.podYAML("p", "app", "node1", "pause") + s.podYAML("attacker", "none", "node1", "pause"))
	s.waitForPods()
	node, err := testCluster.Kubectl(t.Context(), "get", "node", "node1", "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)
	must(t, err)
	query := "/host/token?api-version=2018-02-01&resource=" + url.QueryEscape(vault)
	headers := []string{"-H", "Metadata: true", "-H", "podns: " + s.name, "-H", "podname: p"}
	for _, pod := range []string{"p", "attacker"} {
		if a := s.curl(pod, append(headers, "http://169.254.169.254"+query)...); a.status != 404 || strings.Contains(a.raw, "eyJ") {
			t.Errorf("pod %s got %d %s; want 404 and no token", pod, a.status, a.raw)
		}
	}
	// Pods also cannot use the endpoint at other addresses at which NMI might listen.
	for _, address := range []string{"127.0.0.1:2579", node + ":2579", "169.254.25.79:2579", "169.254.25.79:80", "10.244.1.1:2579"} {
		a := s.curl("attacker", append(headers, "--connect-timeout", "1", "http://"+address+query)...)
		if strings.Contains(a.raw, "eyJ") || a.status != 0 && a.status != 404 {
			t.Errorf("at %s the pod got %d %s", address, a.status, a.raw)
		}
	}
}
