package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
)

// These are the last tests, by the name of this file: after a minute without its API server it takes the cluster's own
// parts another one until pods start again on all nodes.

func TestPodsOfEachTypeKeepGettingTokensWhileTheAPIServerIsAway(t *testing.T) {
	s := newSpace(t)
	bySecret, federated := newApp(t, withSecret("hush")), newApp(t, func(*azure.App) {})
	trust(t, federated, s.name, "default")
	s.apply(s.secretYAML("app", map[string][]byte{"clientSecret": []byte("hush")}) + s.boundYAML("secret", "secret", bySecretSpec(1, bySecret, "app")) +
		s.boundYAML("federated", "federated", federatedSpec(federated)) + s.podYAML("secret", "secret", "node1", "pause") + s.podYAML("federated", "federated", "node1", "pause") + s.podYAML("unbound", "none", "node1", "pause"))
	s.ready()
	unbound, clients := s.client("unbound", true), map[string]*http.Client{}
	for pod, id := range map[string]azure.Identity{"secret": bySecret, "federated": federated} {
		clients[pod] = s.client(pod, true)
		s.mustHaveTokenOf(s.ask(pod, vault), id, vault)
	}
	must(t, world.StopAPIServer(t.Context()))
	for pod, client := range clients {
		for i := range 3 { // the second and third are of resources that nobody asked for yet
			if status, body := get(t.Context(), client, askVault+strings.Repeat("/", i)); status != 200 {
				t.Errorf("%s: %d %s", pod, status, body)
			}
		}
	}
	must(t, world.StartAPIServer(t.Context()))
	// The watch of a Secret that nobody needs any more is not missed.
	_, err := world.Kubectl(t.Context(), "delete", "pod", "secret", "-n", s.name, "--force", "--grace-period=0", "--wait=false")
	must(t, err)
	eventually(t, 30*time.Second, func() error {
		if status, body := get(t.Context(), unbound, askVault); status != 400 || !strings.Contains(body, "no_matching_binding") {
			return fmt.Errorf("a refusal is not final again: %d %s", status, body)
		}
		return nil
	})
}

func TestKnownPodsKeepGettingTokensWhileTheAPIServerIsAway(t *testing.T) {
	s, id := newSpace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	l := s.startLoad("p", 1, vault)
	l.good(t, 10, 20*time.Second)
	must(t, world.StopAPIServer(t.Context()))
	stopped := time.Now()
	inTime := true
	for inTime {
		l.good(t, 1, 5*time.Second)
		inTime = time.Since(stopped) < time.Minute
	}
	away := time.Since(stopped)
	must(t, world.StartAPIServer(t.Context()))
	l.end()
	t.Logf("the API server was away for %.0f s: %s", away.Seconds(), l)
	if good := l.statuses[200]; len(l.statuses) != 1 || good == 0 {
		t.Errorf("not all requests brought a token: %s", l)
	}
	// What was missed meanwhile is made up for, and within seconds: nobody is refused for good because NMI does not know
	// yet what the API server does.
	other := newIdentity(t)
	s.bind("other", "other", other)
	_, err := world.Kubectl(t.Context(), "label", "pod", "p", "-n", s.name, "--overwrite", "aadpodidbinding=other")
	must(t, err)
	back := time.Now()
	eventually(t, 20*time.Second, func() error {
		a := s.ask("p", vault)
		if a.status == 200 && a.body["client_id"] == other.ClientID {
			return nil
		}
		if a.status != 200 && a.status != 503 {
			t.Errorf("meanwhile it is refused with %d %s", a.status, a.raw)
		}
		return fmt.Errorf("got %d %s", a.status, a.raw)
	})
	t.Logf("changes are in force again %.1f s after the API server was", time.Since(back).Seconds())
	for _, node := range world.Nodes() {
		eventually(t, 20*time.Second, func() error {
			if n := metric(t, node, "podidentity_nmi_stale_watches"); n != 0 {
				return fmt.Errorf("%v watches of NMI on %s hear nothing", n, node)
			}
			return nil
		})
	}
}
