package e2e

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// marker is the beginning of every secret text in the tests of invalid identities. Its length is a multiple of three,
// so that the base64 form of such a text begins with the base64 form of marker.
const marker = "hush0hush1hush2hush3hush"

// invalidIdentity is an AzureIdentity that cannot work, and the expected refusal.
type invalidIdentity struct {
	name   string // of pod, label, AzureIdentity and Secret
	spec   string
	data   map[string][]byte // of the Secret; nil: there is none
	status int
	reason string
	want   []string // texts that error_description or detail must contain
}

func invalidIdentities(t *testing.T, s *testNamespace) []invalidIdentity {
	t.Helper()
	good, other := newCertificate(t, rsaKey(t), nil), newCertificate(t, rsaKey(t), nil)
	expired := expiredCertificate(t, rsaKey(t))
	app := newApp(t, func(a *azure.App) {
		a.Secrets = []azure.AppSecret{{Value: marker + "-right"}, {Value: marker + "-old", Expires: time.Now().Add(-time.Hour)}}
		a.Certificates = []string{string(good.cert)}
	})
	unknown, elsewhere := app, app
	unknown.ClientID, elsewhere.TenantID = "a9900000-0000-4000-8000-ffffffffffff", "a0000000-0000-4000-8000-ffffffffffff"
	right := map[string][]byte{"clientSecret": []byte(marker + "-right")}
	secret := func(name string, further ...string) string { return bySecretSpec(1, app, name, further...) }
	named := func(name string) string { return "Secret " + s.name + "/" + name }
	identity := func(name string) string { return s.name + "/" + name }
	all := []invalidIdentity{
		{"wrong-secret", secret("wrong-secret"), map[string][]byte{"clientSecret": []byte(marker + "-wrong")}, 403, "upstream_refused",
			[]string{"AADSTS7000215", "Correlation ID: ", named("wrong-secret")}},
		{"old-secret", secret("old-secret"), map[string][]byte{"only": []byte(marker + "-old")}, 403, "upstream_refused", []string{"AADSTS7000222", named("old-secret")}},
		{"unknown-app", bySecretSpec(1, unknown, "unknown-app"), right, 403, "upstream_refused", []string{"AADSTS700016", identity("unknown-app"), "clientID"}},
		{"unknown-tenant", bySecretSpec(1, elsewhere, "unknown-tenant"), right, 403, "upstream_refused", []string{"AADSTS90002", identity("unknown-tenant"), "tenantID"}},
		{"other-namespace", strings.Replace(secret("x"), "{name: x}", "{name: x, namespace: kube-system}", 1), nil, 403, "secret_not_allowed", []string{"kube-system/x", identity("other-namespace")}},
		{"nobody-there", secret("nobody-there", `adEndpoint: "https://10.10.0.254:444/"`), right, 503, "upstream_unavailable", nil},
		{"node-itself", secret("node-itself", `adEndpoint: "https://169.254.169.254/"`), right, 403, "upstream_refused", []string{"169.254.169.254", "adEndpoint"}},
		{"node-loopback", secret("node-loopback", `adEndpoint: "https://localhost:2579/"`), right, 403, "upstream_refused", []string{"adEndpoint"}},
	}
	invalid := func(name, reason string, kind int, data map[string][]byte, further ...string) {
		want := named(name)
		if reason == "identity_invalid" {
			want = identity(name)
		}
		all = append(all, invalidIdentity{name, bySecretSpec(kind, app, name, further...), data, 403, reason, []string{want}})
	}
	invalid("no-secret", "secret_missing", 1, nil)
	invalid("empty", "secret_invalid", 1, map[string][]byte{})
	invalid("two-keys", "secret_invalid", 1, map[string][]byte{"first": []byte(marker), "second": []byte(marker)})
	invalid("empty-value", "secret_invalid", 1, map[string][]byte{"clientSecret": {}})
	invalid("no-certificate", "secret_invalid", 2, map[string][]byte{"password": []byte(marker)})
	invalid("garbage", "secret_invalid", 2, map[string][]byte{"certificate": []byte(marker + "\x00\xff")})
	invalid("wrong-password", "secret_invalid", 2, map[string][]byte{"certificate": good.pfx(t, marker+"-right"), "password": []byte(marker + "-wrong")})
	invalid("no-password", "secret_invalid", 2, map[string][]byte{"certificate": good.pfx(t, marker+"-right")})
	invalid("no-key", "secret_invalid", 2, map[string][]byte{"certificate": good.cert})
	invalid("no-key-pfx", "secret_invalid", 2, map[string][]byte{"certificate": good.pfx(t, marker, "-nokeys"), "password": []byte(marker)})
	invalid("key-alone", "secret_invalid", 2, map[string][]byte{"certificate": good.key})
	invalid("foreign-key", "secret_invalid", 2, map[string][]byte{"certificate": slices.Concat(good.cert, other.key)})
	invalid("foreign-certificate", "upstream_refused", 2, map[string][]byte{"certificate": slices.Concat(other.cert, other.key)})
	invalid("expired", "secret_invalid", 2, map[string][]byte{"certificate": slices.Concat(expired.cert, expired.key)})
	invalid("tenant-common", "identity_invalid", 1, right, "tenantID: common")
	invalid("tenant-path", "identity_invalid", 1, right, "tenantID: ../x")
	invalid("auxiliary", "identity_invalid", 1, right, `auxiliaryTenantIDs: ["a b"]`)
	invalid("plain-http", "identity_invalid", 1, right, `adEndpoint: "http://login.microsoftonline.com/"`)
	invalid("endpoint-path", "identity_invalid", 1, right, `adEndpoint: "https://login.microsoftonline.com/common"`)
	for i, m := range all {
		if strings.Count(m.spec, "tenantID:") == 2 { // keep only the tenantID of the test case
			all[i].spec = strings.Replace(m.spec, fmt.Sprintf("tenantID: %q, ", app.TenantID), "", 1)
		}
	}
	return all
}

// The answer, the log and an Event report the same reason. Other pods are not affected.
func TestAnInvalidIdentityIsReportedEverywhereAndAffectsNoOtherPod(t *testing.T) {
	s := newNamespace(t)
	all := invalidIdentities(t, s)
	fine := newApp(t, withSecret(marker+"-fine"))
	yaml := s.secretYAML("fine", map[string][]byte{"clientSecret": []byte(marker + "-fine")}) +
		s.boundYAML("fine", "fine", bySecretSpec(1, fine, "fine")) + s.podYAML("fine", "fine", "node1", "pause")
	for _, m := range all {
		yaml += s.boundYAML(m.name, m.name, m.spec) + s.podYAML(m.name, m.name, "node1", "pause")
		if m.data != nil {
			yaml += s.secretYAML(m.name, m.data)
		}
	}
	s.apply(yaml)
	s.waitForPods()
	s.mustHaveTokenOf(s.ask("fine", vault), fine, vault)
	restartsBefore := restarts(t, "node1")
	l := s.startLoad("fine", 1, 10*time.Millisecond)
	answers := map[string]answer{}
	for _, m := range all {
		a := s.ask(m.name, vault)
		answers[m.name] = a
		if a.status != m.status || a.reason() != m.reason || a.token() != "" || a.body["error"] == "" || a.body["error_description"] == "" {
			t.Errorf("%s: got %d %s; want %d and reason %s", m.name, a.status, a.raw, m.status, m.reason)
		}
		for _, want := range m.want {
			if !strings.Contains(a.body["error_description"]+"\n"+a.body["detail"], want) {
				t.Errorf("%s: %q is not in the answer %s", m.name, want, a.raw)
			}
		}
		if again := strings.Contains(a.headers, "Retry-After: "); again != (m.status == 503) {
			t.Errorf("%s: want the header Retry-After with status 503 and with no other; the headers are %s", m.name, a.headers)
		}
	}
	for range 3 {
		s.ask("wrong-secret", vault) // must not create another event
	}
	s.mustBeRefused(s.ask("fine", "https://nothing.invalid"), 400, "upstream_refused")
	l.stop()
	if tokens := l.statuses[200]; len(l.statuses) != 1 || tokens == 0 {
		t.Errorf("the invalid identities affected another pod of the node: %s", l)
	}
	if now := restarts(t, "node1"); now != restartsBefore {
		t.Errorf("NMI was restarted; its pod and its restart count were %s and are %s", restartsBefore, now)
	}
	s.checkLogAndEvents(all)
	s.checkNoSecretLeaks("node1", answers)
}

func (s *testNamespace) checkLogAndEvents(all []invalidIdentity) {
	s.t.Helper()
	eventually(s.t, 60*time.Second, func() error {
		logged := map[string][]logLine{}
		for _, line := range s.lines("node1") {
			if line.Pod != "fine" {
				logged[line.Pod] = append(logged[line.Pod], line)
			}
		}
		events := s.refusalEvents()
		for _, m := range all {
			if len(logged[m.name]) == 0 {
				return fmt.Errorf("the log has no line about pod %s", m.name)
			}
			if line := logged[m.name][0]; line.Reason != m.reason || line.Status != m.status {
				return fmt.Errorf("the first line of the log about pod %s has a wrong reason or status: %s", m.name, line.raw)
			}
			if e := events[m.name]; len(e) == 0 {
				// NMI writes a burst of 20 events and then at most one event a second. If it skips an event, it
				// writes the event at the next refusal of the same kind.
				s.ask(m.name, vault)
				return fmt.Errorf("there is no event about pod %s", m.name)
			} else if len(e) > 1 || !strings.Contains(e[0].Message, m.reason) {
				return fmt.Errorf("the Events of pod %s are %+v; want one that names the reason", m.name, e)
			}
		}
		return nil
	})
}

// checkNoSecretLeaks searches everything that NMI writes for the contents of the Secrets, as text and as base64, for
// PEM data, and for tokens.
func (s *testNamespace) checkNoSecretLeaks(node string, answers map[string]answer) {
	s.t.Helper()
	outputs := map[string]string{}
	for name, a := range answers {
		outputs["the answer to "+name] = a.headers + a.raw
	}
	var err error
	outputs["NMI's log"], err = testCluster.Kubectl(s.t.Context(), "logs", "-n", cluster.ChartNamespace, nmiPod(s.t, node))
	must(s.t, err)
	outputs["the metrics"], err = testCluster.InNode(s.t.Context(), node, "curl", "-sf", "--max-time", "15", "http://127.0.0.1:9090/metrics")
	must(s.t, err)
	outputs["the events"], err = testCluster.Kubectl(s.t.Context(), "get", "events", "-A", "-o", "yaml")
	must(s.t, err)
	outputs["the identities"], err = testCluster.Kubectl(s.t.Context(), "get", "azureidentities,azureidentitybindings,pods", "-n", s.name, "-o", "yaml")
	must(s.t, err)
	for output, text := range outputs {
		for _, mark := range []string{marker, base64.StdEncoding.EncodeToString([]byte(marker)), "BEGIN", "eyJ"} {
			if i := strings.Index(text, mark); i >= 0 {
				s.t.Errorf("%s contains %q: …%s…", output, mark, text[max(0, i-200):min(len(text), i+100)])
			}
		}
	}
}

// restarts returns the name of the NMI pod on the node and its restart count.
func restarts(t *testing.T, node string) string {
	t.Helper()
	pod := nmiPodOn(t, node)
	return fmt.Sprint(pod.Name, " ", pod.Status.ContainerStatuses[0].RestartCount)
}
