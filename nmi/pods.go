package nmi

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
)

var (
	errPodUnknown   = errors.New("no pod of this node has this address")
	errPodAmbiguous = errors.New("several pods of this node have this address")
)

// liveRate is how often the API server is asked for the pods of this node by itself, whatever the number of strangers
// that knock: one answer serves all who wait.
const liveRate = 1

// liveTimeout bounds one such question.
const liveTimeout = 4 * time.Second

// podFinder finds the pod behind an address.
//
// It protects against a token for whoever happens to have an address: only one live pod with the address of its own
// counts. A pod that asks before the watch has told of its address waits; one whose address another pod still holds in
// the cache waits until that is gone.
type podFinder struct {
	lookup  func(ip string) ([]any, error)       // the index on addresses
	byName  func(name string) (any, bool, error) // namespace/name
	changed *broadcast
	live    func(context.Context) ([]*corev1.Pod, error)
	timeout time.Duration

	flight  singleflight.Group
	limiter *rate.Limiter
}

func newPodFinder(w *watch, timeout time.Duration) *podFinder {
	return &podFinder{
		lookup:  func(ip string) ([]any, error) { return w.pods.GetIndexer().ByIndex(byIP, ip) },
		byName:  w.pods.GetIndexer().GetByKey,
		changed: &w.changed,
		live:    w.livePods,
		timeout: timeout,
		limiter: rate.NewLimiter(liveRate, 1),
	}
}

// find returns the pod, or errPodUnknown or errPodAmbiguous once the timeout is over, or the error of ctx.
func (f *podFinder) find(ctx context.Context, ip netip.Addr) (*corev1.Pod, error) {
	address := ip.Unmap().String()
	pod, err := f.cached(address)
	if err == nil {
		return pod, nil
	}
	deadline := time.NewTimer(f.timeout)
	defer deadline.Stop()
	// The watch is nearly always a moment behind at most, so it gets half of the time before the API server is asked.
	askLive := time.NewTimer(f.timeout / 2)
	defer askLive.Stop()
	var answers <-chan singleflight.Result
	for {
		changed := f.changed.next() // before the look, so that no change falls between the two
		if pod, err = f.cached(address); err == nil {
			return pod, nil
		}
		select {
		case <-changed:
		case <-askLive.C:
			answers = f.askLive()
		case answer := <-answers:
			answers = nil
			if answer.Err != nil {
				continue
			}
			if pod, err := only(withAddress(answer.Val.([]*corev1.Pod), address)); err == nil {
				return pod, nil
			}
		case <-deadline.C:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// named returns the pod of this node with a name (namespace/name), or errPodUnknown once the timeout is over, or the
// error of ctx. It may have no address yet.
func (f *podFinder) named(ctx context.Context, name string) (*corev1.Pod, error) {
	deadline := time.NewTimer(f.timeout)
	defer deadline.Stop()
	for {
		changed := f.changed.next()
		o, ok, err := f.byName(name)
		if err != nil {
			return nil, err
		}
		if pod, is := o.(*corev1.Pod); ok && is && !finished(pod) {
			return pod, nil
		}
		select {
		case <-changed:
		case <-deadline.C:
			return nil, errPodUnknown
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (f *podFinder) cached(address string) (*corev1.Pod, error) {
	found, err := f.lookup(address)
	if err != nil {
		return nil, err
	}
	switch len(found) {
	case 0:
		return nil, errPodUnknown
	case 1:
		return found[0].(*corev1.Pod), nil
	}
	return nil, errPodAmbiguous
}

// askLive asks the API server, together with all who ask at the same time; it belongs to none of them.
func (f *podFinder) askLive() <-chan singleflight.Result {
	return f.flight.DoChan("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), liveTimeout)
		defer cancel()
		if err := f.limiter.Wait(ctx); err != nil {
			return nil, err
		}
		pods, err := f.live(ctx)
		for _, pod := range pods {
			_, _ = trim(pod) // as those from the cache are; it has no error for a pod
		}
		return pods, err
	})
}

func withAddress(pods []*corev1.Pod, address string) []*corev1.Pod {
	return slices.DeleteFunc(slices.Clone(pods), func(p *corev1.Pod) bool {
		ips, _ := podIPs(p) // has no error
		return !slices.Contains(ips, address)
	})
}

func only(pods []*corev1.Pod) (*corev1.Pod, error) {
	switch len(pods) {
	case 0:
		return nil, errPodUnknown
	case 1:
		return pods[0], nil
	}
	return nil, errPodAmbiguous
}

// broadcast wakes all who wait for the next change. Its zero value is ready for use.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

// next returns a channel that is closed at the next send.
func (b *broadcast) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
