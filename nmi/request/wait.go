package request

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/limit"
	"github.com/podidentity/podidentity/nmi/token"
)

const (
	// maxFailedWait is how long a request waits for an identity that Azure has refused to attach. MIC tries again only
	// after a while, but an operator may be putting it right at this moment.
	maxFailedWait = 2 * time.Second

	// MaxAssignmentWait is what client libraries give one request at least; they would not hear a later answer.
	MaxAssignmentWait = time.Minute

	// propagationTime is how long after an assignment the machine's metadata service may not have heard of it.
	propagationTime = time.Minute
	// In that time it is asked again after initialBackoff, then after twice that, and so on up to maxBackoff.
	initialBackoff, maxBackoff = time.Second, 5 * time.Second

	// recheckInterval spaces the looks of one request at objects that it shares with other pods, so that whoever edits those
	// all the time does not keep the node busy.
	recheckInterval = 100 * time.Millisecond
)

// Outcomes of waiting, for the metric.
const (
	WaitAssigned = "assigned" // the pod may have the identity
	WaitTimeout  = "timeout"  // it was not assigned in time, or NMI stopped
	WaitRefused  = "refused"  // meanwhile the objects say no
	WaitGone     = "gone"     // the client left
)

// WaitConfig holds requests of pods whose identity is on its way to the machine, in standard mode.
type WaitConfig struct {
	MaxWait       time.Duration // that one request is held
	Notifier      *cluster.Notifier
	AssignedSince func(*corev1.Pod, *identity.Identity) time.Time // since when it is known; zero if it is not assigned
	Stopping      <-chan struct{}                                 // closed when NMI stops: who waits then is to come again
	Limiter       *limit.Limiter
	Observe       func(outcome string, took time.Duration)
}

// requestWait is how one request waits. It is used by that request alone.
type requestWait struct {
	*WaitConfig // nil in managed mode, where there is nothing to wait for
	source      netip.Addr

	startedAt     time.Time // zero until it waits
	checkedAt     time.Time // when it waited last
	failedAt      time.Time // since when Azure refuses the identity; zero if it does not
	retryAt       time.Time // when the metadata service is to be asked again
	backoff       time.Duration
	retryUpstream bool // it is time to ask it
	granted       bool // at the last look
	outcome       string

	label         string // of the pod, when the topics were chosen
	own, shared   <-chan struct{}
	unsubscribers []func()
}

// wait holds a request that was told no until it is worth looking again. It reports false if the no is not one that
// passes, or once there is no time left.
func (w *requestWait) wait(ctx context.Context, g authorization, refusal *metadata.Error) bool {
	if refusal.Reason != identity.AssignmentPending && refusal.Reason != identity.AssignmentFailed || !w.start() {
		return false
	}
	if w.subscribe(g.pod) {
		return true // what changed before nobody has told
	}
	now := time.Now()
	left := w.timeLeft(now, refusal.Reason)
	if left <= 0 {
		w.outcome = WaitTimeout
		return false
	}
	// If the decision does not say to wait, the metadata service did.
	w.retryUpstream = false
	retriesUpstream := g.decision.Outcome != identity.Pending
	if retriesUpstream {
		left = min(left, w.timeUntilRetry(now))
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	shared, spaced := w.shared, (<-chan time.Time)(nil)
	if early := recheckInterval - now.Sub(w.checkedAt); early > 0 {
		shared, spaced = nil, time.After(early)
	}
	defer func() { w.checkedAt = time.Now() }()
	for {
		select {
		case <-w.own:
			return true
		case <-shared:
			return true
		case <-spaced:
			shared, spaced = w.shared, nil
		case <-timer.C:
			w.retryUpstream = retriesUpstream
			return true
		case <-w.Stopping:
			w.outcome = WaitTimeout
			return false
		case <-ctx.Done():
			w.outcome = WaitGone
			return false
		}
	}
}

// start reports whether the request may wait, and notes that it does.
func (w *requestWait) start() bool {
	if !w.startedAt.IsZero() {
		return true
	}
	if w.WaitConfig == nil || w.MaxWait == 0 || !w.Limiter.Acquire(w.source) {
		return false
	}
	w.startedAt = time.Now()
	return true
}

// subscribe sees to it that news of what the decision about the pod rests on wakes the request. It reports true if it did
// not before.
func (w *requestWait) subscribe(pod *corev1.Pod) bool {
	label := pod.Labels[v1.BindingLabel]
	if w.unsubscribers != nil && w.label == label {
		return false
	}
	w.unsubscribe()
	own, stopOwn := w.Notifier.Subscribe(cluster.PodKey(pod.Namespace, pod.Name))
	shared, stopShared := w.Notifier.Subscribe(cluster.BindingsKey(label), cluster.ExceptionsKey(pod.Namespace), cluster.IdentitiesKey())
	w.label, w.own, w.shared, w.unsubscribers = label, own, shared, []func(){stopOwn, stopShared}
	return true
}

func (w *requestWait) unsubscribe() {
	for _, stop := range w.unsubscribers {
		stop()
	}
	w.unsubscribers = nil
}

// timeLeft is how long the request may still wait for this reason.
func (w *requestWait) timeLeft(now time.Time, why identity.Reason) time.Duration {
	left := w.startedAt.Add(w.MaxWait).Sub(now)
	if why != identity.AssignmentFailed {
		w.failedAt = time.Time{}
		return left
	}
	if w.failedAt.IsZero() {
		w.failedAt = now
	}
	return min(left, w.failedAt.Add(maxFailedWait).Sub(now))
}

// timeUntilRetry is how long it is until the metadata service is to be asked again.
func (w *requestWait) timeUntilRetry(now time.Time) time.Duration {
	if !now.Before(w.retryAt) {
		w.backoff = min(max(2*w.backoff, initialBackoff), maxBackoff)
		w.retryAt = now.Add(w.backoff)
	}
	return w.retryAt.Sub(now)
}

// finish has to be called when the request is done with.
func (w *requestWait) finish() {
	if w.startedAt.IsZero() {
		return
	}
	w.unsubscribe()
	w.Limiter.Release(w.source)
	switch {
	case w.outcome != "":
	case w.granted:
		w.outcome = WaitAssigned
	default:
		w.outcome = WaitRefused
	}
	w.Observe(w.outcome, time.Since(w.startedAt))
}

// notYetPropagated makes of the metadata service's no one that passes, while the identity was assigned so lately that the
// service may not have heard of it. Other failures it returns as they are.
func (p *Processor) notYetPropagated(pod *corev1.Pod, id *identity.Identity, err error) error {
	var e *token.Error
	if p.Wait == nil || id == nil || id.Kind != identity.UserAssigned || !errors.As(err, &e) ||
		e.Class != token.Denied || e.Status != http.StatusBadRequest || isResourceError(e) || time.Since(p.Wait.AssignedSince(pod, id)) >= propagationTime {
		return err
	}
	return &token.Error{Class: token.Unavailable, Reason: identity.AssignmentPending, RetryAfter: metadata.PendingRetryAfter, Err: err,
		Detail: fmt.Sprintf("AzureIdentity %s was assigned to the machine of pod %s/%s a moment ago, and the metadata service of the machine does not give a token for it yet: %s", id.Key(), pod.Namespace, pod.Name, upstreamMessage(e))}
}
