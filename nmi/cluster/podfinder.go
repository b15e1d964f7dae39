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

	"github.com/podidentity/podidentity/nmi/links"
)

// Errors of a PodFinder.
var (
	ErrPodUnknown   = errors.New("no live pod of this node has this address, UID or name")
	ErrPodAmbiguous = errors.New("several live pods of this node have this address or UID")
)

// liveListRate is how many times per second NMI may list the pods of its node from the API server. It does not depend
// on the number of requests from unknown addresses, because all waiting requests share one list.
const liveListRate = 1

// liveListTimeout bounds one list of the pods, including the wait for liveListRate.
const liveListTimeout = 4 * time.Second

// UnconfirmedError says that the API server reports the address as that of one pod, but another pod may have it by now.
type UnconfirmedError struct {
	Pod    *corev1.Pod
	Reason *links.Unconfirmed
}

func (e *UnconfirmedError) Error() string { return e.Reason.String() }

// Confirmer confirms that a pod is behind the address that the API server reports. links.Table implements it.
type Confirmer interface {
	Confirm(links.Claim) *links.Unconfirmed
}

// PodFinder finds the pod that has an address, a UID or a name.
//
// It protects against a token for the wrong pod: the address must belong to exactly one live pod that is not in the
// host network, or to one that can be confirmed. While the cache has no such pod, or several, a request waits, at most
// for the field timeout: the watch may not have reported yet that the pod has the address, or that an earlier pod with
// this address has finished.
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

// FindByAddress returns the pod that has the address. It returns ErrPodUnknown or ErrPodAmbiguous after the timeout, or the
// error of ctx. If confirmer is not nil, it must confirm the address; otherwise FindByAddress returns an UnconfirmedError
// after the timeout.
func (f *PodFinder) FindByAddress(ctx context.Context, ip netip.Addr, confirmer Confirmer) (*corev1.Pod, error) {
	address := ip.Unmap().String()
	return f.find(ctx, func() (*corev1.Pod, error) {
		pods, err := f.indexed(byIP, address)
		if err != nil {
			return nil, err
		}
		return choose(pods, ip, time.Time{}, confirmer)
	}, func(list podList) (*corev1.Pod, error) {
		return choose(withAddress(list.pods, address), ip, list.started, confirmer)
	})
}

// choose returns the pod that has the address, of those for which the API server reports it. read is when the list that
// reports it started, or zero for the cache.
func choose(pods []*corev1.Pod, ip netip.Addr, read time.Time, confirmer Confirmer) (*corev1.Pod, error) {
	if confirmer == nil {
		return exactlyOne(pods)
	}
	if len(pods) > 1 {
		return chooseNewest(pods, ip, confirmer)
	}
	pod, err := exactlyOne(pods)
	if err != nil {
		return nil, err
	}
	if reason := confirmer.Confirm(Claim(ip, pod, read)); reason != nil {
		return nil, &UnconfirmedError{pod, reason}
	}
	return pod, nil
}

// chooseNewest returns the pod that started after the network link behind the address was created, if all others started
// before. The kubelet has not reported yet that those have lost the address.
func chooseNewest(pods []*corev1.Pod, ip netip.Addr, confirmer Confirmer) (*corev1.Pod, error) {
	var newest *corev1.Pod
	for _, pod := range pods {
		// Without the time of a list: a list with two pods at one address does not say which of them has it.
		reason := confirmer.Confirm(Claim(ip, pod, time.Time{}))
		switch {
		case reason == nil && newest == nil:
			newest = pod
		case reason == nil || reason.Cause != links.PodTooOld && reason.Cause != links.LinkTooOld:
			return nil, ErrPodAmbiguous
		}
	}
	if newest == nil {
		return nil, ErrPodAmbiguous
	}
	return newest, nil
}

// Claim returns the statement of the API server that the pod has the address. read is when the list that has the statement
// started, or zero for the cache.
func Claim(address netip.Addr, pod *corev1.Pod, read time.Time) links.Claim {
	claim := links.Claim{Address: address, UID: string(pod.UID), Started: started(pod), Read: read}
	// When the kubelet restarts, it acknowledges static pods again, but keeps their sandboxes.
	if pod.Status.StartTime != nil && staticUID(pod) == "" {
		claim.Acknowledged = pod.Status.StartTime.Time
	}
	return claim
}

// FindByUID returns the pod whose cgroup has the UID, and which has not finished. It finds a static pod only in the
// cache: in a list it compares UIDs, and the UID of a mirror pod is not that of the cgroup. It returns ErrPodUnknown or
// ErrPodAmbiguous after the timeout, or the error of ctx.
func (f *PodFinder) FindByUID(ctx context.Context, uid string) (*corev1.Pod, error) {
	return f.find(ctx, func() (*corev1.Pod, error) {
		pod, err := f.cached(byUID, uid)
		if errors.Is(err, ErrPodUnknown) {
			pod, err = f.cached(byStaticUID, uid)
		}
		if err == nil && finished(pod) {
			return nil, ErrPodUnknown
		}
		return pod, err
	}, func(list podList) (*corev1.Pod, error) {
		return exactlyOne(slices.DeleteFunc(slices.Clone(list.pods), func(p *corev1.Pod) bool { return string(p.UID) != uid || finished(p) }))
	})
}

// find calls cached at each change until it returns a pod. After half the timeout, or when a list can confirm the
// address, it also lists the pods from the API server, and returns the pod that listed finds in the list. It returns
// the error of cached after the timeout, or the error of ctx.
func (f *PodFinder) find(ctx context.Context, cached func() (*corev1.Pod, error), listed func(podList) (*corev1.Pod, error)) (*corev1.Pod, error) {
	pod, err := cached()
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
	var listAt time.Time // when a list can confirm the address; zero if that is unknown
	for {
		changed := f.changed.Next() // before the lookup, so that a change during or after the lookup is not missed
		if pod, err = cached(); err == nil {
			return pod, nil
		}
		if at := listTime(err); !at.IsZero() && !at.Equal(listAt) {
			listAt = at
			listLive.Reset(time.Until(at))
		}
		select {
		case <-changed:
		case <-listLive.C:
			if lists == nil {
				lists = f.listLive() //nolint:contextcheck // others wait for this list, too
			}
		case list := <-lists:
			lists = nil
			if list.Err != nil {
				continue
			}
			if pod, err := listed(list.Val.(podList)); err == nil {
				return pod, nil
			}
			// The list may have started before it could confirm the address.
			listAt = time.Time{}
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

// indexed returns the pods of the cache that have the value in the index.
func (f *PodFinder) indexed(index, value string) ([]*corev1.Pod, error) {
	found, err := f.pods.ByIndex(index, value)
	if err != nil {
		return nil, err
	}
	pods := make([]*corev1.Pod, len(found))
	for i, pod := range found {
		pods[i] = pod.(*corev1.Pod)
	}
	return pods, nil
}

func (f *PodFinder) cached(index, value string) (*corev1.Pod, error) {
	pods, err := f.indexed(index, value)
	if err != nil {
		return nil, err
	}
	return exactlyOne(pods)
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
		started := time.Now()
		pods, err := f.listPods(ctx)
		for _, pod := range pods {
			_, _ = trim(pod) // as in the cache; trim never fails for a pod
		}
		return podList{pods, started}, err
	})
}

// podList is a list of the pods of this node from the API server.
type podList struct {
	pods    []*corev1.Pod
	started time.Time
}

// listTime returns when a list can confirm the address, or zero.
func listTime(err error) time.Time {
	var unconfirmed *UnconfirmedError
	if !errors.As(err, &unconfirmed) {
		return time.Time{}
	}
	return unconfirmed.Reason.ListAt
}

// Recheck makes the requests that wait for a pod look again.
func (f *PodFinder) Recheck() { f.changed.Send() }

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
