package request

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// Cluster is what a request needs to know of the cluster.
type Cluster interface {
	// Facts are what the decision about a pod needs to know.
	Facts(*corev1.Pod) (identity.Facts, error)
	// Latest is the pod as it is known now.
	Latest(*corev1.Pod) *corev1.Pod
	// Stale names a watch that hears nothing at the moment, or is "".
	StaleWatch() string
}

// Config is what a token request needs.
type Config struct {
	Rules            identity.Rules
	Pods             *cluster.PodFinder
	PodLookupTimeout time.Duration // how long a request waits for its pod to become known
	Cluster          Cluster
	Ready            func(context.Context, time.Duration) error // nil once all caches have been filled; waits that long
	Principals       *credentials.Principals
	Cache            *token.Cache
	Metrics          *telemetry.Metrics
	Wait             *WaitConfig // nil in managed mode
}

// Processor answers the question of a pod for a token.
type Processor struct {
	Config
	objectIDs *lru.Cache[token.Principal, string] // as tokens have told them, by outline
}

// New returns what answers requests.
func New(c Config) (*Processor, error) {
	objectIDs, err := lru.New[token.Principal, string](objectIDsKept)
	return &Processor{Config: c, objectIDs: objectIDs}, err
}

// objectIDsKept bounds what is remembered of object IDs; a node needs as many as identities whose pods ask by them.
const objectIDsKept = 1024

// Caller is who asked and what was found out about it, for the log.
type Caller struct {
	Pod      *corev1.Pod
	Identity *identity.Identity
	Reason   identity.Reason // of a request that is granted
	Origin   token.Origin
	// TokenID and CorrelationID are what Entra ID's logs know the token, or the refusal, by.
	TokenID, CorrelationID string
}

// ForAddress goes the way of a request: pod, decision, token. It fills in the caller as far as it comes.
func (p *Processor) ForAddress(ctx context.Context, who *Caller, source netip.Addr, req metadata.Request) ([]metadata.TokenResponse, *metadata.Error) {
	pod, refusal := p.findPod(ctx, podQuery{address: source})
	if refusal != nil {
		return nil, refusal
	}
	return p.forPod(ctx, who, source, pod, req)
}

// podQuery is what a pod is known by: its address, or its name (namespace/name).
type podQuery struct {
	address netip.Addr
	name    string
}

func (q podQuery) String() string {
	if q.name != "" {
		return "name " + q.name
	}
	return "address " + q.address.String()
}

// findPod names the pod that is asked for, within the time that lookups have.
func (p *Processor) findPod(ctx context.Context, by podQuery) (*corev1.Pod, *metadata.Error) {
	start := time.Now()
	defer func() { p.Metrics.PodLookups.Observe(time.Since(start).Seconds()) }()
	if err := p.Ready(ctx, p.PodLookupTimeout); err != nil {
		return nil, metadata.Unavailable(identity.NotReady, "NMI has not loaded the cluster's objects yet: "+err.Error(), 2*time.Second)
	}
	var pod *corev1.Pod
	var err error
	if by.name != "" {
		pod, err = p.Pods.FindByName(ctx, by.name)
	} else {
		pod, err = p.Pods.FindByAddress(ctx, by.address)
	}
	switch {
	case err == nil:
		return pod, nil
	case errors.Is(err, cluster.ErrPodAmbiguous):
		return nil, metadata.Unavailable(identity.PodAmbiguous, fmt.Sprintf("Several pods of this node have the %s; as long as that is so none of them gets a token", by), 2*time.Second)
	default:
		return nil, metadata.Unavailable(identity.PodUnknown, fmt.Sprintf("No living pod with the %s is known on this node", by), 2*time.Second)
	}
}

// maxRounds is how often a request begins anew because what it was granted for has changed while it waited.
const maxRounds = 3

// forPod decides and gets the tokens. What was decided holds for an answer at once; a fetch takes time, in which a
// binding may go or a Secret be replaced, so after one it is decided again, and only an answer to what holds then goes
// out. In standard mode the request waits, within its time, for an identity that is being assigned, and for the machine's
// metadata service to hear of that.
func (p *Processor) forPod(ctx context.Context, who *Caller, source netip.Addr, pod *corev1.Pod, req metadata.Request) ([]metadata.TokenResponse, *metadata.Error) {
	who.Pod = pod
	w := requestWait{WaitConfig: p.Wait, source: source}
	defer w.finish()
	g, refusal := p.authorizeOrWait(ctx, &w, pod, req)
	for round := 0; round < maxRounds; {
		who.Identity = g.decision.Identity
		if refusal != nil {
			return nil, refusal
		}
		answers, waited, failed := p.fetchTokens(ctx, who, g, req, w.retryUpstream)
		later := failed != nil && w.wait(ctx, g, failed)
		if !waited && !later {
			return answers, failed
		}
		before := g
		g, refusal = p.authorizeOrWait(ctx, &w, p.Cluster.Latest(g.pod), req)
		if later {
			continue
		}
		// A fetch that was shared may have failed for the pod that it was made by way of.
		again := failed != nil && failed.Reason == identity.PodStale && round == 0
		if refusal == nil && slices.Equal(g.keys, before.keys) && !again {
			return answers, failed
		}
		round++
	}
	if refusal != nil {
		return nil, refusal
	}
	return nil, metadata.Unavailable(identity.NotReady, "The objects around this pod change all the time", time.Second)
}

// authorizeOrWait is grant for a request that may wait.
func (p *Processor) authorizeOrWait(ctx context.Context, w *requestWait, pod *corev1.Pod, req metadata.Request) (authorization, *metadata.Error) {
	g, refusal := p.authorize(ctx, pod, req)
	for refusal != nil && w.wait(ctx, g, refusal) {
		g, refusal = p.authorize(ctx, p.Cluster.Latest(g.pod), req)
	}
	w.granted = refusal == nil
	return g, refusal
}

// authorization is what a pod may have: the keys of its tokens, one but for a service principal of several tenants.
type authorization struct {
	pod      *corev1.Pod
	decision identity.Decision
	keys     []token.Key
}

// authorize retriesUpstream the one decision, and says which tokens that stands for.
func (p *Processor) authorize(ctx context.Context, pod *corev1.Pod, req metadata.Request) (authorization, *metadata.Error) {
	g := authorization{pod: pod}
	var refusal *metadata.Error
	if g.decision, refusal = p.decide(ctx, pod, req); refusal != nil {
		return g, refusal
	}
	if g.decision.Outcome != identity.Granted {
		if watch := p.Cluster.StaleWatch(); watch != "" {
			// What it says is not there may be what the watch has not heard of yet. A refusal would be final.
			return g, metadata.Unavailable(identity.NotReady, fmt.Sprintf("NMI hears nothing from the API server about %s at the moment; as far as it knows %s", watch, g.decision.Detail), 2*time.Second)
		}
		return g, metadata.Refusal(g.decision)
	}
	if g.decision.Reason == identity.Excepted {
		// Such a pod is served by the machine's own identities, so the request's selector names one of them.
		want := req.Selector
		g.keys = []token.Key{token.ManagedKey(want.ClientID, want.ObjectID, want.ResourceID, req.Resource)}
		return g, nil
	}
	principals, err := p.Principals.ForPod(ctx, pod, *g.decision.Identity)
	if err != nil {
		return g, upstreamError(g.decision, err)
	}
	g.keys = make([]token.Key, len(principals))
	for i, principal := range principals {
		g.keys[i] = token.Key{Principal: principal, Resource: req.Resource}
	}
	return g, nil
}

// fetchTokens gets the tokens of a grant. again is to ask although there was a no a moment ago. waited is false if all of them,
// or the failure, were at hand.
func (p *Processor) fetchTokens(ctx context.Context, who *Caller, g authorization, req metadata.Request, again bool) (answers []metadata.TokenResponse, waited bool, refusal *metadata.Error) {
	answers = make([]metadata.TokenResponse, len(g.keys))
	for i, key := range g.keys {
		got, origin, err := p.Cache.Get(ctx, token.Request{Key: key, Pod: string(g.pod.UID), Fresh: req.Bypass, Rejected: req.Rejected, Recheck: again})
		who.Origin = origin
		waited = waited || origin == token.Fetched || origin == token.Shared
		if err != nil {
			who.TokenID, who.CorrelationID = "", "" // of a first tenant's token, which nobody gets
			var e *token.Error
			if errors.As(err, &e) {
				who.CorrelationID = e.CorrelationID
			}
			return nil, waited, upstreamError(g.decision, p.notYetPropagated(g.pod, g.decision.Identity, err))
		}
		if i == 0 {
			who.TokenID, who.CorrelationID = got.ID, got.CorrelationID
		}
		answers[i] = metadata.TokenResponse{
			AccessToken: got.AccessToken,
			ClientID:    got.ClientID,
			Resource:    req.Resource,
			ExpiresOn:   got.ExpiresOn,
			NotBefore:   got.NotBefore,
			Lifetime:    got.ExpiresOn.Sub(got.Fetched),
		}
		if g.decision.Identity != nil {
			answers[i].ClientID = g.decision.Identity.ClientID
		}
	}
	who.Reason = g.decision.Reason
	return answers, waited, nil
}

// decide retriesUpstream the one decision. Only a request by object_id needs more than the objects: the object IDs of the pod's
// own identities, which their tokens tell.
func (p *Processor) decide(ctx context.Context, pod *corev1.Pod, req metadata.Request) (identity.Decision, *metadata.Error) {
	facts, err := p.Cluster.Facts(pod)
	if err != nil {
		return identity.Decision{}, metadata.Unavailable(identity.NotReady, err.Error(), time.Second)
	}
	subject := cluster.IdentityPod(pod)
	decision := identity.Decide(p.Rules, subject, req.Selector, facts)
	if req.Selector.ObjectID == "" || decision.Reason != identity.IdentityNotBound {
		return decision, nil
	}
	pending, failed := p.learnObjectIDs(ctx, pod, req, facts)
	decision = identity.Decide(p.Rules, subject, req.Selector, facts)
	// It may be one whose token could not be had; "not found" would be final.
	switch {
	case decision.Reason != identity.IdentityNotBound:
	case pending != nil:
		return *pending, nil
	case failed != nil:
		return decision, upstreamError(decision, failed)
	}
	return decision, nil
}

// learnObjectIDs fills in the object IDs of the identities that are bound to the pod, until the one that is asked for is
// among them. What earlier tokens told is looked at first, so that an identity whose tokens cannot be had at the moment
// does not stand in the way of the others. No token of an identity is asked for that is not assigned yet: then it is
// pending which one is meant.
func (p *Processor) learnObjectIDs(ctx context.Context, pod *corev1.Pod, req metadata.Request, facts identity.Facts) (pending *identity.Decision, failed error) {
	bound, _ := identity.Bound(p.Rules, cluster.IdentityPod(pod), facts)
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
		known = append(known, id) // an application that was made anew has another
	}
	for _, id := range append(unknown, known...) {
		if p.Rules.Mode == identity.Standard {
			if wait := identity.Assigned(cluster.IdentityPod(pod), id, facts.Assignments); wait != nil {
				pending = wait
				continue
			}
		}
		objectID, err := p.objectID(ctx, pod, *id, req.Resource)
		if err != nil {
			failed = p.notYetPropagated(pod, id, err)
			continue
		}
		p.objectIDs.Add(p.Principals.FromIdentity(*id)[0], objectID)
		if id.ObjectID = objectID; strings.EqualFold(objectID, req.Selector.ObjectID) {
			return nil, nil
		}
	}
	return pending, failed
}

// objectID reads the object ID of an identity that is bound to the pod off a token of it.
func (p *Processor) objectID(ctx context.Context, pod *corev1.Pod, id identity.Identity, resource string) (string, error) {
	principals, err := p.Principals.ForPod(ctx, pod, id)
	if err != nil {
		return "", err
	}
	got, _, err := p.Cache.Get(ctx, token.Request{Key: token.Key{Principal: principals[0], Resource: resource}, Pod: string(pod.UID)})
	return got.ObjectID, err
}

// ForPodName is the way of a request that names its pod.
func (p *Processor) ForPodName(ctx context.Context, who *Caller, source netip.Addr, req metadata.Request) ([]metadata.TokenResponse, *metadata.Error) {
	pod, refusal := p.findPod(ctx, podQuery{name: req.PodNamespace + "/" + req.PodName})
	if refusal != nil {
		return nil, refusal
	}
	return p.forPod(ctx, who, source, pod, req)
}
