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
	// assertionLifetime is the shortest that the API server gives.
	assertionLifetime = 10 * time.Minute
	// minAssertionLifetime is how much of it has to be left for an exchange.
	minAssertionLifetime = time.Minute

	assertionTimeout = 5 * time.Second

	// refusalTTL is how long a no of the API server is kept, so that pods that come again at once do not all reach it.
	refusalTTL = 3 * time.Second
)

// Assertions gets tokens of the ServiceAccounts of this node's pods from the API server, to be exchanged at Entra ID.
//
// Each is bound to the pod that it is for, by name and UID: the API server gives none for a pod that is gone, or that
// runs with another ServiceAccount. So each of them is a second opinion on who calls, and every pod needs one of its own
// before it is handed a token, also where others have brought that into the cache already.
type Assertions struct {
	request func(ctx context.Context, namespace, serviceAccount string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)
	pod     func(uid string) (*corev1.Pod, bool)

	mu       sync.Mutex
	byPod    map[string]*assertion // by UID of the pod
	verified map[string]struct{}   // UIDs of pods that there was one for, and no word against since
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
	return &Assertions{request: request, pod: pod, byPod: map[string]*assertion{}, verified: map[string]struct{}{}}
}

// verify returns nil once the API server has verified for the pod. Once is enough: the cache of pods tells when it has gone,
// and a server that is away later has said nothing against it.
func (a *Assertions) verify(ctx context.Context, pod *corev1.Pod) error {
	a.mu.Lock()
	_, verified := a.verified[string(pod.UID)]
	a.mu.Unlock()
	if verified {
		return nil
	}
	_, err := a.get(ctx, pod)
	return err
}

// Assertion implements [token.Assertions].
func (a *Assertions) Assertion(ctx context.Context, uid string, serviceAccount token.Ref) (string, error) {
	a.mu.Lock()
	held := a.byPod[uid]
	a.mu.Unlock()
	if held != nil && held.account == serviceAccount && !held.expired() {
		// Also of a pod that the API server has told of and the watch has not yet.
		return held.wait(ctx)
	}
	pod, ok := a.pod(uid)
	if !ok {
		return "", podStaleError(fmt.Sprintf("The pod with UID %s is not on this node any more", uid), nil)
	}
	if ServiceAccountOf(pod) != serviceAccount {
		return "", podStaleError(fmt.Sprintf("Pod %s/%s does not run as ServiceAccount %s", pod.Namespace, pod.Name, serviceAccount), nil)
	}
	return a.get(ctx, pod)
}

// get returns the pod's assertion, asking for one together with all who want it at the same time.
func (a *Assertions) get(ctx context.Context, pod *corev1.Pod) (string, error) {
	uid := string(pod.UID)
	a.mu.Lock()
	held := a.byPod[uid]
	if held == nil || held.expired() {
		held = &assertion{account: ServiceAccountOf(pod), done: make(chan struct{})}
		a.byPod[uid] = held
		go a.requestAssertion(held, pod)
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

// expired reports whether there is nothing to be had from it any more.
func (h *assertion) expired() bool {
	select {
	case <-h.done:
		return time.Until(h.expires) < minAssertionLifetime && h.err == nil || time.Now().After(h.expires)
	default:
		return false
	}
}

func (a *Assertions) requestAssertion(held *assertion, pod *corev1.Pod) {
	defer close(held.done)
	ctx, cancel := context.WithTimeout(context.Background(), assertionTimeout)
	defer cancel()
	seconds := int64(assertionLifetime / time.Second)
	account := held.account
	r, err := a.request(ctx, account.Namespace, account.Name, &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences:         []string{exchangeAudience},
		ExpirationSeconds: &seconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: types.UID(pod.UID)},
	}})
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		held.err, held.expires = assertionError(pod, err), time.Now().Add(refusalTTL)
		if !cluster.ServerUnavailable(err) {
			delete(a.verified, string(pod.UID))
		}
		return
	}
	held.token, held.expires = r.Status.Token, r.Status.ExpirationTimestamp.Time
	if a.byPod[string(pod.UID)] == held { // the pod has not gone meanwhile
		a.verified[string(pod.UID)] = struct{}{}
	}
}

// Pods returns the UIDs of the pods that assertions are held for.
func (a *Assertions) Pods() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Keys(a.byPod))
}

// Release forgets a pod that is gone.
func (a *Assertions) Release(uid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.byPod, uid)
	delete(a.verified, uid)
}

func ServiceAccountOf(pod *corev1.Pod) token.Ref {
	return token.Ref{Namespace: pod.Namespace, Name: cmp.Or(pod.Spec.ServiceAccountName, "default")}
}

func assertionError(pod *corev1.Pod, err error) error {
	account := ServiceAccountOf(pod)
	switch {
	case apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err):
		return &token.Error{Class: token.Denied, Reason: identity.ServiceAccountForbidden, Err: err,
			Detail: fmt.Sprintf("NMI may not ask for tokens of ServiceAccount %s; add namespace %s to nmi.federatedNamespaces of the chart. The API server says: %v", account, account.Namespace, err)}
	case cluster.ServerUnavailable(err):
		return &token.Error{Class: token.Unavailable, Err: err,
			Detail: fmt.Sprintf("The API server gives no token of ServiceAccount %s at the moment: %v", account, err)}
	}
	return podStaleError(fmt.Sprintf("The API server does not vouch for pod %s/%s: %v", pod.Namespace, pod.Name, err), err)
}

// podStaleError is for a pod that is not what it was when it was last heard of. It may only be that the watch is behind.
func podStaleError(detail string, err error) error {
	return &token.Error{Class: token.Unavailable, Reason: identity.PodStale, Detail: detail, Err: err}
}
