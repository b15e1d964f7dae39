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

func TestNMIKilledUnderLoadLeavesNoWayToTheMetadataService(t *testing.T) {
	s, id := newSpace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	must(t, cloud.ResetLog(t.Context()))
	l := s.startLoad("p", 4, vault)
	l.good(t, 200, 20*time.Second)
	for range 3 {
		killNMI(t, "node1")
		l.good(t, 200, 90*time.Second) // by itself; the kubelet waits longer after each crash
	}
	l.end()
	t.Logf("NMI was killed three times: %s", l)
	if l.statuses[0] == 0 {
		t.Error("no request met the gap: the load proves nothing")
	}
	nothingFromPods(t)
}

// killNMI sends SIGKILL to the process of NMI on the node.
func killNMI(t *testing.T, node string) {
	t.Helper()
	pids, err := world.PodPIDs(t.Context(), cluster.ChartNamespace, nmiPod(t, node))
	must(t, err)
	for _, pid := range pids {
		exe, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
		if filepath.Base(exe) == "nmi" {
			must(t, syscall.Kill(pid, syscall.SIGKILL))
			return
		}
	}
	t.Fatalf("no process of NMI on %s among %v", node, pids)
}

func TestRulesThatSomebodyRemovesAreRepairedAndNothingGetsThrough(t *testing.T) {
	s, id := newSpace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node2")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	must(t, cloud.ResetLog(t.Context()))
	repairs := metric(t, "node2", "podidentity_nmi_iptables_repairs_total")
	l := s.startLoad("p", 2, vault)
	for _, damage := range []string{
		"iptables-nft -t nat -F PREROUTING",
		"iptables-nft -t nat -I PREROUTING -d 169.254.169.254 -j ACCEPT", // before the jump
		"for c in $(iptables-nft -t nat -S | awk '/^-N PODIDENTITY/{print $2}'); do iptables-nft -t nat -F $c; done",
	} {
		l.good(t, 20, 20*time.Second)
		_, err := world.InNode(t.Context(), "node2", "sh", "-c", damage)
		must(t, err)
		before := repairs
		eventually(t, 25*time.Second, func() error {
			if repairs = metric(t, "node2", "podidentity_nmi_iptables_repairs_total"); repairs == before {
				return fmt.Errorf("%s: not repaired", damage)
			}
			return nil
		})
	}
	l.good(t, 20, 20*time.Second)
	l.end()
	t.Logf("%v repairs: %s", repairs, l)
	_, err := world.InNode(t.Context(), "node2", "iptables-nft", "-t", "nat", "-D", "PREROUTING", "-d", "169.254.169.254", "-j", "ACCEPT")
	must(t, err)
	nothingFromPods(t)
}

func TestWhileIMDSThrottlesPodsAreServedFromTheCache(t *testing.T) {
	s, id := newSpace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	const wait = 15 * time.Second
	fault(t, map[string]string{"imds.throttle": "-1", "imds.retry-after": fmt.Sprint(wait.Seconds())})
	s.mustHaveTokenOf(s.ask("p", vault, "bypass_cache=true"), id, vault)
	told := time.Now() // or a moment earlier: IMDS has said 429
	for range 3 {
		s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	}
	uncached := s.ask("p", "https://storage.azure.com/")
	s.mustBeRefused(uncached, 429, "upstream_throttled")
	if !strings.Contains(uncached.headers, "Retry-After: ") || uncached.body["error"] != "too_many_requests" {
		t.Errorf("the client is told %s %s", uncached.headers, uncached.raw)
	}
	stats, err := cloud.Stats(t.Context())
	must(t, err)
	asked := stats.IMDS.Token.Requests
	for range 3 {
		s.ask("p", "https://storage.azure.com/")
	}
	stats, err = cloud.Stats(t.Context())
	must(t, err)
	if took := time.Since(told); took > wait {
		t.Fatalf("the machine needed %s for eight requests, so this shows nothing", took)
	}
	if stats.IMDS.Token.Requests != asked || asked == 0 {
		t.Errorf("IMDS said to wait and was asked %d times more", stats.IMDS.Token.Requests-asked)
	}
}

func TestFaultsOfIMDSAreAnsweredSoThatClientsComeAgain(t *testing.T) {
	s, id := newSpace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node2")
	for i, switches := range []map[string]string{{"imds.status": "500"}, {"imds.status": "410"}, {"imds.drop": "true"}} {
		fault(t, switches)
		a := s.ask("p", fmt.Sprintf("https://r%d.example", i))
		s.mustBeRefused(a, 503, "upstream_unavailable")
		if !strings.Contains(a.headers, "Retry-After: ") {
			t.Errorf("%v: the client is not told when to come again: %s", switches, a.headers)
		}
	}
	fault(t, map[string]string{"imds.hang": "true"})
	s.mustBeRefused(s.ask("p", "https://hang.example"), 503, "upstream_unavailable")
	// One that passes within a moment is not seen by the client at all.
	fault(t, map[string]string{"imds.status": "500", "imds.status-count": "2"})
	s.mustHaveTokenOf(s.ask("p", "https://moment.example"), id, "https://moment.example")
}

// fault throws switches of the stand-in until the next call, or the end of the test.
func fault(t *testing.T, switches map[string]string) {
	t.Helper()
	all := map[string]string{"reset": "all"}
	for k, v := range switches {
		all[k] = v
	}
	must(t, cloud.Set(t.Context(), all))
	t.Cleanup(func() { _ = cloud.Set(context.Background(), map[string]string{"reset": "all"}) })
}
