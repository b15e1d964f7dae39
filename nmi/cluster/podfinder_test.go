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

// node1 is a PodFinder over an index that the test fills.
type node1 struct {
	*PodFinder
	indexer cache.Indexer
	changes Broadcast
	asked   atomic.Int32
	answer  func() ([]*corev1.Pod, error)
}

func newNode1(pods ...*corev1.Pod) *node1 {
	n := &node1{indexer: cache.NewIndexer(cache.MetaNamespaceKeyFunc, PodIndexers())}
	n.answer = func() ([]*corev1.Pod, error) { return nil, nil }
	n.PodFinder = NewPodFinder(n.indexer, &n.changes, func(context.Context) ([]*corev1.Pod, error) {
		n.asked.Add(1)
		return n.answer()
	}, 5*time.Second)
	for _, p := range pods {
		n.add(p)
	}
	return n
}

func (n *node1) add(p *corev1.Pod)    { _ = n.indexer.Add(p); n.changes.Send() }
func (n *node1) remove(p *corev1.Pod) { _ = n.indexer.Delete(p); n.changes.Send() }

func (n *node1) name(ctx context.Context, ip string) (string, error) {
	p, err := n.FindByAddress(ctx, netip.MustParseAddr(ip))
	if err != nil {
		return "", err
	}
	return p.Name, nil
}

func TestAPodIsKnownByEachOfItsOwnAddressesWhileItLives(t *testing.T) {
	hostNetwork := nmitest.With(nmitest.Pod("host", "2", "10.0.0.2"), func(p *corev1.Pod) { p.Spec.HostNetwork = true })
	done := nmitest.With(nmitest.Pod("done", "3", "10.0.0.3"), func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })
	failed := nmitest.With(nmitest.Pod("failed", "4", "10.0.0.4"), func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })
	pending := nmitest.With(nmitest.Pod("pending", "5", "10.0.0.5"), func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending })
	terminating := nmitest.With(nmitest.Pod("terminating", "6", "10.0.0.6"), func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{} })
	old := nmitest.With(nmitest.Pod("old", "7"), func(p *corev1.Pod) { p.Status.PodIP = "10.0.0.7" })
	successor := nmitest.Pod("successor", "8", "10.0.0.3") // of a finished pod's address
	synctest.Test(t, func(t *testing.T) {
		n := newNode1(nmitest.Pod("two", "1", "10.0.0.1", "fd00::1"), hostNetwork, done, failed, pending, terminating, old, successor)
		for ip, want := range map[string]string{
			"10.0.0.1": "two", "fd00::1": "two", "::ffff:10.0.0.1": "two", "10.0.0.5": "pending", "10.0.0.6": "terminating", "10.0.0.7": "old", "10.0.0.3": "successor",
		} {
			if got, err := n.name(t.Context(), ip); got != want {
				t.Errorf("%s: %q, %v; want %q", ip, got, err, want)
			}
		}
		for _, ip := range []string{"10.0.0.2", "10.0.0.4", "10.0.0.9"} {
			if got, err := n.name(t.Context(), ip); !errors.Is(err, ErrPodUnknown) {
				t.Errorf("%s: %q, %v; want nobody", ip, got, err)
			}
		}
	})
}

func TestAPodThatAsksBeforeTheWatchKnowsItWaitsNoLongerThanNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, start := newNode1(), time.Now()
		time.AfterFunc(time.Second, func() { n.add(nmitest.Pod("other", "1", "10.0.0.2")) })
		time.AfterFunc(1200*time.Millisecond, func() { n.add(nmitest.Pod("new", "2", "10.0.0.1")) })
		if got, err := n.name(t.Context(), "10.0.0.1"); got != "new" || time.Since(start) != 1200*time.Millisecond {
			t.Errorf("%q, %v after %s", got, err, time.Since(start))
		}
		if n.asked.Load() != 0 {
			t.Error("the API server was asked although the watch was in time")
		}
	})
}

func TestAnAddressThatTwoPodsHaveIsNobodysUntilOneIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := nmitest.Pod("old", "1", "10.0.0.1")
		n := newNode1(old, nmitest.Pod("new", "2", "10.0.0.1"))
		n.answer = func() ([]*corev1.Pod, error) { return nil, errors.New("away") }
		if got, err := n.name(t.Context(), "10.0.0.1"); !errors.Is(err, ErrPodAmbiguous) {
			t.Errorf("%q, %v", got, err)
		}
		time.AfterFunc(time.Second, func() { n.remove(old) })
		if got, err := n.name(t.Context(), "10.0.0.1"); got != "new" {
			t.Errorf("%q, %v", got, err)
		}
	})
}

func TestTheAPIServerIsAskedOnceForAllWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode1()
		n.answer = func() ([]*corev1.Pod, error) {
			time.Sleep(100 * time.Millisecond)
			return []*corev1.Pod{nmitest.Pod("a", "1", "10.0.0.1"), nmitest.Pod("b", "2", "10.0.0.2"), nmitest.Pod("b2", "3", "10.0.0.2")}, nil
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if got, err := n.name(t.Context(), "10.0.0.1"); got != "a" {
					t.Errorf("%q, %v", got, err)
				}
			})
		}
		wg.Wait()
		if n.asked.Load() != 1 {
			t.Errorf("it was asked %d times", n.asked.Load())
		}
		if got, err := n.name(t.Context(), "10.0.0.2"); err == nil {
			t.Errorf("an address of two pods is %q", got)
		}
	})
}

func TestStrangersDoNotMakeTheAPIServerBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode1()
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 10 * time.Millisecond)
				_, _ = n.name(t.Context(), "10.9.9.9")
			})
		}
		start := time.Now()
		wg.Wait()
		if most := int32(time.Since(start)/time.Second) + 2; n.asked.Load() > most {
			t.Errorf("1000 requests of strangers asked it %d times in %s", n.asked.Load(), time.Since(start))
		}
	})
}

func TestACallerThatLeavesStopsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode1()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.name(ctx, "10.0.0.1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

func TestWhatIsKeptOfAPodIsWhatIsRead(t *testing.T) {
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
		t.Errorf("kept %v, want %v", p, want)
	}
}
