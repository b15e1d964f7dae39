package nmi

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/podidentity/identity"
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

// assertions gets tokens of the ServiceAccounts of this node's pods from the API server, to be exchanged at Entra ID.
//
// Each is bound to the pod that it is for, by name and UID: the API server gives none for a pod that is gone, or that
// runs with another ServiceAccount. So each of them is a second opinion on who calls, and every pod needs one of its own
// before it is handed a token, also where others have brought that into the cache already.
type assertions struct {
	request func(ctx context.Context, namespace, serviceAccount string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)
	pod     func(uid string) (*corev1.Pod, bool)

	mu   sync.Mutex
	held map[string]*assertion // by UID of the pod
}

// assertion is one pod's. Its fields but done are to be read once done is closed.
type assertion struct {
	done    chan struct{}
	token   string
	expires time.Time // of the token, or of the error
	err     error
}

func newAssertions(request func(context.Context, string, string, *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error), pod func(string) (*corev1.Pod, bool)) *assertions {
	return &assertions{request: request, pod: pod, held: map[string]*assertion{}}
}

// attest returns nil once the API server has vouched for the pod.
func (a *assertions) attest(ctx context.Context, pod *corev1.Pod) error {
	a.mu.Lock()
	held := a.held[string(pod.UID)]
	a.mu.Unlock()
	if held != nil {
		select {
		case <-held.done:
			if held.err == nil {
				return nil // once is enough: the cache of pods tells when it has gone
			}
		default:
		}
	}
	_, err := a.get(ctx, pod)
	return err
}

// Assertion implements [token.Assertions].
func (a *assertions) Assertion(ctx context.Context, uid string, serviceAccount token.Ref) (string, error) {
	pod, ok := a.pod(uid)
	if !ok {
		return "", stale(fmt.Sprintf("The pod with UID %s is not on this node any more", uid), nil)
	}
	if serviceAccountOf(pod) != serviceAccount {
		return "", stale(fmt.Sprintf("Pod %s/%s does not run as ServiceAccount %s", pod.Namespace, pod.Name, serviceAccount), nil)
	}
	return a.get(ctx, pod)
}

// get returns the pod's assertion, asking for one together with all who want it at the same time.
func (a *assertions) get(ctx context.Context, pod *corev1.Pod) (string, error) {
	uid := string(pod.UID)
	a.mu.Lock()
	held := a.held[uid]
	if held == nil || held.over() {
		held = &assertion{done: make(chan struct{})}
		a.held[uid] = held
		go a.ask(held, pod)
	}
	a.mu.Unlock()
	select {
	case <-held.done:
		return held.token, held.err
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

func (a *assertions) ask(held *assertion, pod *corev1.Pod) {
	defer close(held.done)
	ctx, cancel := context.WithTimeout(context.Background(), assertionTimeout)
	defer cancel()
	seconds := int64(assertionLife / time.Second)
	account := serviceAccountOf(pod)
	r, err := a.request(ctx, account.Namespace, account.Name, &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences:         []string{exchangeAudience},
		ExpirationSeconds: &seconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: types.UID(pod.UID)},
	}})
	if err != nil {
		held.err, held.expires = assertionFailed(pod, err), time.Now().Add(refusedFor)
		return
	}
	held.token, held.expires = r.Status.Token, r.Status.ExpirationTimestamp.Time
}

// release forgets a pod that is gone.
func (a *assertions) release(uid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.held, uid)
}

func serviceAccountOf(pod *corev1.Pod) token.Ref {
	return token.Ref{Namespace: pod.Namespace, Name: cmp.Or(pod.Spec.ServiceAccountName, "default")}
}

func assertionFailed(pod *corev1.Pod, err error) error {
	account := serviceAccountOf(pod)
	switch {
	case apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err):
		return &token.Error{Class: token.Denied, Reason: identity.ServiceAccountForbidden, Err: err,
			Detail: fmt.Sprintf("NMI may not ask for tokens of ServiceAccount %s; add namespace %s to nmi.federatedNamespaces of the chart. The API server says: %v", account, account.Namespace, err)}
	case away(err):
		return &token.Error{Class: token.Unavailable, Err: err,
			Detail: fmt.Sprintf("The API server gives no token of ServiceAccount %s at the moment: %v", account, err)}
	}
	return stale(fmt.Sprintf("The API server does not vouch for pod %s/%s: %v", pod.Namespace, pod.Name, err), err)
}

// stale is for a pod that is not what it was when it was last heard of. It may only be that the watch is behind.
func stale(detail string, err error) error {
	return &token.Error{Class: token.Unavailable, Reason: identity.PodStale, Detail: detail, Err: err}
}
