package credentials

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/token"
)

// Entra ID takes Kubernetes tokens of this audience in exchange for its own.
const exchangeAudience = "api://AzureADTokenExchange"

const (
	// assertionLife is the shortest that the API server gives.
	assertionLife = 10 * time.Minute
	// assertionSpare is how much of it has to be left for an exchange.
	assertionSpare = time.Minute

	assertionTimeout = 5 * time.Second

	// refusedFor is how long a no of the API server is kept, so that pods that come again at once do not all reach it.
	refusedFor = 3 * time.Second
)

// Assertions gets tokens of the ServiceAccounts of this node's pods from the API server, to be exchanged at Entra ID.
//
// Each is bound to the pod that it is for, by name and UID: the API server gives none for a pod that is gone, or that
// runs with another ServiceAccount. So each of them is a second opinion on who calls, and every pod needs one of its own
// before it is handed a token, also where others have brought that into the cache already.
type Assertions struct {
	request func(ctx context.Context, namespace, serviceAccount string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)
	pod     func(uid string) (*corev1.Pod, bool)

	mu      sync.Mutex
	held    map[string]*assertion // by UID of the pod
	vouched map[string]struct{}   // UIDs of pods that there was one for, and no word against since
}

// assertion is one pod's. Its fields but done are to be read once done is closed.
type assertion struct {
	account token.Ref
	done    chan struct{}
	token   string
	expires time.Time // of the token, or of the error
	err     error
}

func NewAssertions(request func(context.Context, string, string, *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error), pod func(string) (*corev1.Pod, bool)) *Assertions {
	return &Assertions{request: request, pod: pod, held: map[string]*assertion{}, vouched: map[string]struct{}{}}
}

// attest returns nil once the API server has vouched for the pod. Once is enough: the cache of pods tells when it has gone,
// and a server that is away later has said nothing against it.
func (a *Assertions) attest(ctx context.Context, pod *corev1.Pod) error {
	a.mu.Lock()
	_, vouched := a.vouched[string(pod.UID)]
	a.mu.Unlock()
	if vouched {
		return nil
	}
	_, err := a.get(ctx, pod)
	return err
}

// Assertion implements [token.Assertions].
func (a *Assertions) Assertion(ctx context.Context, uid string, serviceAccount token.Ref) (string, error) {
	a.mu.Lock()
	held := a.held[uid]
	a.mu.Unlock()
	if held != nil && held.account == serviceAccount && !held.over() {
		// Also of a pod that the API server has told of and the watch has not yet.
		return held.wait(ctx)
	}
	pod, ok := a.pod(uid)
	if !ok {
		return "", stale(fmt.Sprintf("The pod with UID %s is not on this node any more", uid), nil)
	}
	if ServiceAccountOf(pod) != serviceAccount {
		return "", stale(fmt.Sprintf("Pod %s/%s does not run as ServiceAccount %s", pod.Namespace, pod.Name, serviceAccount), nil)
	}
	return a.get(ctx, pod)
}

// get returns the pod's assertion, asking for one together with all who want it at the same time.
func (a *Assertions) get(ctx context.Context, pod *corev1.Pod) (string, error) {
	uid := string(pod.UID)
	a.mu.Lock()
	held := a.held[uid]
	if held == nil || held.over() {
		held = &assertion{account: ServiceAccountOf(pod), done: make(chan struct{})}
		a.held[uid] = held
		go a.ask(held, pod)
	}
	a.mu.Unlock()
	return held.wait(ctx)
}

func (h *assertion) wait(ctx context.Context) (string, error) {
	select {
	case <-h.done:
		return h.token, h.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// over reports whether there is nothing to be had from it any more.
func (h *assertion) over() bool {
	select {
	case <-h.done:
		return time.Until(h.expires) < assertionSpare && h.err == nil || time.Now().After(h.expires)
	default:
		return false
	}
}

func (a *Assertions) ask(held *assertion, pod *corev1.Pod) {
	defer close(held.done)
	ctx, cancel := context.WithTimeout(context.Background(), assertionTimeout)
	defer cancel()
	seconds := int64(assertionLife / time.Second)
	account := held.account
	r, err := a.request(ctx, account.Namespace, account.Name, &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences:         []string{exchangeAudience},
		ExpirationSeconds: &seconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: types.UID(pod.UID)},
	}})
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		held.err, held.expires = assertionFailed(pod, err), time.Now().Add(refusedFor)
		if !cluster.Away(err) {
			delete(a.vouched, string(pod.UID))
		}
		return
	}
	held.token, held.expires = r.Status.Token, r.Status.ExpirationTimestamp.Time
	if a.held[string(pod.UID)] == held { // the pod has not gone meanwhile
		a.vouched[string(pod.UID)] = struct{}{}
	}
}

// Pods returns the UIDs of the pods that assertions are held for.
func (a *Assertions) Pods() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Keys(a.held))
}

// Release forgets a pod that is gone.
func (a *Assertions) Release(uid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.held, uid)
	delete(a.vouched, uid)
}

func ServiceAccountOf(pod *corev1.Pod) token.Ref {
	return token.Ref{Namespace: pod.Namespace, Name: cmp.Or(pod.Spec.ServiceAccountName, "default")}
}

func assertionFailed(pod *corev1.Pod, err error) error {
	account := ServiceAccountOf(pod)
	switch {
	case apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err):
		return &token.Error{Class: token.Denied, Reason: identity.ServiceAccountForbidden, Err: err,
			Detail: fmt.Sprintf("NMI may not ask for tokens of ServiceAccount %s; add namespace %s to nmi.federatedNamespaces of the chart. The API server says: %v", account, account.Namespace, err)}
	case cluster.Away(err):
		return &token.Error{Class: token.Unavailable, Err: err,
			Detail: fmt.Sprintf("The API server gives no token of ServiceAccount %s at the moment: %v", account, err)}
	}
	return stale(fmt.Sprintf("The API server does not vouch for pod %s/%s: %v", pod.Namespace, pod.Name, err), err)
}

// stale is for a pod that is not what it was when it was last heard of. It may only be that the watch is behind.
func stale(detail string, err error) error {
	return &token.Error{Class: token.Unavailable, Reason: identity.PodStale, Detail: detail, Err: err}
}
