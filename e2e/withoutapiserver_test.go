package e2e

import (
	"flag"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	crclient "sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/podidentity/podidentity/e2e/azure"
)

var outage = flag.Duration("outage", 20*time.Second, "how long the API server is stopped under load; make chaos sets it")

func TestPodsWithEachTypeOfIdentityGetTokensWhileTheAPIServerIsDown(t *testing.T) {
	runLast(t)
	s := newNamespace(t)
	bySecret, federated := newApp(t, withSecret("hush")), newApp(t, func(*azure.App) {})
	trust(t, federated, s.name, "default")
	s.apply(s.secretYAML("app", map[string][]byte{"clientSecret": []byte("hush")}) + s.boundYAML("secret", "secret", bySecretSpec(1, bySecret, "app")) +
		s.boundYAML("federated", "federated", federatedSpec(federated)) + s.podYAML("secret", "secret", "node1", "pause") + s.podYAML("federated", "federated", "node1", "pause") + s.podYAML("unbound", "none", "node1", "pause"))
	s.waitForPods()
	unbound, clients := s.podClient("unbound", true), map[string]*http.Client{}
	for pod, id := range map[string]azure.Identity{"secret": bySecret, "federated": federated} {
		clients[pod] = s.podClient(pod, true)
		s.mustHaveTokenOf(s.ask(pod, vault), id, vault)
	}
	must(t, testCluster.StopAPIServer(t.Context()))
	for pod, client := range clients {
		for i := range 3 { // the tokens for the second and third resource are not cached
			if status, body := get(t.Context(), client, askVault+strings.Repeat("/", i)); status != 200 {
				t.Errorf("%s: %d %s", pod, status, body)
			}
		}
	}
	must(t, testCluster.StartAPIServer(t.Context()))
	// While a watch is stale, NMI answers 503, which clients retry, instead of a refusal, which they do not retry.
	// After this deletion, no pod needs the Secret. If the watch of the Secret still counted as stale, NMI would answer
	// 503 to pods that it should refuse.
	must(t, kube.Delete(t.Context(), getPod(t, s.name, "secret"), crclient.GracePeriodSeconds(0)))
	eventually(t, 30*time.Second, func() error {
		if status, body := get(t.Context(), unbound, askVault); status != 400 || !strings.Contains(body, "no_matching_binding") {
			return fmt.Errorf("NMI does not refuse with 400 no_matching_binding yet: it answers %d %s", status, body)
		}
		return nil
	})
}

func TestKnownPodsGetTokensWhileTheAPIServerIsDown(t *testing.T) {
	runLast(t)
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	l := s.startLoad("p", 1, 10*time.Millisecond)
	l.waitForTokens(t, 10, 20*time.Second)
	must(t, testCluster.StopAPIServer(t.Context()))
	stopped := time.Now()
	for time.Since(stopped) < *outage {
		l.waitForTokens(t, 1, 15*time.Second)
	}
	downtime := time.Since(stopped)
	must(t, testCluster.StartAPIServer(t.Context()))
	l.stop()
	t.Logf("the API server was down for %.0f s: %s", downtime.Seconds(), l)
	if tokens := l.statuses[200]; len(l.statuses) != 1 || tokens == 0 {
		t.Errorf("some requests did not get a token: %s", l)
	}
	// NMI reads the changes within seconds after the restart of the API server. Until then, pods may get tokens of their
	// old identities. If NMI refuses, the status must be 503, because NMI may not know of the latest changes.
	other := newIdentity(t)
	s.bind("other", "other", other)
	s.label("p", "other")
	restarted := time.Now()
	eventually(t, 30*time.Second, func() error {
		a := s.ask("p", vault)
		if a.status == 200 && a.body["client_id"] == other.ClientID {
			return nil
		}
		if a.status != 200 && a.status != 503 {
			t.Errorf("until NMI has caught up, it may refuse only with 503; got %d %s", a.status, a.raw)
		}
		return fmt.Errorf("got %d %s", a.status, a.raw)
	})
	t.Logf("changes are effective %.1f s after the restart of the API server", time.Since(restarted).Seconds())
	for _, node := range testCluster.Nodes() {
		eventually(t, 20*time.Second, func() error {
			if n := metric(t, node, "podidentity_nmi_stale_watches"); n != 0 {
				return fmt.Errorf("%v watches of NMI on %s are stale", n, node)
			}
			return nil
		})
	}
}
