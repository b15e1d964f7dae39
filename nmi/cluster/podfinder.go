package cluster

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
)

// Errors of a PodFinder.
var (
	ErrPodUnknown   = errors.New("no live pod of this node has this address or name")
	ErrPodAmbiguous = errors.New("several live pods of this node have this address")
)

// liveListRate is how many times per second NMI may list the pods of its node from the API server. It does not depend
// on the number of requests from unknown addresses, because all waiting requests share one list.
const liveListRate = 1

// liveListTimeout bounds one list of the pods, including the wait for liveListRate.
const liveListTimeout = 4 * time.Second

// PodFinder finds the pod that has an address or a name.
//
// It protects against a token for the wrong pod: the address must belong to exactly one live pod that is not in the
// host network. While the cache has no such pod, or several, a request waits, at most for the field timeout: the watch
// may not have reported yet that the pod has the address, or that an earlier pod with this address has finished.
type PodFinder struct {
	pods     cache.Indexer // with the PodIndexers
	changed  *Broadcast
	listPods func(context.Context) ([]*corev1.Pod, error)
	timeout  time.Duration

	flight  singleflight.Group
	limiter *rate.Limiter
}

// NewPodFinder returns a finder of the pods in an indexer with the PodIndexers. The caller must call changed.Send after
// each change of the indexer. listPods lists the pods of the node from the API server. timeout bounds each search.
func NewPodFinder(pods cache.Indexer, changed *Broadcast, listPods func(context.Context) ([]*corev1.Pod, error), timeout time.Duration) *PodFinder {
	return &PodFinder{pods: pods, changed: changed, listPods: listPods, timeout: timeout, limiter: rate.NewLimiter(liveListRate, 1)}
}

// PodFinder returns a finder of the pods of this node.
func (c *Cache) PodFinder(timeout time.Duration) *PodFinder {
	return NewPodFinder(c.pods.GetIndexer(), &c.podChanged, c.listPods, timeout)
}

// FindByAddress returns the pod that has the address. It returns ErrPodUnknown or ErrPodAmbiguous after the timeout, or
// the error of ctx.
func (f *PodFinder) FindByAddress(ctx context.Context, ip netip.Addr) (*corev1.Pod, error) {
	address := ip.Unmap().String()
	pod, err := f.cached(address)
	if err == nil {
		return pod, nil
	}
	deadline := time.NewTimer(f.timeout)
	defer deadline.Stop()
	// The watch usually reports a pod within a moment. If it has not done so after half of f.timeout, NMI lists the
	// pods from the API server.
	listLive := time.NewTimer(f.timeout / 2)
	defer listLive.Stop()
	var lists <-chan singleflight.Result
	for {
		changed := f.changed.Next() // before the lookup, so that a change during or after the lookup is not missed
		if pod, err = f.cached(address); err == nil {
			return pod, nil
		}
		select {
		case <-changed:
		case <-listLive.C:
			lists = f.listLive() //nolint:contextcheck // others wait for this list, too
		case list := <-lists:
			lists = nil
			if list.Err != nil {
				continue
			}
			if pod, err := exactlyOne(withAddress(list.Val.([]*corev1.Pod), address)); err == nil {
				return pod, nil
			}
		case <-deadline.C:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// FindByName returns the pod of this node that has the name, in the form namespace/name, and has not finished. The pod
// may not have an address yet. FindByName returns ErrPodUnknown after the timeout, or the error of ctx.
func (f *PodFinder) FindByName(ctx context.Context, name string) (*corev1.Pod, error) {
	deadline := time.NewTimer(f.timeout)
	defer deadline.Stop()
	for {
		changed := f.changed.Next()
		o, ok, err := f.pods.GetByKey(name)
		if err != nil {
			return nil, err
		}
		if pod, isPod := o.(*corev1.Pod); ok && isPod && !finished(pod) {
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

// listLive lists the pods from the API server. All concurrent callers share one list. It uses the context of no caller,
// so that no caller can cancel it for the others.
func (f *PodFinder) listLive() <-chan singleflight.Result {
	return f.flight.DoChan("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), liveListTimeout)
		defer cancel()
		if err := f.limiter.Wait(ctx); err != nil {
			return nil, err
		}
		pods, err := f.listPods(ctx)
		for _, pod := range pods {
			_, _ = trim(pod) // as in the cache; trim never fails for a pod
		}
		return pods, err
	})
}

func withAddress(pods []*corev1.Pod, address string) []*corev1.Pod {
	return slices.DeleteFunc(slices.Clone(pods), func(p *corev1.Pod) bool {
		ips, _ := podIPs(p) // never fails
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
