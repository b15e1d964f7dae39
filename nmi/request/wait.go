package request

import (
	"context"
	"errors"
	"fmt"
	"net/http"
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
	// MaxAssignmentWait is the upper limit of WaitConfig.MaxWait. The known client libraries keep a request open for at
	// least as long.
	MaxAssignmentWait = time.Minute

	// maxFailedWait is how long a request waits for an identity that MIC failed to attach. MIC retries only after a while,
	// but an operator may be correcting the cause at this moment.
	maxFailedWait = 2 * time.Second

	// propagationTime is the time after an assignment during which IMDS may not know the identity yet.
	propagationTime = time.Minute
	// Within propagationTime a request asks IMDS again after initialBackoff, then after twice the last wait, up to
	// maxBackoff.
	initialBackoff, maxBackoff = time.Second, 5 * time.Second

	// recheckInterval is the minimum time between two checks of a waiting request if the cause of the second check is a
	// change of an object that several pods share, such as a binding. It limits the load on the node when somebody
	// changes such objects continuously.
	recheckInterval = 100 * time.Millisecond
)

// Outcomes of a wait, for the metric.
const (
	WaitAssigned = "assigned" // the pod may use the identity
	WaitTimeout  = "timeout"  // the pod could not use the identity in time, or NMI stopped
	WaitRefused  = "refused"  // the request failed for another reason, for example because its binding was deleted
	WaitGone     = "gone"     // the client closed the connection
)

// WaitConfig has what requests need to wait for an assignment, in standard mode.
type WaitConfig struct {
	MaxWait       time.Duration // of one request
	Notifier      *cluster.Notifier
	AssignedSince func(*corev1.Pod, *identity.Identity) time.Time // the zero time if the identity is not assigned
	Stopping      <-chan struct{}                                 // is closed when NMI stops; waiting clients must retry then
	Limiter       *limit.Limiter
	Observe       func(outcome string, duration time.Duration)
}

// requestWait is the wait of one request. Only that request uses it.
type requestWait struct {
	*WaitConfig // nil in managed mode, in which no request waits
	source      limit.Source

	startedAt  time.Time // zero until the request waits
	checkedAt  time.Time // when the request last stopped waiting, to be checked again
	failedAt   time.Time // when the request first saw that MIC failed to attach the identity; zero if MIC has not failed
	authorized bool      // whether the last check granted the request
	outcome    string

	retryAt       time.Time // when the request may ask IMDS again
	backoff       time.Duration
	retryUpstream bool // it is time to ask IMDS again

	label string // binding label of the pod when the request subscribed
	// own notifies of changes of the pod and its assignments. shared notifies of changes of objects that several pods
	// share.
	own, shared <-chan struct{}
	unsubscribe []func()
}

// wait blocks a refused request until a check may have another result. It returns false if the request must end with
// the refusal: waiting is disabled or cannot change the refusal, no time is left, too many requests wait, NMI stops, or
// the client closed the connection.
func (w *requestWait) wait(ctx context.Context, auth authorization, refusal *metadata.Error) bool {
	if refusal.Reason != identity.AssignmentPending && refusal.Reason != identity.AssignmentFailed || !w.start() {
		return false
	}
	if w.subscribe(auth.pod) {
		return true // check again: a change after the last check and before the subscription sent no notification
	}
	now := time.Now()
	left := w.timeLeft(now, refusal.Reason)
	if left <= 0 {
		w.outcome = WaitTimeout
		return false
	}
	// If the decision is pending, the request waits for MIC. Otherwise IMDS refused the token, and notYetPropagated set
	// the reason AssignmentPending: the request waits until it may ask IMDS again.
	w.retryUpstream = false
	refusedByIMDS := auth.decision.Outcome != identity.Pending
	if refusedByIMDS {
		left = min(left, w.timeUntilRetry(now))
	}
	return w.block(ctx, now, left, refusedByIMDS)
}

// block waits for a notification, the timeout, or the end of the request. A notification of shared objects takes effect
// at the earliest recheckInterval after the last check. When the timeout ends the wait, block sets w.retryUpstream to
// retryUpstream. It returns false if the client closed the connection or NMI stops.
func (w *requestWait) block(ctx context.Context, now time.Time, timeout time.Duration, retryUpstream bool) bool {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	shared, recheck := w.shared, (<-chan time.Time)(nil)
	if early := recheckInterval - now.Sub(w.checkedAt); early > 0 {
		shared, recheck = nil, time.After(early)
	}
	defer func() { w.checkedAt = time.Now() }()
	for {
		select {
		case <-w.own:
			return true
		case <-shared:
			return true
		case <-recheck:
			shared, recheck = w.shared, nil
		case <-timer.C:
			w.retryUpstream = retryUpstream
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

// start reports whether the request may wait. The first call that returns true counts the request as waiting.
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

// subscribe subscribes to changes of the objects that the decision about the pod depends on. It returns false if the
// request already has this subscription.
func (w *requestWait) subscribe(pod *corev1.Pod) bool {
	label := pod.Labels[v1.BindingLabel]
	if w.unsubscribe != nil && w.label == label {
		return false
	}
	w.unsubscribeAll()
	own, unsubscribeOwn := w.Notifier.Subscribe(cluster.PodKey(pod.Namespace, pod.Name))
	shared, unsubscribeShared := w.Notifier.Subscribe(cluster.BindingsKey(label), cluster.ExceptionsKey(pod.Namespace), cluster.IdentitiesKey())
	w.label, w.own, w.shared, w.unsubscribe = label, own, shared, []func(){unsubscribeOwn, unsubscribeShared}
	return true
}

func (w *requestWait) unsubscribeAll() {
	for _, unsubscribe := range w.unsubscribe {
		unsubscribe()
	}
	w.unsubscribe = nil
}

// timeLeft returns how much longer a request that was refused for this reason may wait.
func (w *requestWait) timeLeft(now time.Time, reason identity.Reason) time.Duration {
	left := w.startedAt.Add(w.MaxWait).Sub(now)
	if reason != identity.AssignmentFailed {
		w.failedAt = time.Time{}
		return left
	}
	if w.failedAt.IsZero() {
		w.failedAt = now
	}
	return min(left, w.failedAt.Add(maxFailedWait).Sub(now))
}

// timeUntilRetry returns how long the request must wait until it asks IMDS again. If w.retryAt has passed, it sets the
// next such time.
func (w *requestWait) timeUntilRetry(now time.Time) time.Duration {
	if !now.Before(w.retryAt) {
		w.backoff = min(max(2*w.backoff, initialBackoff), maxBackoff)
		w.retryAt = now.Add(w.backoff)
	}
	return w.retryAt.Sub(now)
}

// finish ends the wait and records its outcome. Call it when the request ends.
func (w *requestWait) finish() {
	if w.startedAt.IsZero() {
		return
	}
	w.unsubscribeAll()
	w.Limiter.Release(w.source)
	switch {
	case w.outcome != "":
	case w.authorized:
		w.outcome = WaitAssigned
	default:
		w.outcome = WaitRefused
	}
	w.Observe(w.outcome, time.Since(w.startedAt))
}

// notYetPropagated turns a refusal of IMDS into an error with the reason AssignmentPending if the identity was assigned
// so recently that IMDS may not know it yet. It returns other errors unchanged.
func (p *Processor) notYetPropagated(pod *corev1.Pod, id *identity.Identity, err error) error {
	var e *token.Error
	if p.Wait == nil || id == nil || id.Kind != identity.UserAssigned || !errors.As(err, &e) ||
		e.Class != token.Denied || e.Status != http.StatusBadRequest || isResourceError(e) || time.Since(p.Wait.AssignedSince(pod, id)) >= propagationTime {
		return err
	}
	return &token.Error{Class: token.Unavailable, Reason: identity.AssignmentPending, RetryAfter: metadata.PendingRetryAfter, Err: err,
		Detail: fmt.Sprintf("AzureIdentity %s is assigned to the machine of pod %s/%s, but IMDS does not issue tokens for it (%s); NMI received the assignment less than a minute ago, so IMDS may not know the identity yet; retry", id.Key(), pod.Namespace, pod.Name, upstreamMessage(e))}
}
