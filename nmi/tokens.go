package nmi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/token"
)

// tokens answers the question of a pod for a token.
type tokens struct {
	pods    *podFinder
	facts   func(*corev1.Pod) (identity.Facts, error)
	ready   func(context.Context, time.Duration) error // nil once all caches have been filled; waits that long
	rules   identity.Rules
	cache   *token.Cache
	metrics *metrics
}

// caller is who asked and what was found out about it, for the log.
type caller struct {
	pod      *corev1.Pod
	identity *identity.Identity
	reason   identity.Reason // of a request that is granted
	origin   token.Origin
}

// get goes the way of a request: pod, decision, token. It fills in the caller as far as it comes.
func (t *tokens) get(ctx context.Context, who *caller, source netip.Addr, req metadata.Request) (metadata.TokenAnswer, *metadata.Error) {
	var none metadata.TokenAnswer
	pod, refusal := t.findPod(ctx, source)
	if refusal != nil {
		return none, refusal
	}
	who.pod = pod
	decision, refusal := t.decide(ctx, pod, req)
	if refusal != nil {
		return none, refusal
	}
	who.identity = decision.Identity
	if decision.Outcome != identity.Granted {
		return none, metadata.Refusal(decision)
	}
	key, refusal := keyFor(decision, req)
	if refusal != nil {
		return none, refusal
	}
	got, origin, err := t.cache.Get(ctx, token.Request{Key: key, Pod: string(pod.UID), Fresh: req.Bypass, Rejected: req.Rejected})
	who.origin = origin
	if err != nil {
		return none, sourceFailed(decision, err)
	}
	who.reason = decision.Reason
	answer := metadata.TokenAnswer{
		AccessToken: got.AccessToken,
		ClientID:    got.ClientID,
		Resource:    req.Resource,
		ExpiresOn:   got.ExpiresOn,
		NotBefore:   got.NotBefore,
		Lifetime:    got.ExpiresOn.Sub(got.Fetched),
	}
	if decision.Identity != nil {
		answer.ClientID = decision.Identity.ClientID
	}
	return answer, nil
}

// findPod names the pod behind the address, within the time that lookups have.
func (t *tokens) findPod(ctx context.Context, source netip.Addr) (*corev1.Pod, *metadata.Error) {
	start := time.Now()
	defer func() { t.metrics.lookups.Observe(time.Since(start).Seconds()) }()
	if err := t.ready(ctx, t.pods.timeout); err != nil {
		return nil, metadata.Unavailable(identity.NotReady, "NMI has not loaded the cluster's objects yet: "+err.Error(), 2*time.Second)
	}
	pod, err := t.pods.find(ctx, source)
	switch {
	case err == nil:
		return pod, nil
	case errors.Is(err, errPodAmbiguous):
		return nil, metadata.Unavailable(identity.PodAmbiguous, fmt.Sprintf("Several pods of this node have the address %s; as long as that is so none of them gets a token", source), 2*time.Second)
	default:
		return nil, metadata.Unavailable(identity.PodUnknown, fmt.Sprintf("No pod with the address %s is known on this node yet; a pod in the host's network has no address of its own", source), 2*time.Second)
	}
}

// decide asks the one decision. Only a request by object_id needs more than the objects: the object IDs of the pod's
// own identities, which their tokens tell.
func (t *tokens) decide(ctx context.Context, pod *corev1.Pod, req metadata.Request) (identity.Decision, *metadata.Error) {
	facts, err := t.facts(pod)
	if err != nil {
		return identity.Decision{}, metadata.Unavailable(identity.NotReady, err.Error(), time.Second)
	}
	subject := identity.Pod{Namespace: pod.Namespace, Name: pod.Name, Labels: pod.Labels}
	decision := identity.Decide(t.rules, subject, req.Selector, facts)
	if req.Selector.ObjectID == "" || decision.Reason != identity.IdentityNotBound {
		return decision, nil
	}
	bound, _ := identity.Bound(t.rules, subject, facts)
	var failed error
	for i := range facts.Identities {
		id := &facts.Identities[i]
		if !contains(bound, *id) || id.Kind != identity.UserAssigned || id.Problem() != "" {
			continue
		}
		got, _, err := t.cache.Get(ctx, token.Request{Key: token.ManagedKey(id.ClientID, "", "", req.Resource), Pod: string(pod.UID)})
		if err != nil {
			failed = err
			continue
		}
		id.ObjectID = got.ObjectID
	}
	decision = identity.Decide(t.rules, subject, req.Selector, facts)
	if decision.Outcome != identity.Granted && failed != nil {
		// It may be the one whose token could not be had; "not found" would be final.
		return decision, sourceFailed(decision, failed)
	}
	return decision, nil
}

func contains(ids []identity.Identity, id identity.Identity) bool {
	for _, i := range ids {
		if i.Key() == id.Key() {
			return true
		}
	}
	return false
}

// keyFor says which token the decision stands for. An excepted pod is served by the machine's own identities, so there
// the request's selector names one of them.
func keyFor(d identity.Decision, req metadata.Request) (token.Key, *metadata.Error) {
	if d.Reason == identity.Excepted {
		return token.ManagedKey(req.Selector.ClientID, req.Selector.ObjectID, req.Selector.ResourceID, req.Resource), nil
	}
	if d.Identity.Kind != identity.UserAssigned {
		return token.Key{}, metadata.Refusal(identity.Decision{Reason: identity.TypeNotServed,
			Detail: fmt.Sprintf("AzureIdentity %s is of type %d; this version of NMI gets tokens for type 0 (user-assigned managed identity) only", d.Identity.Key(), d.Identity.Kind)})
	}
	return token.ManagedKey(d.Identity.ClientID, "", "", req.Resource), nil
}

// sourceFailed turns a failure of the source into the answer that makes clients do the right thing: come again, or go
// on to their next credential.
func sourceFailed(d identity.Decision, err error) *metadata.Error {
	if errors.Is(err, token.ErrPodThrottled) {
		return metadata.Throttled(identity.PodThrottled, "This pod asks for new tokens too often", time.Second)
	}
	var e *token.Error
	if !errors.As(err, &e) || e.Class == token.Unavailable {
		answer := metadata.Unavailable(identity.UpstreamUnavailable, "The metadata service of the machine gives no token at the moment", 2*time.Second)
		answer.Detail = err.Error()
		return answer
	}
	if e.Class == token.Throttled {
		return metadata.Throttled(identity.UpstreamThrottled, "The metadata service of the machine throttles this node", e.RetryAfter)
	}
	status := http.StatusForbidden
	if e.Status == http.StatusBadRequest {
		status = http.StatusBadRequest
	}
	answer := metadata.Passed(status, e.Code, e.Description)
	if e.Status == 0 {
		answer.Description = e.Error()
	}
	if d.Identity != nil {
		answer.Detail = fmt.Sprintf("The metadata service of the machine refused a token for AzureIdentity %s; see that the managed identity with its clientID exists and is assigned to the machine or scale set of this node, and that the resource is right", d.Identity.Key())
	}
	return answer
}
