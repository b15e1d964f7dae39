package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

func TestUnmodifiedClientsBehaveAsWithTheRealIMDS(t *testing.T) {
	l := newClientRunner(t)
	who := testIdentities{newIdentity(t), newIdentity(t), newIdentity(t), newApp(t, func(*azure.App) {})}
	l.bind("alone", "alone", who.alone)
	l.bind("first", "two", newIdentity(t))
	l.bind("second", "two", who.second)
	l.apply(l.boundYAML("app", "federated", federatedSpec(who.app)))
	l.startPod("alone", "alone", "node1")
	l.startPod("two", "two", "node2")
	l.startPod("nothing", "nothing", "node1")
	l.startPod("federated", "federated", "node2")
	l.runAll(append(l.immediateScenarios(who), l.delayedScenarios(who)...))
}

// testIdentities are the identities of the scenarios. alone is the only identity of pod "alone", second is one of the
// two identities of pod "two", and unbound is bound to no pod. Clients that select no identity run in pod "alone", or
// in pod "nothing", which has no identity. Clients that select an identity run in pod "two" and select second or
// unbound. app is federated, and is the only identity of pod "federated". In the scenario of app, all clients run in
// that pod.
type testIdentities struct{ alone, second, unbound, app azure.Identity }

func (s testIdentities) bound(c client, resource string) tokenQuery {
	if c.names == "" {
		return tokenQuery{"alone", s.alone, resource, false, 40 * time.Second}
	}
	return tokenQuery{"two", s.second, resource, false, 40 * time.Second}
}

func (s testIdentities) notBound(c client, chain bool) tokenQuery {
	if c.names == "" {
		return tokenQuery{"nothing", s.unbound, vault, chain, 40 * time.Second}
	}
	return tokenQuery{"two", s.unbound, vault, chain, 40 * time.Second}
}

// immediateScenarios returns the scenarios in which no client retries.
func (l *clientRunner) immediateScenarios(who testIdentities) []scenario {
	fast := func(c client, r clientResult) string {
		if r.took > 6*time.Second || len(r.statuses) != c.probes+1 {
			return "want the result of the first request, without a wait"
		}
		return ""
	}
	saying := func(words string) func(client, clientResult) string {
		return func(c client, r clientResult) string {
			if problem := fast(c, r); problem != "" || strings.Contains(r.text, words) {
				return problem
			}
			return fmt.Sprintf("want %q in the error", words)
		}
	}
	return []scenario{{
		name: "bound", concurrency: cores(), check: fast,
		ask: func(c client) (tokenQuery, string, bool) { return who.bound(c, vault), gotToken, true },
	}, {
		name: "not bound", concurrency: cores(), check: fast,
		ask: func(c client) (tokenQuery, string, bool) { return who.notBound(c, false), c.refused, true },
	}, {
		name: "not bound, in a chain", concurrency: cores(),
		ask: func(c client) (tokenQuery, string, bool) {
			return who.notBound(c, true), c.chained, c.chained != notApplicable
		},
		check: func(c client, r clientResult) string {
			if c.chained == aggregate { // this client is a chain: its error must list a later credential, the Azure CLI
				return saying("Azure CLI could not be found")(c, r)
			}
			return fast(c, r)
		},
	}, {
		name: "unknown resource", concurrency: cores(), check: saying("AADSTS500011"),
		ask: func(c client) (tokenQuery, string, bool) {
			return who.bound(c, "https://unknown.invalid"), c.refused, true
		},
	}}
}

// delayedScenarios returns the scenarios in which clients wait or retry.
func (l *clientRunner) delayedScenarios(who testIdentities) []scenario {
	return []scenario{{
		name: "throttled for a while", switches: map[string]string{"imds.throttle": "-1", "imds.retry-after": "4"},
		ask:    func(c client) (tokenQuery, string, bool) { return who.bound(c, "https://busy.example"), gotToken, true },
		during: func(logs []*clientLog) { l.waitUntilThrottled(logs); setFaults(l.t, nil) },
	}, {
		name: "throttled permanently", switches: map[string]string{"imds.throttle": "-1", "imds.retry-after": "1"},
		ask: func(c client) (tokenQuery, string, bool) {
			q := who.bound(c, "https://busier.example")
			q.timeout = 12 * time.Second
			return q, c.throttled, true
		},
	}, {
		name: "federated credential comes late",
		// Clients that select an identity by resource ID or object ID take no part: a federated identity has no
		// resource ID, and NMI learns its object ID only from a token, which Entra ID still refuses.
		ask: func(c client) (tokenQuery, string, bool) {
			return tokenQuery{"federated", who.app, vault, false, 40 * time.Second}, gotToken, c.names == "" || c.names == "client-id" || c.names == "env"
		},
		during: func(logs []*clientLog) {
			l.waitUntilEntraRefuses(logs, who.app)
			trust(l.t, who.app, l.name, "default")
		},
		check: func(c client, r clientResult) string {
			if len(r.statuses) != c.probes+1 {
				return "want the first request to wait until the credential exists"
			}
			return ""
		},
	}}
}

// runAll runs the scenarios in order and logs the matrix.
func (l *clientRunner) runAll(all []scenario) {
	l.t.Helper()
	var columns []string
	cells := map[string]map[client]string{}
	for _, e := range all {
		start := time.Now()
		columns = append(columns, e.name)
		cells[e.name] = l.runScenario(e)
		l.t.Logf("%s: all clients took %.1f s", e.name, time.Since(start).Seconds())
	}
	printTable(l.t, columns, cells)
}

// waitUntilEntraRefuses waits until all clients wait for a response and Entra ID has refused two requests of NMI.
func (l *clientRunner) waitUntilEntraRefuses(logs []*clientLog, app azure.Identity) {
	l.t.Helper()
	eventually(l.t, 60*time.Second, func() error {
		for _, d := range logs {
			if !d.isWaiting() {
				return fmt.Errorf("%+v does not wait for a response: %s", d.client, d)
			}
		}
		entries, err := fakeAzure.Log(l.t.Context(), 0)
		if err != nil {
			return err
		}
		refusals := 0
		for _, e := range entries {
			if e.ClientID == app.ClientID && e.Status == 401 {
				refusals++
			}
		}
		if refusals < 2 {
			return fmt.Errorf("Entra ID has refused %d requests; want two", refusals)
		}
		return nil
	})
}

// waitUntilThrottled waits until each client has received status 429.
func (l *clientRunner) waitUntilThrottled(logs []*clientLog) {
	l.t.Helper()
	eventually(l.t, 60*time.Second, func() error {
		for _, d := range logs {
			if !slices.Contains(d.statuses(), 429) {
				return fmt.Errorf("a client has received no 429 yet: %s", d)
			}
		}
		return nil
	})
}

func TestAClientInANewPodGetsItsTokenWithItsFirstRequest(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newIdentity(t)
	_, image, err := cluster.BuildClient(t.Context())
	must(t, err)
	must(t, testCluster.ImportImages(t.Context(), image))
	s.bind("app", "app", id)
	containers := map[string]struct {
		args     []string
		statuses []int // of the responses; "default" first sends a probe without the Metadata header, which gets 400
	}{
		"managed": {[]string{"managed"}, []int{200}},
		"named":   {[]string{"managed", "--client-id", id.ClientID}, []int{200}},
		"default": {[]string{"default"}, []int{400, 200}},
		"adal":    {[]string{"adal"}, []int{200}},
	}
	yaml := fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {namespace: %s, name: fresh, labels: {aadpodidbinding: app}}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  restartPolicy: Never
  containers:
`, s.name)
	for name, container := range containers {
		text, _ := json.Marshal(container.args)
		yaml += fmt.Sprintf("  - {name: %s, image: %q, imagePullPolicy: Never, args: %s}\n", name, image.Ref(), text)
	}
	s.apply(yaml)
	for name, container := range containers {
		var got clientOutput
		eventually(t, 60*time.Second, func() error {
			out, err := podOutput(t.Context(), s.name, "fresh", corev1.PodLogOptions{Container: name})
			if err != nil {
				return err
			}
			for line := range strings.Lines(out) {
				if strings.HasPrefix(line, "{") {
					return json.Unmarshal([]byte(line), &got)
				}
			}
			return fmt.Errorf("container %s has written no result yet: %s", name, out)
		})
		outcome, text := evaluate(got, clientResult{took: time.Duration(got.DurationMS) * time.Millisecond}, tokenQuery{identity: id, resource: vault})
		if outcome != gotToken || !slices.Equal(got.Statuses, container.statuses) {
			t.Errorf("container %s: %s, statuses %v, after %.0f ms: %s; want a token and statuses %v", name, outcome, got.Statuses, got.DurationMS, text, container.statuses)
		}
		t.Logf("container %s: got its token after %.0f ms", name, got.DurationMS)
	}
}
