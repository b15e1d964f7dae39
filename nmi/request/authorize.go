package request

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/token"
)

// authorization is the result of the decision: the keys of the tokens that the pod may have. There is one key, or one
// for each tenant of a service principal.
type authorization struct {
	pod      *corev1.Pod
	decision identity.Decision
	keys     []token.Key
}

// authorize decides about a request and returns the keys of its tokens.
func (p *Processor) authorize(ctx context.Context, pod *corev1.Pod, req metadata.Request) (authorization, *metadata.Error) {
	auth := authorization{pod: pod}
	var refusal *metadata.Error
	if auth.decision, refusal = p.decide(ctx, pod, req); refusal != nil {
		return auth, refusal
	}
	if auth.decision.Outcome != identity.Granted {
		if watch := p.Cluster.StaleWatch(); watch != "" {
			// The watch may not have received yet an object that changes the decision. Clients do not retry a refusal,
			// so they get an error that they retry.
			return auth, metadata.Unavailable(identity.NotReady, fmt.Sprintf("NMI's watch of %s is disconnected from the API server, or has just reconnected; according to the last known state, %s", watch, auth.decision.Detail), defaultRetryAfter)
		}
		return auth, metadata.Refusal(auth.decision)
	}
	if auth.decision.Reason == identity.Excepted {
		// An excepted pod gets tokens of the identities of the VM itself. The selector of the request names one of
		// them, or, if it is empty, means the VM's default identity.
		selector := req.Selector
		auth.keys = []token.Key{token.ManagedKey(selector.ClientID, selector.ObjectID, selector.ResourceID, req.Resource)}
		return auth, nil
	}
	principals, err := p.Principals.ForPod(ctx, pod, *auth.decision.Identity)
	if err != nil {
		return auth, upstreamError(auth.decision, err)
	}
	auth.keys = make([]token.Key, len(principals))
	for i, principal := range principals {
		auth.keys[i] = token.Key{Principal: principal, Resource: req.Resource}
	}
	return auth, nil
}

// decide asks package identity for the decision. A request with object_id also needs the object IDs of the pod's
// identities, which only the tokens of these identities contain.
func (p *Processor) decide(ctx context.Context, pod *corev1.Pod, req metadata.Request) (identity.Decision, *metadata.Error) {
	facts, err := p.Cluster.Facts(pod)
	if err != nil {
		return identity.Decision{}, metadata.Unavailable(identity.NotReady, "NMI cannot read the cluster's objects from its caches: "+err.Error(), time.Second)
	}
	subject := cluster.IdentityPod(pod)
	decision := identity.Decide(p.Rules, subject, req.Selector, facts)
	if req.Selector.ObjectID == "" || decision.Reason != identity.IdentityNotBound {
		return decision, nil
	}
	pending, failure := p.addObjectIDs(ctx, pod, req, facts)
	decision = identity.Decide(p.Rules, subject, req.Selector, facts)
	// If an identity has no token yet, its object ID is unknown, and it may be the requested identity. The response
	// then says why there is no token. "Not found" would be wrong, because clients do not retry it.
	switch {
	case decision.Reason != identity.IdentityNotBound:
	case pending != nil:
		return *pending, nil
	case failure != nil:
		return decision, upstreamError(decision, failure)
	}
	return decision, nil
}

// addObjectIDs adds object IDs to the identities in facts that are bound to the pod, until it finds the requested
// object ID. It uses the object IDs of earlier tokens first, so that an identity without an available token does not
// block requests for other identities. It requests no token of an identity that is not assigned yet; pending is the
// decision about the last such identity. failure is the error of the last identity whose token is not available.
func (p *Processor) addObjectIDs(ctx context.Context, pod *corev1.Pod, req metadata.Request, facts identity.Facts) (pending *identity.Decision, failure error) {
	subject := cluster.IdentityPod(pod)
	bound, _ := identity.Bound(p.Rules, subject, facts)
	var unknown, known []*identity.Identity
	for i := range facts.Identities {
		id := &facts.Identities[i]
		if !slices.ContainsFunc(bound, func(b identity.Identity) bool { return b.Key() == id.Key() }) || identity.Usable(p.Rules, *id) != nil {
			continue
		}
		objectID, ok := p.objectIDs.Get(p.Principals.FromIdentity(*id)[0])
		if !ok {
			unknown = append(unknown, id)
			continue
		}
		if id.ObjectID = objectID; strings.EqualFold(objectID, req.Selector.ObjectID) {
			return nil, nil
		}
		known = append(known, id) // fetched last: the cached object ID is outdated if the principal was created again
	}
	for _, id := range append(unknown, known...) {
		if p.Rules.Mode == identity.Standard {
			if decision := identity.Assigned(subject, id, facts.Assignments); decision != nil {
				pending = decision
				continue
			}
		}
		objectID, err := p.fetchObjectID(ctx, pod, *id, req.Resource)
		if err != nil {
			failure = p.notYetPropagated(pod, id, err)
			continue
		}
		p.objectIDs.Add(p.Principals.FromIdentity(*id)[0], objectID)
		if id.ObjectID = objectID; strings.EqualFold(objectID, req.Selector.ObjectID) {
			return nil, nil
		}
	}
	return pending, failure
}

// fetchObjectID gets a token of an identity that is bound to the pod, and returns the object ID in the token.
func (p *Processor) fetchObjectID(ctx context.Context, pod *corev1.Pod, id identity.Identity, resource string) (string, error) {
	principals, err := p.Principals.ForPod(ctx, pod, id)
	if err != nil {
		return "", err
	}
	got, _, err := p.Cache.Get(ctx, token.Request{Key: token.Key{Principal: principals[0], Resource: resource}, Pod: string(pod.UID)})
	return got.ObjectID, err
}

// MayRenew reports whether the cache may renew tokens of a principal for a pod. It does not block.
func (p *Processor) MayRenew(pod *corev1.Pod, principal token.Principal) bool {
	facts, err := p.Cluster.Facts(pod)
	if err != nil {
		return true // nothing shows that the pod may not have the tokens
	}
	subject := cluster.IdentityPod(pod)
	bound, refusal := identity.Bound(p.Rules, subject, facts)
	if refusal == nil {
		for i := range bound {
			if p.Principals.Matches(bound[i], principal) && (p.Rules.Mode != identity.Standard || identity.Assigned(subject, &bound[i], facts.Assignments) == nil) {
				return true
			}
		}
	}
	return identity.IsExcepted(p.Rules, subject, facts) && principal.Source == token.Managed
}
