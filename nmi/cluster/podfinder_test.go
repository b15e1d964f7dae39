package cluster

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/nmi/nmitest"
)

// testFinder is a PodFinder for an index that the test fills.
type testFinder struct {
	*PodFinder
	indexer cache.Indexer
	changes Broadcast
	lists   atomic.Int32
	listed  func() ([]*corev1.Pod, error)
}

func newTestFinder(pods ...*corev1.Pod) *testFinder {
	n := &testFinder{indexer: cache.NewIndexer(cache.MetaNamespaceKeyFunc, PodIndexers())}
	n.listed = func() ([]*corev1.Pod, error) { return nil, nil }
	n.PodFinder = NewPodFinder(n.indexer, &n.changes, func(context.Context) ([]*corev1.Pod, error) {
		n.lists.Add(1)
		return n.listed()
	}, 5*time.Second)
	for _, p := range pods {
		n.add(p)
	}
	return n
}

func (n *testFinder) add(p *corev1.Pod)    { _ = n.indexer.Add(p); n.changes.Send() }
func (n *testFinder) remove(p *corev1.Pod) { _ = n.indexer.Delete(p); n.changes.Send() }

func (n *testFinder) findName(ctx context.Context, ip string) (string, error) {
	p, err := n.FindByAddress(ctx, netip.MustParseAddr(ip), nil)
	if err != nil {
		return "", err
	}
	return p.Name, nil
}

func TestAPodIsFoundByEachOfItsAddressesUntilItFinishes(t *testing.T) {
	hostNetwork := nmitest.With(nmitest.Pod("host", "2", "10.0.0.2"), func(p *corev1.Pod) { p.Spec.HostNetwork = true })
	done := nmitest.With(nmitest.Pod("done", "3", "10.0.0.3"), func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })
	failed := nmitest.With(nmitest.Pod("failed", "4", "10.0.0.4"), func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })
	pending := nmitest.With(nmitest.Pod("pending", "5", "10.0.0.5"), func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending })
	terminating := nmitest.With(nmitest.Pod("terminating", "6", "10.0.0.6"), func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{} })
	old := nmitest.With(nmitest.Pod("old", "7"), func(p *corev1.Pod) { p.Status.PodIP = "10.0.0.7" })
	successor := nmitest.Pod("successor", "8", "10.0.0.3") // has the address of a finished pod
	synctest.Test(t, func(t *testing.T) {
		n := newTestFinder(nmitest.Pod("two", "1", "10.0.0.1", "fd00::1"), hostNetwork, done, failed, pending, terminating, old, successor)
		for ip, want := range map[string]string{
			"10.0.0.1": "two", "fd00::1": "two", "::ffff:10.0.0.1": "two", "10.0.0.5": "pending", "10.0.0.6": "terminating", "10.0.0.7": "old", "10.0.0.3": "successor",
		} {
			if got, err := n.findName(t.Context(), ip); got != want {
				t.Errorf("%s: %q, %v; want %q", ip, got, err, want)
			}
		}
		for _, ip := range []string{"10.0.0.2", "10.0.0.4", "10.0.0.9"} {
			if got, err := n.findName(t.Context(), ip); !errors.Is(err, ErrPodUnknown) {
				t.Errorf("%s: %q, %v; want no pod", ip, got, err)
			}
		}
	})
}

func TestARequestBeforeTheWatchReportsThePodWaitsNoLongerThanNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, start := newTestFinder(), time.Now()
		time.AfterFunc(time.Second, func() { n.add(nmitest.Pod("other", "1", "10.0.0.2")) })
		time.AfterFunc(1200*time.Millisecond, func() { n.add(nmitest.Pod("new", "2", "10.0.0.1")) })
		if got, err := n.findName(t.Context(), "10.0.0.1"); got != "new" || time.Since(start) != 1200*time.Millisecond {
			t.Errorf("found pod %q, %v after %s; want pod new after 1.2s", got, err, time.Since(start))
		}
		if n.lists.Load() != 0 {
			t.Error("the pods were listed although the watch reported the pod in time")
		}
	})
}

func TestAnAddressOfTwoPodsIsAmbiguousUntilOneIsRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := nmitest.Pod("old", "1", "10.0.0.1")
		n := newTestFinder(old, nmitest.Pod("new", "2", "10.0.0.1"))
		n.listed = func() ([]*corev1.Pod, error) { return nil, errors.New("unavailable") }
		if got, err := n.findName(t.Context(), "10.0.0.1"); !errors.Is(err, ErrPodAmbiguous) {
			t.Errorf("while two pods have the address: found pod %q, %v; want ErrPodAmbiguous", got, err)
		}
		time.AfterFunc(time.Second, func() { n.remove(old) })
		if got, err := n.findName(t.Context(), "10.0.0.1"); got != "new" {
			t.Errorf("after one of the pods was removed: found pod %q, %v; want pod new", got, err)
		}
	})
}

func TestAllWaitingRequestsShareOneList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestFinder()
		n.listed = func() ([]*corev1.Pod, error) {
			time.Sleep(100 * time.Millisecond)
			return []*corev1.Pod{nmitest.Pod("a", "1", "10.0.0.1"), nmitest.Pod("b", "2", "10.0.0.2"), nmitest.Pod("b2", "3", "10.0.0.2")}, nil
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if got, err := n.findName(t.Context(), "10.0.0.1"); got != "a" {
					t.Errorf("found pod %q, %v; want pod a", got, err)
				}
			})
		}
		wg.Wait()
		if n.lists.Load() != 1 {
			t.Errorf("50 waiting requests listed the pods %d times, want once", n.lists.Load())
		}
		if got, err := n.findName(t.Context(), "10.0.0.2"); err == nil {
			t.Errorf("two pods of the list have the address, but pod %q was found", got)
		}
	})
}

func TestRequestsFromUnknownAddressesDoNotLoadTheAPIServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestFinder()
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 10 * time.Millisecond)
				_, _ = n.findName(t.Context(), "10.9.9.9")
			})
		}
		start := time.Now()
		wg.Wait()
		if maxLists := int32(time.Since(start)/time.Second) + 2; n.lists.Load() > maxLists {
			t.Errorf("1000 requests from an unknown address listed the pods %d times in %s", n.lists.Load(), time.Since(start))
		}
	})
}

func TestACanceledLookupStopsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestFinder()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.findName(ctx, "10.0.0.1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the lookup returned %v, want the error of its context", err)
		}
	})
}

func TestATrimmedPodHasOnlyTheFieldsThatNMIReads(t *testing.T) {
	p := nmitest.Pod("p", "1", "10.0.0.1")
	p.Labels = map[string]string{"aadpodidbinding": "app"}
	p.Annotations = map[string]string{"a": "b"}
	p.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "m"}}
	p.ResourceVersion = "7"
	p.Spec = corev1.PodSpec{NodeName: "n", HostNetwork: true, ServiceAccountName: "sa", Containers: []corev1.Container{{Env: []corev1.EnvVar{{Name: "PASSWORD", Value: "secret"}}}}}
	p.Status.Conditions = []corev1.PodCondition{{Type: "Ready"}}
	if _, err := trim(p); err != nil {
		t.Fatal(err)
	}
	want := nmitest.Pod("p", "1", "10.0.0.1")
	want.Labels, want.ResourceVersion = p.Labels, "7"
	want.Spec = corev1.PodSpec{NodeName: "n", HostNetwork: true, ServiceAccountName: "sa"}
	if p.String() != want.String() {
		t.Errorf("the trimmed pod is %v, want %v", p, want)
	}
}

func TestAPodIsFoundByTheUIDOfItsCgroup(t *testing.T) {
	// The cgroup of a static pod has the UID in this annotation. "copy" has the UID of another pod there.
	static := func(name, uid, hash string) *corev1.Pod {
		return nmitest.With(nmitest.Pod(name, uid), func(p *corev1.Pod) {
			p.Annotations = map[string]string{configHash: hash, configMirror: hash}
		})
	}
	noMirror := nmitest.With(nmitest.Pod("no mirror", "8"), func(p *corev1.Pod) { p.Annotations = map[string]string{configHash: "claimed"} })
	done := nmitest.With(nmitest.Pod("done", "3", "10.0.0.3"), func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })
	host := nmitest.With(nmitest.Pod("host", "4", "10.0.0.4"), func(p *corev1.Pod) { p.Spec.HostNetwork = true })
	synctest.Test(t, func(t *testing.T) {
		n := newTestFinder(nmitest.Pod("ordinary", "1", "10.0.0.1"), static("static", "2", "hash"), done, host,
			static("copy", "5", "1"), static("one", "6", "twice"), static("two", "7", "twice"), noMirror)
		for uid, want := range map[string]string{"1": "ordinary", "hash": "static", "2": "static", "4": "host", "5": "copy"} {
			if got, err := n.FindByUID(t.Context(), uid); err != nil || got.Name != want {
				t.Errorf("%s: %v, %v; want %s", uid, got, err, want)
			}
		}
		for uid, want := range map[string]error{"3": ErrPodUnknown, "9": ErrPodUnknown, "claimed": ErrPodUnknown, "twice": ErrPodAmbiguous} {
			if got, err := n.FindByUID(t.Context(), uid); !errors.Is(err, want) {
				t.Errorf("%s: %v, %v; want %v", uid, got, err, want)
			}
		}
		n.listed = func() ([]*corev1.Pod, error) { return []*corev1.Pod{done, nmitest.Pod("new", "9")}, nil }
		if got, err := n.FindByUID(t.Context(), "9"); err != nil || got.Name != "new" {
			t.Errorf("a pod that only the API server knows yet: %v, %v", got, err)
		}
	})
}
