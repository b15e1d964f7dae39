package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/cluster"
)

func TestNoPodReachesIMDSWhenNMIIsKilledUnderLoad(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	must(t, fakeAzure.ResetLog(t.Context()))
	l := s.startLoad("p", 4, 0)
	l.waitForTokens(t, 200, 20*time.Second)
	for range 3 {
		killNMI(t, "node1")
		l.waitForTokens(t, 200, 90*time.Second) // the kubelet restarts NMI, with a longer delay after each crash
	}
	l.stop()
	t.Logf("NMI was killed three times: %s", l)
	if l.statuses[0] == 0 {
		t.Error("no request failed while NMI was down: this test proves nothing")
	}
	checkNoPodReachedIMDS(t)
}

// killNMI sends SIGKILL to the NMI process on the node.
func killNMI(t *testing.T, node string) {
	t.Helper()
	pids, err := testCluster.PodPIDs(t.Context(), cluster.ChartNamespace, nmiPod(t, node))
	must(t, err)
	for _, pid := range pids {
		exe, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
		if filepath.Base(exe) == "nmi" {
			must(t, syscall.Kill(pid, syscall.SIGKILL))
			return
		}
	}
	t.Fatalf("none of the processes %v on %s is NMI", pids, node)
}

func TestDamagedRulesAreRepairedAndNoPodReachesIMDS(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node2")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	must(t, fakeAzure.ResetLog(t.Context()))
	repairs := metric(t, "node2", "podidentity_nmi_iptables_repairs_total")
	l := s.startLoad("p", 2, 0)
	for _, damage := range []string{
		"iptables-nft -t nat -F PREROUTING",
		"iptables-nft -t nat -I PREROUTING -d 169.254.169.254 -j ACCEPT", // in front of the jump to NMI's rules
		"for c in $(iptables-nft -t nat -S | awk '/^-N PODIDENTITY/{print $2}'); do iptables-nft -t nat -F $c; done",
	} {
		l.waitForTokens(t, 20, 20*time.Second)
		_, err := testCluster.InNode(t.Context(), "node2", "sh", "-c", damage)
		must(t, err)
		before := repairs
		eventually(t, 40*time.Second, func() error {
			if repairs = metric(t, "node2", "podidentity_nmi_iptables_repairs_total"); repairs == before {
				return fmt.Errorf("NMI has not repaired its rules after this damage: %s", damage)
			}
			return nil
		})
	}
	l.waitForTokens(t, 20, 20*time.Second)
	l.stop()
	t.Logf("%v repairs: %s", repairs, l)
	_, err := testCluster.InNode(t.Context(), "node2", "iptables-nft", "-t", "nat", "-D", "PREROUTING", "-d", "169.254.169.254", "-j", "ACCEPT")
	must(t, err)
	checkNoPodReachedIMDS(t)
}

func TestWhileIMDSThrottlesPodsAreServedFromTheCache(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	const wait = 15 * time.Second
	setFaults(t, map[string]string{"imds.throttle": "-1", "imds.retry-after": fmt.Sprint(wait.Seconds())})
	s.mustHaveTokenOf(s.ask("p", vault, "bypass_cache=true"), id, vault)
	throttled := time.Now() // IMDS has answered 429 before this time
	for range 3 {
		s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	}
	uncached := s.ask("p", "https://storage.azure.com/")
	s.mustBeRefused(uncached, 429, "upstream_throttled")
	if !strings.Contains(uncached.headers, "Retry-After: ") || uncached.body["error"] != "too_many_requests" {
		t.Errorf("the client receives %s %s", uncached.headers, uncached.raw)
	}
	stats, err := fakeAzure.Stats(t.Context())
	must(t, err)
	requests := stats.IMDS.Token.Requests
	for range 3 {
		s.ask("p", "https://storage.azure.com/")
	}
	stats, err = fakeAzure.Stats(t.Context())
	must(t, err)
	if took := time.Since(throttled); took > wait {
		t.Fatalf("the requests took %s, longer than IMDS asked to wait: this test proves nothing", took)
	}
	if stats.IMDS.Token.Requests != requests || requests == 0 {
		t.Errorf("IMDS asked to wait, but received %d more token requests; want none, and at least one before the wait", stats.IMDS.Token.Requests-requests)
	}
}

func TestClientsAreToldToRetryWhenIMDSFails(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node2")
	for i, switches := range []map[string]string{{"imds.status": "500"}, {"imds.status": "410"}, {"imds.drop": "true"}} {
		setFaults(t, switches)
		a := s.ask("p", fmt.Sprintf("https://r%d.example", i))
		s.mustBeRefused(a, 503, "upstream_unavailable")
		if !strings.Contains(a.headers, "Retry-After: ") {
			t.Errorf("%v: the answer has no Retry-After: %s", switches, a.headers)
		}
	}
	setFaults(t, map[string]string{"imds.hang": "true"})
	s.mustBeRefused(s.ask("p", "https://hang.example"), 503, "upstream_unavailable")
	// NMI retries a request to IMDS, so that the client does not notice a short failure.
	setFaults(t, map[string]string{"imds.status": "500", "imds.status-count": "2"})
	s.mustHaveTokenOf(s.ask("p", "https://moment.example"), id, "https://moment.example")
}

// setFaults resets all switches of the fake Azure and then sets the given ones. They apply until the next call of
// setFaults or the end of the test.
func setFaults(t *testing.T, switches map[string]string) {
	t.Helper()
	all := map[string]string{"reset": "all"}
	for k, v := range switches {
		all[k] = v
	}
	must(t, fakeAzure.Set(t.Context(), all))
	t.Cleanup(func() { _ = fakeAzure.Set(context.Background(), map[string]string{"reset": "all"}) })
}
