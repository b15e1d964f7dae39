package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

func TestClientsThatNobodyHereWroteFareAsOnAMachineOfTheirOwn(t *testing.T) {
	l := newLaboratory(t)
	who := subjects{newIdentity(t), newIdentity(t), newIdentity(t), newApp(t, func(*azure.App) {})}
	l.bind("alone", "alone", who.alone)
	l.bind("first", "two", newIdentity(t))
	l.bind("second", "two", who.second)
	l.apply(l.boundYAML("app", "federated", federatedSpec(who.app)))
	l.lab("alone", "alone", "node1")
	l.lab("two", "two", "node2")
	l.lab("nothing", "nothing", "node1")
	l.lab("federated", "federated", "node2")
	l.performAll(append(l.answeredAtOnce(who), l.answeredLate(who)...))
}

// subjects are the identities that are asked for. Clients that name none ask in a pod that has one, or nothing; the
// others say which of two they want, or one that is bound elsewhere.
type subjects struct{ alone, second, unbound, app azure.Identity }

func (s subjects) bound(c client, resource string) question {
	if c.names == "" {
		return question{"alone", s.alone, resource, false, 40 * time.Second}
	}
	return question{"two", s.second, resource, false, 40 * time.Second}
}

func (s subjects) notBound(c client, chain bool) question {
	if c.names == "" {
		return question{"nothing", s.unbound, vault, chain, 40 * time.Second}
	}
	return question{"two", s.unbound, vault, chain, 40 * time.Second}
}

// answeredAtOnce are the questions that have an answer which no client asks for twice.
func (l *laboratory) answeredAtOnce(who subjects) []experiment {
	fast := func(c client, r reply) string {
		if r.took > 3*time.Second || len(r.statuses) != c.probes+1 {
			return "want it at once, and at the first try"
		}
		return ""
	}
	saying := func(words string) func(client, reply) string {
		return func(c client, r reply) string {
			if problem := fast(c, r); problem != "" || strings.Contains(r.text, words) {
				return problem
			}
			return fmt.Sprintf("want %q in the error", words)
		}
	}
	return []experiment{{
		name: "bound", atOnce: cores(), further: fast,
		ask: func(c client) (question, string, bool) { return who.bound(c, vault), gotToken, true },
	}, {
		name: "not bound", atOnce: cores(), further: fast,
		ask: func(c client) (question, string, bool) { return who.notBound(c, false), c.refused, true },
	}, {
		name: "not bound, in a chain", atOnce: cores(),
		ask: func(c client) (question, string, bool) { return who.notBound(c, true), c.chained, c.chained != noChain },
		further: func(c client, r reply) string {
			if c.chained == aggregate { // it does not go on, but is a chain itself, and that has gone on
				return saying("Azure CLI could not be found")(c, r)
			}
			return fast(c, r)
		},
	}, {
		name: "unknown resource", atOnce: cores(), further: saying("AADSTS500011"),
		ask: func(c client) (question, string, bool) {
			return who.bound(c, "https://unknown.invalid"), c.refused, true
		},
	}}
}

// answeredLate are the questions in which clients have to wait or to come again.
func (l *laboratory) answeredLate(who subjects) []experiment {
	return []experiment{{
		name: "throttled for a while", switches: map[string]string{"imds.throttle": "-1", "imds.retry-after": "4"},
		ask:    func(c client) (question, string, bool) { return who.bound(c, "https://busy.example"), gotToken, true },
		during: func(told []*diary) { l.untilThrottled(told); fault(l.t, nil) },
	}, {
		name: "throttled for good", switches: map[string]string{"imds.throttle": "-1", "imds.retry-after": "1"},
		ask: func(c client) (question, string, bool) {
			q := who.bound(c, "https://busier.example")
			q.patience = 12 * time.Second
			return q, c.throttled, true
		},
	}, {
		name: "federated credential comes late",
		// Such an identity has a client ID and nothing else to name it by.
		ask: func(c client) (question, string, bool) {
			return question{"federated", who.app, vault, false, 40 * time.Second}, gotToken, c.names == "" || c.names == "client-id" || c.names == "env"
		},
		during: func(told []*diary) { l.untilEntraRefuses(told, who.app); trust(l.t, who.app, l.name, "default") },
		further: func(c client, r reply) string {
			if len(r.statuses) != c.probes+1 {
				return "want the first request held until it is there"
			}
			return ""
		},
	}}
}

// performAll runs the experiments in their order and shows the matrix.
func (l *laboratory) performAll(all []experiment) {
	l.t.Helper()
	var columns []string
	cells := map[string]map[client]string{}
	for _, e := range all {
		start := time.Now()
		columns = append(columns, e.name)
		cells[e.name] = l.perform(e)
		l.t.Logf("%s: all clients took %.1f s", e.name, time.Since(start).Seconds())
	}
	printTable(l.t, columns, cells)
}

// untilEntraRefuses waits until all clients wait for an answer and NMI has not let itself be put off for them.
func (l *laboratory) untilEntraRefuses(told []*diary, app azure.Identity) {
	l.t.Helper()
	eventually(l.t, 30*time.Second, func() error {
		for _, d := range told {
			if !d.waits() {
				return fmt.Errorf("%+v is not waiting: %s", d.client, d)
			}
		}
		entries, err := cloud.Log(l.t.Context(), 0)
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
			return fmt.Errorf("Entra ID has refused %d tries", refusals)
		}
		return nil
	})
}

// untilThrottled waits until each client has been told to come again.
func (l *laboratory) untilThrottled(told []*diary) {
	l.t.Helper()
	eventually(l.t, 30*time.Second, func() error {
		for _, d := range told {
			if !slices.Contains(d.statuses(), 429) {
				return fmt.Errorf("a client has not met the throttling: %s", d)
			}
		}
		return nil
	})
}

func TestAClientInAFreshPodGetsItsTokenAtTheFirstTry(t *testing.T) {
	s, id := newSpace(t), newIdentity(t)
	_, image, err := cluster.BuildClient(t.Context())
	must(t, err)
	must(t, world.ImportImages(t.Context(), image))
	s.bind("app", "app", id)
	containers := map[string][]string{
		"managed": {"managed"}, "named": {"managed", "--client-id", id.ClientID}, "default": {"default"}, "adal": {"adal"},
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
	for name, args := range containers {
		text, _ := json.Marshal(args)
		yaml += fmt.Sprintf("  - {name: %s, image: %q, imagePullPolicy: Never, args: %s}\n", name, image.Ref(), text)
	}
	s.apply(yaml)
	for name := range containers {
		var got said
		eventually(t, 60*time.Second, func() error {
			out, err := world.Kubectl(t.Context(), "logs", "fresh", "-c", name, "-n", s.name)
			if err != nil {
				return err
			}
			for line := range strings.Lines(out) {
				if strings.HasPrefix(line, "{") {
					return json.Unmarshal([]byte(line), &got)
				}
			}
			return fmt.Errorf("container %s has not said anything yet: %s", name, out)
		})
		outcome, text := judge(got, reply{}, question{identity: id, resource: vault})
		if outcome != gotToken || got.DurationMS > 3000 {
			t.Errorf("container %s: %s after %.0f ms: %s", name, outcome, got.DurationMS, text)
		}
		t.Logf("container %s: its token came after %.0f ms", name, got.DurationMS)
	}
}
