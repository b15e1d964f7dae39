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
	// failedWait is how long a request waits for an identity that Azure has refused to attach. MIC tries again only
	// after a while, but an operator may be putting it right at this moment.
	failedWait = 2 * time.Second

	// MaxAssignmentWait is what client libraries give one request at least; they would not hear a later answer.
	MaxAssignmentWait = time.Minute

	// settling is how long after an assignment the machine's metadata service may not have heard of it.
	settling = time.Minute
	// In that time it is asked again after askFirst, then after twice that, and so on up to askMost.
	askFirst, askMost = time.Second, 5 * time.Second

	// lookEvery spaces the looks of one request at objects that it shares with other pods, so that whoever edits those
	// all the time does not keep the node busy.
	lookEvery = 100 * time.Millisecond
)

// Outcomes of waiting, for the metric.
const (
	WaitAssigned = "assigned" // the pod may have the identity
	WaitTimeout  = "timeout"  // it was not assigned in time, or NMI stopped
	WaitRefused  = "refused"  // meanwhile the objects say no
	WaitGone     = "gone"     // the client left
)

// Waiting holds requests of pods whose identity is on its way to the machine, in standard mode.
type Waiting struct {
	Most          time.Duration // that one request is held
	News          *cluster.News
	AssignedSince func(*corev1.Pod, *identity.Identity) time.Time // since when it is known; zero if it is not assigned
	Ending        <-chan struct{}                                 // closed when NMI stops: who waits then is to come again
	Places        *limit.Places
	Observe       func(outcome string, took time.Duration)
}

// hold is how one request waits. It is used by that request alone.
type hold struct {
	*Waiting // nil in managed mode, where there is nothing to wait for
	source   netip.Addr

	began   time.Time // zero until it waits
	looked  time.Time // when it waited last
	failing time.Time // since when Azure refuses the identity; zero if it does not
	asked   time.Time // when the metadata service is to be asked again
	pause   time.Duration
	again   bool // it is time to ask it
	granted bool // at the last look
	outcome string

	label       string // of the pod, when the topics were chosen
	own, shared <-chan struct{}
	stops       []func()
}

// wait holds a request that was told no until it is worth looking again. It reports false if the no is not one that
// passes, or once there is no time left.
func (h *hold) wait(ctx context.Context, g grant, refusal *metadata.Error) bool {
	if refusal.Reason != identity.AssignmentPending && refusal.Reason != identity.AssignmentFailed || !h.begin() {
		return false
	}
	if h.follow(g.pod) {
		return true // what changed before nobody has told
	}
	now := time.Now()
	left := h.left(now, refusal.Reason)
	if left <= 0 {
		h.outcome = WaitTimeout
		return false
	}
	// If the decision does not say to wait, the metadata service did.
	h.again = false
	asks := g.decision.Outcome != identity.Pending
	if asks {
		left = min(left, h.untilAsked(now))
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	shared, spaced := h.shared, (<-chan time.Time)(nil)
	if early := lookEvery - now.Sub(h.looked); early > 0 {
		shared, spaced = nil, time.After(early)
	}
	defer func() { h.looked = time.Now() }()
	for {
		select {
		case <-h.own:
			return true
		case <-shared:
			return true
		case <-spaced:
			shared, spaced = h.shared, nil
		case <-timer.C:
			h.again = asks
			return true
		case <-h.Ending:
			h.outcome = WaitTimeout
			return false
		case <-ctx.Done():
			h.outcome = WaitGone
			return false
		}
	}
}

// begin reports whether the request may wait, and notes that it does.
func (h *hold) begin() bool {
	if !h.began.IsZero() {
		return true
	}
	if h.Waiting == nil || h.Most == 0 || !h.Places.Take(h.source) {
		return false
	}
	h.began = time.Now()
	return true
}

// follow sees to it that news of what the decision about the pod rests on wakes the request. It reports true if it did
// not before.
func (h *hold) follow(pod *corev1.Pod) bool {
	label := pod.Labels[v1.BindingLabel]
	if h.stops != nil && h.label == label {
		return false
	}
	h.unfollow()
	own, stopOwn := h.News.Read(cluster.OfPod(pod.Namespace, pod.Name))
	shared, stopShared := h.News.Read(cluster.OfBindings(label), cluster.OfExceptions(pod.Namespace), cluster.OfIdentities())
	h.label, h.own, h.shared, h.stops = label, own, shared, []func(){stopOwn, stopShared}
	return true
}

func (h *hold) unfollow() {
	for _, stop := range h.stops {
		stop()
	}
	h.stops = nil
}

// left is how long the request may still wait for this reason.
func (h *hold) left(now time.Time, why identity.Reason) time.Duration {
	left := h.began.Add(h.Most).Sub(now)
	if why != identity.AssignmentFailed {
		h.failing = time.Time{}
		return left
	}
	if h.failing.IsZero() {
		h.failing = now
	}
	return min(left, h.failing.Add(failedWait).Sub(now))
}

// untilAsked is how long it is until the metadata service is to be asked again.
func (h *hold) untilAsked(now time.Time) time.Duration {
	if !now.Before(h.asked) {
		h.pause = min(max(2*h.pause, askFirst), askMost)
		h.asked = now.Add(h.pause)
	}
	return h.asked.Sub(now)
}

// end has to be called when the request is done with.
func (h *hold) end() {
	if h.began.IsZero() {
		return
	}
	h.unfollow()
	h.Places.GiveBack(h.source)
	switch {
	case h.outcome != "":
	case h.granted:
		h.outcome = WaitAssigned
	default:
		h.outcome = WaitRefused
	}
	h.Observe(h.outcome, time.Since(h.began))
}

// unheardOf makes of the metadata service's no one that passes, while the identity was assigned so lately that the
// service may not have heard of it. Other failures it returns as they are.
func (t *Tokens) unheardOf(pod *corev1.Pod, id *identity.Identity, err error) error {
	var e *token.Error
	if t.Waiting == nil || id == nil || id.Kind != identity.UserAssigned || !errors.As(err, &e) ||
		e.Class != token.Denied || e.Status != http.StatusBadRequest || aboutResource(e) || time.Since(t.Waiting.AssignedSince(pod, id)) >= settling {
		return err
	}
	return &token.Error{Class: token.Unavailable, Reason: identity.AssignmentPending, RetryAfter: metadata.AfterPending, Err: err,
		Detail: fmt.Sprintf("AzureIdentity %s was assigned to the machine of pod %s/%s a moment ago, and the metadata service of the machine does not give a token for it yet: %s", id.Key(), pod.Namespace, pod.Name, whatWasSaid(e))}
}
