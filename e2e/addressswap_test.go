package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	crclient "sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/podidentity/podidentity/e2e/azure"
)

var (
	swapPods = flag.Int("swap-pods", 24, "how many pods get the addresses of each other; make chaos sets it")
	swapAll  = flag.Bool("swap-all", false, "run all cases of the swap of addresses; make chaos sets it")
)

// swap has pods on node1, each with an identity of its own, that request a token when they start.
type swap struct {
	*testNamespace
	identities map[string]azure.Identity // by pod
	killed     bool                      // NMI was killed while addresses moved
}

func newSwap(t *testing.T, pods int) *swap {
	// The kubelet would end the pods of an earlier case first. While the API server is stopped it cannot finish that.
	eventually(t, 3*time.Minute, func() error { return noneTerminating(t.Context(), "node1") })
	w := &swap{testNamespace: newNamespace(t), identities: map[string]azure.Identity{}}
	yaml := ""
	for i := range pods {
		name, id := fmt.Sprintf("p%02d", i), newIdentity(t)
		w.identities[name] = id
		w.bind(name, name, id)
		yaml += w.podYAML(name, name, "node1", "token", "--resource", vault)
	}
	w.apply(yaml)
	eventually(t, w.startLimit(), func() error { return podsReady(t.Context(), w.name) })
	return w
}

// noneTerminating returns nil if no pod of the node is being deleted.
func noneTerminating(ctx context.Context, node string) error {
	var pods corev1.PodList
	if err := kube.List(ctx, &pods, crclient.MatchingFields{"spec.nodeName": node}); err != nil {
		return err
	}
	for _, pod := range pods.Items {
		if pod.DeletionTimestamp != nil {
			return fmt.Errorf("pod %s/%s is being deleted", pod.Namespace, pod.Name)
		}
	}
	return nil
}

// startLimit is how long all pods may take to start. They start one after the other.
func (w *swap) startLimit() time.Duration {
	return time.Duration(len(w.identities)) * 10 * time.Second
}

// runningContainer is a container of a pod: its ID and the address of the pod.
type runningContainer struct{ container, address string }

// runs returns the running container of each pod.
func (w *swap) runs() (map[string]runningContainer, error) {
	var pods corev1.PodList
	if err := kube.List(w.t.Context(), &pods, crclient.InNamespace(w.name)); err != nil {
		return nil, err
	}
	runs := map[string]runningContainer{}
	for _, pod := range pods.Items {
		if len(pod.Status.ContainerStatuses) == 1 && pod.Status.ContainerStatuses[0].State.Running != nil {
			runs[pod.Name] = runningContainer{pod.Status.ContainerStatuses[0].ContainerID, pod.Status.PodIP}
		}
	}
	return runs, nil
}

// swapResult is what the first requests of the pods got.
type swapResult struct {
	own, foreign, refused int
	unanswered            int // without a response: NMI did not run at that moment
	moved                 int // pods with the former address of another pod
	slowest               time.Duration
}

// swapAddresses moves the addresses between the pods, calls meanwhile, and returns what the first request of each new
// container got.
func (w *swap) swapAddresses(meanwhile func(*swap)) (result swapResult) {
	w.t.Helper()
	before, err := w.runs()
	must(w.t, err)
	must(w.t, testCluster.LoseSandboxes(w.t.Context(), "node1", w.name))
	meanwhile(w)
	var after map[string]runningContainer
	eventually(w.t, w.startLimit(), func() error {
		if after, err = w.runs(); err != nil {
			return err
		}
		for pod, old := range before {
			if now, ok := after[pod]; !ok || now.container == old.container {
				return fmt.Errorf("pod %s has not started again", pod)
			}
		}
		return nil
	})
	owners := map[string]string{}
	for pod, r := range before {
		owners[r.address] = pod
	}
	for pod := range w.identities {
		if former, ok := owners[after[pod].address]; ok && former != pod {
			result.moved++
		}
		w.addOutcome(&result, pod)
	}
	return result
}

// addOutcome adds what the first request of the pod got.
func (w *swap) addOutcome(result *swapResult, pod string) {
	w.t.Helper()
	var got outcome
	eventually(w.t, time.Minute, func() error {
		out, err := podOutput(w.t.Context(), w.name, pod, corev1.PodLogOptions{})
		if err != nil {
			return err
		}
		return json.Unmarshal([]byte(out), &got)
	})
	if got.Status == 0 {
		result.unanswered++
		w.t.Logf("%s got no response: %s", pod, got.Error)
		return
	}
	result.slowest = max(result.slowest, time.Duration(got.DurationMS*float64(time.Millisecond)))
	if got.Status != 200 {
		result.refused++
		w.t.Logf("%s was refused: %d %s", pod, got.Status, got.Body)
		return
	}
	var body struct {
		AccessToken string `json:"access_token"`
	}
	must(w.t, json.Unmarshal([]byte(got.Body), &body))
	claims, err := fakeAzure.Verify(body.AccessToken)
	must(w.t, err)
	if claims.ObjectID == w.identities[pod].ObjectID {
		result.own++
		return
	}
	result.foreign++
	w.t.Logf("%s got the token of object ID %s", pod, claims.ObjectID)
}

// mustAllHaveTokens fails unless each pod gets its own token within 2 s. The kubelet has reported the new address of each.
func (w *swap) mustAllHaveTokens() {
	w.t.Helper()
	slowest := time.Duration(0)
	for pod, id := range w.identities {
		start := time.Now()
		w.mustHaveTokenOf(w.ask(pod, vault), id, vault)
		slowest = max(slowest, time.Since(start))
	}
	w.t.Logf("after the report of the kubelet, the slowest request took %s", slowest)
	if slowest > 2*time.Second {
		w.t.Errorf("a pod got its token %s after the kubelet had reported its address; want at most 2 s", slowest)
	}
}

// withoutReports stops the API server until NMI has decided about a request of each pod, so that the kubelet cannot report the
// new addresses before.
func (w *swap) withoutReports() {
	w.t.Helper()
	const decisions = "podidentity_nmi_decisions_total"
	before := metric(w.t, "node1", decisions)
	must(w.t, testCluster.StopAPIServer(w.t.Context()))
	defer func() { must(w.t, testCluster.StartAPIServer(context.WithoutCancel(w.t.Context()))) }()
	eventually(w.t, w.startLimit(), func() error {
		if n := metric(w.t, "node1", decisions) - before; n < float64(len(w.identities)) {
			return fmt.Errorf("%.0f requests of %d pods", n, len(w.identities))
		}
		return nil
	})
}

// After a reboot the API server reports for some seconds addresses that other pods have by then.
func TestPodsThatGetTheAddressesOfOthersGetTheirOwnTokens(t *testing.T) {
	t.Cleanup(func() { must(t, testCluster.InstallChart(context.Background())) })
	none, restart := func(*swap) {}, func(w *swap) {
		w.killed = true
		killNMI(t, "node1")
	}
	few := min(12, *swapPods) // enough where the API server is stopped: then each pod with a former address of another is taken for it
	for _, c := range []struct {
		name, capture, verification string
		meanwhile                   func(*swap)
		pods                        int
		always                      bool // not only with -swap-all
	}{
		{"by cgroup", "auto", "auto", none, *swapPods, false},
		{"by cgroup, before the kubelet reports", "auto", "auto", (*swap).withoutReports, *swapPods, true},
		{"by cgroup, while NMI restarts", "auto", "auto", restart, *swapPods, false},
		{"by confirmed address", "iptables", "auto", none, *swapPods, false},
		{"by confirmed address, while NMI restarts", "iptables", "auto", restart, *swapPods, true},
		{"by address, before the kubelet reports", "iptables", "off", (*swap).withoutReports, few, true},
	} {
		if !c.always && !*swapAll {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			must(t, testCluster.InstallChart(t.Context(), "--set", "nmi.capture="+c.capture, "--set-string", "nmi.podVerification="+c.verification))
			// New pods for each case: the kubelet delays the restart of a container that has already restarted, and then the API
			// server knows the new address before the container starts.
			w := newSwap(t, c.pods)
			got := w.swapAddresses(c.meanwhile)
			t.Logf("%+v", got)
			if got.unanswered > 0 && !w.killed {
				t.Errorf("%d pods got no response while NMI ran", got.unanswered)
			}
			if got.moved < c.pods/4 {
				t.Errorf("only %d pods got the former address of another pod: this test proves nothing", got.moved)
			}
			switch {
			case c.verification == "off":
				if got.foreign == 0 {
					t.Error("no pod got the token of another: this test proves nothing")
				}
			case c.capture == "iptables":
				if got.foreign != 0 {
					t.Errorf("%d pods got the token of another pod; want none", got.foreign)
				}
				w.mustAllHaveTokens()
			case got.own+got.unanswered != c.pods:
				t.Errorf("%d pods got their own token, %d that of another pod, %d were refused; want %d, 0 and 0", got.own, got.foreign, got.refused, c.pods)
			}
		})
	}
}
