package request

import (
	"context"
	"net/netip"
	"slices"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/limit"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// Cluster is what a token request reads of the cluster.
type Cluster interface {
	// WaitSynced returns nil when all caches have synced, or an error after the timeout or when ctx ends.
	WaitSynced(ctx context.Context, timeout time.Duration) error
	// Facts returns the objects that the decision about a pod needs.
	Facts(pod *corev1.Pod) (identity.Facts, error)
	// Latest returns the current state of a pod.
	Latest(pod *corev1.Pod) *corev1.Pod
	// StaleWatch returns the name of a watch whose cache may be outdated, or "".
	StaleWatch() string
}

// Config has what a Processor uses.
type Config struct {
	Rules            identity.Rules
	Cluster          Cluster
	Pods             *cluster.PodFinder
	PodLookupTimeout time.Duration // how long a request waits for the caches to sync; Pods has its own timeout
	PodVerification  PodVerification
	// Confirmer confirms the address of a caller whose cgroup is unknown. It is not used with VerifyOff.
	Confirmer cluster.Confirmer
	// OnMoved is called when the cgroup says that the caller is pod, while the API server reports the caller's address as
	// that of other pods, or of none.
	OnMoved    func(caller Caller, pod *corev1.Pod)
	Principals *credentials.Principals
	Cache      *token.Cache
	Metrics    *telemetry.Metrics
	Wait       *WaitConfig // nil in managed mode
}

// Processor processes token requests. It is safe for concurrent use.
type Processor struct {
	Config
	objectIDs *lru.Cache[token.Principal, string] // from earlier tokens; the keys come from Principals.FromIdentity
}

// maxObjectIDs bounds the cached object IDs. A node needs one for each identity of the pods that request tokens by
// object ID.
const maxObjectIDs = 1024

// New returns a Processor.
func New(c Config) (*Processor, error) {
	objectIDs, err := lru.New[token.Principal, string](maxObjectIDs)
	return &Processor{Config: c, objectIDs: objectIDs}, err
}

// Record is what the log needs of a request. A request fills in the fields as it proceeds, so a refused request leaves
// some of them empty.
type Record struct {
	Pod      *corev1.Pod
	Identity *identity.Identity
	Reason   identity.Reason // of a granted request
	Origin   token.Origin
	// Verified is how NMI found the pod of a request that the pod sent itself.
	Verified Verification
	// TokenID and CorrelationID identify the token, or the refusal, in the logs of Entra ID.
	TokenID, CorrelationID string
}

// ForCaller returns the tokens for the pod that opened the connection.
func (p *Processor) ForCaller(ctx context.Context, rec *Record, caller Caller, req metadata.Request) ([]metadata.TokenResponse, *metadata.Error) {
	pod, refusal := p.findCaller(ctx, rec, caller)
	if refusal != nil {
		return nil, refusal
	}
	tokens, refusal := p.forPod(ctx, rec, caller.Source(), pod, req)
	if refusal == nil && rec.Verified == VerifiedByAddress {
		refusal = p.confirmAgain(caller, pod)
	}
	if refusal != nil {
		return nil, refusal
	}
	return tokens, nil
}

// ForPodName returns the tokens for the pod that the request names. The caller must have checked that the client may
// name a pod. source is the address of the client.
func (p *Processor) ForPodName(ctx context.Context, rec *Record, source netip.Addr, req metadata.Request) ([]metadata.TokenResponse, *metadata.Error) {
	pod, refusal := p.findPod(ctx, podQuery{name: req.PodNamespace + "/" + req.PodName})
	if refusal != nil {
		return nil, refusal
	}
	return p.forPod(ctx, rec, limit.Source{Address: source}, pod, req)
}

// maxRounds is how often a request may fetch its tokens without a usable result before NMI gives up. A result is not
// usable if the authorization changed during the fetch. The first result is also not usable if the fetch may have
// failed because of another pod.
const maxRounds = 3

// forPod authorizes the request and gets the tokens. It returns cached tokens at once. A fetch takes time, in which a
// binding may be deleted or a Secret replaced. So forPod authorizes the request again after a fetch and returns only
// tokens of the current authorization. In standard mode it waits, for a limited time, for an identity that MIC is
// assigning, and for IMDS to learn of a new assignment.
func (p *Processor) forPod(ctx context.Context, rec *Record, source limit.Source, pod *corev1.Pod, req metadata.Request) ([]metadata.TokenResponse, *metadata.Error) {
	rec.Pod = pod
	w := requestWait{WaitConfig: p.Wait, source: source}
	defer w.finish()
	auth, refusal := p.authorizeOrWait(ctx, &w, pod, req)
	for round := 0; round < maxRounds; {
		rec.Identity = auth.decision.Identity
		if refusal != nil {
			return nil, refusal
		}
		tokens, fetched, failure := p.fetchTokens(ctx, rec, auth, req, w.retryUpstream)
		retry := failure != nil && w.wait(ctx, auth, failure)
		if !fetched && !retry {
			return tokens, failure
		}
		before := auth
		auth, refusal = p.authorizeOrWait(ctx, &w, p.Cluster.Latest(auth.pod), req)
		if retry {
			continue
		}
		// The request of another pod may have started the fetch, and the fetch may have failed because of that pod. Then
		// a second fetch, for this pod, can succeed.
		otherPodFailed := failure != nil && failure.Reason == identity.PodStale && round == 0
		if refusal == nil && slices.Equal(auth.keys, before.keys) && !otherPodFailed {
			return tokens, failure
		}
		round++
	}
	if refusal != nil {
		return nil, refusal
	}
	return nil, metadata.Unavailable(identity.NotReady, "The objects that this request depends on, such as the AzureIdentity, its binding or its Secret, changed several times while NMI fetched the token; retry", time.Second)
}

// authorizeOrWait authorizes a request. If it is refused and a wait can change that, authorizeOrWait waits and
// authorizes the request again.
func (p *Processor) authorizeOrWait(ctx context.Context, w *requestWait, pod *corev1.Pod, req metadata.Request) (authorization, *metadata.Error) {
	auth, refusal := p.authorize(ctx, pod, req)
	for refusal != nil && w.wait(ctx, auth, refusal) {
		auth, refusal = p.authorize(ctx, p.Cluster.Latest(auth.pod), req)
	}
	w.authorized = refusal == nil
	return auth, refusal
}
