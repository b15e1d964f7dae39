package links_test

import (
	"context"
	"flag"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/links"
)

var (
	moves = flag.Int("moves", 400, "moves of the address in the random test")
	seed  = flag.Uint64("seed", uint64(time.Now().UnixNano()), "seed of the random test")
)

var shared = netip.MustParseAddr("10.0.0.1")

// reuse is a node on which one address moves between two pods. The kubelet reports a pod up to two seconds late, and the watch
// delivers up to three seconds after that. A list returns what the kubelet has reported.
type reuse struct {
	t       *testing.T
	random  *rand.Rand
	network *links.FakeNetwork
	file    string
	watched cache.Indexer
	changed cluster.Broadcast
	finder  *cluster.PodFinder

	mu       sync.Mutex
	table    *links.Table
	stop     context.CancelFunc
	link     int
	holder   string                 // UID of the pod behind the address
	reported map[string]*corev1.Pod // by the kubelet, by name

	right, wrong, refused int
}

// Confirm counts wrong confirmations: the address cannot move while it runs.
func (r *reuse) Confirm(claim links.Claim) *links.Unconfirmed {
	r.mu.Lock()
	defer r.mu.Unlock()
	reason := r.table.Confirm(claim)
	if reason == nil && claim.UID != r.holder {
		r.wrong++
	}
	return reason
}

func (r *reuse) between(from, to time.Duration) time.Duration {
	return from + time.Duration(r.random.Int64N(int64(to-from)))
}

// start starts NMI's table.
func (r *reuse) start() {
	ctx, cancel := context.WithCancel(r.t.Context())
	table := links.NewFakeTable(r.network, r.file, r.changed.Send)
	ended := make(chan struct{})
	go func() { table.Run(ctx); close(ended) }()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.table, r.stop = table, func() { cancel(); <-ended }
}

// report is a report of the kubelet about a pod.
func (r *reuse) report(pod *corev1.Pod) {
	late := r.between(0, 1900*time.Millisecond)
	delivery := r.between(0, 3*time.Second)
	go func() {
		time.Sleep(late)
		r.mu.Lock()
		if old := r.reported[pod.Name]; old != nil && old.Generation > pod.Generation {
			r.mu.Unlock()
			return // the kubelet reports only the newest state
		}
		r.reported[pod.Name] = pod
		r.mu.Unlock()
		time.Sleep(delivery)
		r.mu.Lock()
		defer r.mu.Unlock()
		// A watch delivers the events of an object in their order.
		if old, ok, _ := r.watched.Get(pod); ok && old.(*corev1.Pod).Generation > pod.Generation {
			return
		}
		_ = r.watched.Update(pod.DeepCopy())
		r.changed.Send()
	}()
}

func (r *reuse) list(context.Context) ([]*corev1.Pod, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var pods []*corev1.Pod
	for _, pod := range r.reported {
		pods = append(pods, pod.DeepCopy())
	}
	return pods, nil
}

// move ends the sandbox of the pod that has the address, and starts one of the other pod with the address.
func (r *reuse) move(generation int64, acknowledged time.Time) {
	from, to := "a", "b"
	if generation%2 == 0 {
		from, to = to, from
	}
	r.mu.Lock()
	r.network.Remove(r.link)
	r.holder = ""
	r.mu.Unlock()
	r.report(pod(from, generation, acknowledged, time.Time{}, ""))
	time.Sleep(r.between(0, 200*time.Millisecond))
	r.mu.Lock()
	r.link = r.network.AddPod(shared)
	r.holder = to
	r.mu.Unlock()
	time.Sleep(r.between(time.Millisecond, 1200*time.Millisecond))
	r.report(pod(to, generation, acknowledged, time.Now(), shared.String()))
}

func pod(name string, generation int64, acknowledged, started time.Time, address string) *corev1.Pod {
	seconds := metav1.NewTime(acknowledged.Truncate(time.Second))
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), Generation: generation}}
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, StartTime: &seconds}
	if address != "" {
		p.Status.PodIPs = []corev1.PodIP{{IP: address}}
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(started.Truncate(time.Second))}}}}
	}
	return p
}

// request asks for the pod behind the address, as the pod that has it does.
func (r *reuse) request(confirmer cluster.Confirmer) {
	r.mu.Lock()
	someone := r.holder != ""
	r.mu.Unlock()
	if !someone {
		return
	}
	found, err := r.finder.FindByAddress(r.t.Context(), shared, confirmer)
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err != nil:
		r.refused++
	case confirmer == nil && string(found.UID) != r.holder:
		r.wrong++
	default:
		r.right++
	}
}

// run moves the address, with requests and restarts of NMI at random times.
func (r *reuse) run(confirmer cluster.Confirmer) {
	r.start()
	acknowledged := time.Now()
	var requests sync.WaitGroup
	for generation := range int64(*moves) {
		r.move(generation, acknowledged)
		for range r.random.IntN(6) {
			delay := r.between(0, 4*time.Second)
			requests.Go(func() {
				time.Sleep(delay)
				r.request(confirmer)
			})
		}
		if r.random.IntN(20) == 0 {
			r.stop()
			time.Sleep(r.between(0, 3*time.Second))
			r.start()
		}
		if r.random.IntN(2) == 0 {
			time.Sleep(r.between(0, 8*time.Second))
		} else {
			time.Sleep(r.between(0, 500*time.Millisecond))
		}
	}
	requests.Wait()
	time.Sleep(10 * time.Second)
	r.stop()
}

func newReuse(t *testing.T) *reuse {
	r := &reuse{t: t, random: rand.New(rand.NewPCG(*seed, 0)), network: links.NewFakeNetwork(), file: filepath.Join(t.TempDir(), links.FileName),
		watched: cache.NewIndexer(cache.MetaNamespaceKeyFunc, cluster.PodIndexers()), reported: map[string]*corev1.Pod{}}
	r.finder = cluster.NewPodFinder(r.watched, &r.changed, r.list, 5*time.Second)
	return r
}

func TestAReusedAddressNeverIdentifiesItsFormerPod(t *testing.T) {
	t.Logf("seed %d", *seed)
	synctest.Test(t, func(t *testing.T) {
		r := newReuse(t)
		r.run(r)
		t.Logf("%d right, %d refused", r.right, r.refused)
		if r.wrong > 0 {
			t.Errorf("%d wrong confirmations", r.wrong)
		}
		if r.right < *moves/4 {
			t.Errorf("only %d requests of %d moves found their pod", r.right, *moves)
		}
	})
}

func TestAReusedAddressWithoutConfirmationIdentifiesItsFormerPod(t *testing.T) {
	t.Logf("seed %d", *seed)
	synctest.Test(t, func(t *testing.T) {
		r := newReuse(t)
		r.run(nil)
		t.Logf("%d right, %d wrong, %d refused", r.right, r.wrong, r.refused)
		if r.wrong == 0 {
			t.Error("no request found the former pod, so the other test would find nothing either")
		}
	})
}
