package cluster

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
	"k8s.io/client-go/tools/cache"
)

var (
	ErrPodUnknown   = errors.New("no pod of this node has this address")
	ErrPodAmbiguous = errors.New("several pods of this node have this address")
)

// liveListRate is how often the API server is asked for the pods of this node by itself, whatever the number of strangers
// that knock: one answer serves all who wait.
const liveListRate = 1

// liveListTimeout bounds one such question.
const liveListTimeout = 4 * time.Second

// podFinder finds the pod behind an address.
//
// It protects against a token for whoever happens to have an address: only one live pod with the address of its own
// counts. A pod that asks before the watch has told of its address waits; one whose address another pod still holds in
// the cache waits until that is gone.
type PodFinder struct {
	pods     cache.Indexer // with the PodIndexers
	changed  *Broadcast
	listPods func(context.Context) ([]*corev1.Pod, error)
	timeout  time.Duration

	flight  singleflight.Group
	limiter *rate.Limiter
}

// NewPodFinder finds pods in an indexer that has the PodIndexers. changed is sent to after each change of a pod, and live
// asks the API server for all pods of the node.
func NewPodFinder(pods cache.Indexer, changed *Broadcast, listPods func(context.Context) ([]*corev1.Pod, error), timeout time.Duration) *PodFinder {
	return &PodFinder{pods: pods, changed: changed, listPods: listPods, timeout: timeout, limiter: rate.NewLimiter(liveListRate, 1)}
}

// PodFinder finds the pods of this node.
func (w *Watch) PodFinder(timeout time.Duration) *PodFinder {
	return NewPodFinder(w.pods.GetIndexer(), &w.changed, w.livePods, timeout)
}

// FindByAddress returns the pod, or ErrPodUnknown or ErrPodAmbiguous once the timeout is over, or the error of ctx.
func (f *PodFinder) FindByAddress(ctx context.Context, ip netip.Addr) (*corev1.Pod, error) {
	address := ip.Unmap().String()
	pod, err := f.cached(address)
	if err == nil {
		return pod, nil
	}
	deadline := time.NewTimer(f.timeout)
	defer deadline.Stop()
	// The watch is nearly always a moment behind at most, so it gets half of the time before the API server is asked.
	listLive := time.NewTimer(f.timeout / 2)
	defer listLive.Stop()
	var answers <-chan singleflight.Result
	for {
		changed := f.changed.Next() // before the look, so that no change falls between the two
		if pod, err = f.cached(address); err == nil {
			return pod, nil
		}
		select {
		case <-changed:
		case <-listLive.C:
			answers = f.listLive()
		case answer := <-answers:
			answers = nil
			if answer.Err != nil {
				continue
			}
			if pod, err := exactlyOne(withAddress(answer.Val.([]*corev1.Pod), address)); err == nil {
				return pod, nil
			}
		case <-deadline.C:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// FindByName returns the pod of this node with a name (namespace/name), or ErrPodUnknown once the timeout is over, or the
// error of ctx. It may have no address yet.
func (f *PodFinder) FindByName(ctx context.Context, name string) (*corev1.Pod, error) {
	deadline := time.NewTimer(f.timeout)
	defer deadline.Stop()
	for {
		changed := f.changed.Next()
		o, ok, err := f.pods.GetByKey(name)
		if err != nil {
			return nil, err
		}
		if pod, is := o.(*corev1.Pod); ok && is && !finished(pod) {
			return pod, nil
		}
		select {
		case <-changed:
		case <-deadline.C:
			return nil, ErrPodUnknown
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (f *PodFinder) cached(address string) (*corev1.Pod, error) {
	found, err := f.pods.ByIndex(byIP, address)
	if err != nil {
		return nil, err
	}
	switch len(found) {
	case 0:
		return nil, ErrPodUnknown
	case 1:
		return found[0].(*corev1.Pod), nil
	}
	return nil, ErrPodAmbiguous
}

// listLive asks the API server, together with all who ask at the same time; it belongs to none of them.
func (f *PodFinder) listLive() <-chan singleflight.Result {
	return f.flight.DoChan("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), liveListTimeout)
		defer cancel()
		if err := f.limiter.Wait(ctx); err != nil {
			return nil, err
		}
		pods, err := f.listPods(ctx)
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

func exactlyOne(pods []*corev1.Pod) (*corev1.Pod, error) {
	switch len(pods) {
	case 0:
		return nil, ErrPodUnknown
	case 1:
		return pods[0], nil
	}
	return nil, ErrPodAmbiguous
}

// Broadcast wakes all who wait for the next change. Its zero value is ready for use.
type Broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

// Next returns a channel that is closed at the next send.
func (b *Broadcast) Next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

// Send wakes them.
func (b *Broadcast) Send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
