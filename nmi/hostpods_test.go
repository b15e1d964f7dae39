package nmi

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// hostPodIn returns a pod in the host network.
func hostPodIn(ns, uid, label string, changes ...func(*corev1.Pod)) *corev1.Pod {
	p := podIn(ns, "host-"+uid, uid, "10.1.0.4", label)
	p.Spec.HostNetwork = true
	for _, change := range changes {
		change(p)
	}
	return p
}

// exemptions receives what exemptHostPods sets.
type exemptions chan []string

func (e exemptions) set(ctx context.Context, uids []string) error {
	slices.Sort(uids)
	select {
	case e <- uids:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// expect waits until exactly these pods are exempt.
func (e exemptions) expect(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	deadline := time.After(20 * time.Second)
	for {
		select {
		case got = <-e:
			if slices.Equal(got, want) {
				return
			}
		case <-deadline:
			t.Fatalf("the exempt pods are %q; want %q", got, want)
		}
	}
}

func startExempting(t *testing.T, mode string, objects ...object) (*testNode, exemptions) {
	t.Helper()
	c := newTestNode(t, func(cfg *Config) { cfg.CaptureHostNetwork, cfg.PodUID = mode, "own" }, objects...)
	e := make(exemptions)
	go c.exemptHostPods(t.Context(), e.set)
	return c, e
}

func TestUnlabelledPodsInTheHostNetworkAreExemptIfBoundOnesAreCaptured(t *testing.T) {
	finished := func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }
	static := func(p *corev1.Pod) {
		p.Annotations = map[string]string{"kubernetes.io/config.hash": "hash", "kubernetes.io/config.mirror": "hash"}
	}
	c, exempt := startExempting(t, HostNetworkBound,
		hostPodIn("a", "1", ""), hostPodIn("a", "2", "app"), hostPodIn("a", "3", "", finished), hostPodIn("a", "4", "", static), podIn("a", "p", "5", "10.0.0.1", ""))
	exempt.expect(t, "1", "hash")
	c.api.set(hostPodIn("a", "1", "app"))
	exempt.expect(t, "hash")
	c.api.set(hostPodIn("a", "2", ""))
	exempt.expect(t, "2", "hash")
	c.api.remove(hostPodIn("a", "2", ""))
	exempt.expect(t, "hash")
}

func TestOnlyExceptedPodsAndNMIAreExemptIfAllPodsInTheHostNetworkAreCaptured(t *testing.T) {
	account := func(name string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Spec.ServiceAccountName = name } }
	exception := &v1.AzurePodIdentityException{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "e"}, Spec: v1.AzurePodIdentityExceptionSpec{PodLabels: map[string]string{v1.BindingLabel: "addon"}}}
	c, exempt := startExempting(t, HostNetworkAll,
		hostPodIn("a", "1", ""), hostPodIn("a", "2", "addon"), hostPodIn("b", "3", "addon"),
		hostPodIn("system", "own", "", account("nmi")), hostPodIn("system", "old", "", account("nmi")), hostPodIn("system", "other", "", account("x")), hostPodIn("a", "4", "", account("nmi")))
	exempt.expect(t, "old", "own")
	c.api.set(exception)
	exempt.expect(t, "2", "old", "own")
	c.api.remove(exception)
	exempt.expect(t, "old", "own")
}

func TestExemptingIsRetried(t *testing.T) {
	c := newTestNode(t, func(cfg *Config) { cfg.CaptureHostNetwork, cfg.SyncInterval = HostNetworkBound, time.Millisecond }, hostPodIn("a", "1", ""))
	calls := make(chan []string)
	go c.exemptHostPods(t.Context(), func(_ context.Context, uids []string) error {
		select {
		case calls <- uids:
		case <-t.Context().Done():
		}
		return errors.New("no memory")
	})
	for range 2 {
		if uids := <-calls; !slices.Equal(uids, []string{"1"}) {
			t.Errorf("exempt pods %q; want 1", uids)
		}
	}
}
