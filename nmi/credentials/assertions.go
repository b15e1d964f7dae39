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

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/nmi/token"
)

// exchangeAudience is the audience of the assertions that Entra ID exchanges for its own tokens.
const exchangeAudience = "api://AzureADTokenExchange"

const (
	// assertionLifetime is the shortest lifetime that the API server allows.
	assertionLifetime = 10 * time.Minute
	// minRemainingLifetime is the remaining lifetime below which NMI does not use an assertion any more and requests a
	// new one.
	minRemainingLifetime = time.Minute

	assertionTimeout = 5 * time.Second

	// refusalTTL is how long the error of a failed request for an assertion is cached, so that not every retry of a pod
	// causes a request to the API server. It is also the time before a refused watch of a Secret may start again.
	refusalTTL = 3 * time.Second
)

// TokenRequester requests tokens of ServiceAccounts from the API server.
type TokenRequester interface {
	RequestToken(ctx context.Context, namespace, serviceAccount string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)
}

// PodGetter finds the pod of this node with a given UID, unless the pod has finished.
type PodGetter interface {
	PodByUID(uid string) (*corev1.Pod, bool)
}

// Assertions requests and stores the assertions of this node's pods: tokens of their ServiceAccounts that Entra ID
// exchanges for its own tokens.
//
// Each assertion is bound to its pod by name and UID. The API server issues no assertion for a pod that is gone or that
// runs with another ServiceAccount. So a new assertion also proves that the pod exists and which ServiceAccount the pod
// has, independently of NMI's cache of pods. Every pod needs an assertion of its own before it gets a token of a
// federated identity, even if the token cache already contains that token because of another pod.
type Assertions struct {
	requester TokenRequester
	pods      PodGetter

	mu       sync.Mutex
	byPod    map[string]*assertion // by UID of the pod
	verified map[string]struct{}   // UIDs of the pods for which verify makes no request
}

// assertion is the assertion of one pod, or the running or failed request for it. Read token, expires and err only
// after done is closed.
type assertion struct {
	account token.Ref
	done    chan struct{}
	token   string
	expires time.Time // when the token expires, or until when the error is cached
	err     error
}

// NewAssertions returns Assertions that request tokens from requester and look up pods in pods.
func NewAssertions(requester TokenRequester, pods PodGetter) *Assertions {
	return &Assertions{requester: requester, pods: pods, byPod: map[string]*assertion{}, verified: map[string]struct{}{}}
}

// verify returns nil if the API server has issued an assertion for the pod and has refused none since. Otherwise verify
// calls get and returns the error of get. A pod stays verified after its assertion expires, until the API server
// refuses an assertion or release removes the pod. An error of an unavailable API server is not a refusal.
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
	current := a.byPod[uid]
	a.mu.Unlock()
	if current != nil && current.account == serviceAccount && !current.expired() {
		// Do not look up the pod: the cache of pods may not contain it yet. NMI can find a pod in a list from the API
		// server before the watch reports the pod.
		return current.wait(ctx)
	}
	pod, ok := a.pods.PodByUID(uid)
	if !ok {
		return "", podStaleError(fmt.Sprintf("NMI knows no live pod with UID %s on this node: the pod was deleted or has finished, or the watch has not reported it yet", uid), nil)
	}
	if ServiceAccountOf(pod) != serviceAccount {
		return "", podStaleError(fmt.Sprintf("Pod %s/%s does not run as ServiceAccount %s", pod.Namespace, pod.Name, serviceAccount), nil)
	}
	return a.get(ctx, pod)
}

// get returns the stored assertion of the pod, or the stored error of the last request for one. If nothing is stored or
// it has expired, get requests a new assertion. Concurrent callers share one request.
func (a *Assertions) get(ctx context.Context, pod *corev1.Pod) (string, error) {
	uid := string(pod.UID)
	a.mu.Lock()
	current := a.byPod[uid]
	if current == nil || current.expired() {
		current = &assertion{account: ServiceAccountOf(pod), done: make(chan struct{})}
		a.byPod[uid] = current
		go a.request(current, pod) //nolint:contextcheck // other callers wait for this assertion, too
	}
	a.mu.Unlock()
	return current.wait(ctx)
}

func (s *assertion) wait(ctx context.Context) (string, error) {
	select {
	case <-s.done:
		return s.token, s.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// expired reports whether a new assertion must be requested.
func (s *assertion) expired() bool {
	select {
	case <-s.done:
		return time.Until(s.expires) < minRemainingLifetime && s.err == nil || time.Now().After(s.expires)
	default:
		return false
	}
}

// request requests an assertion and records the result. The request has a context of its own, so that a caller of get
// that stops waiting does not cancel the request for other callers.
func (a *Assertions) request(pending *assertion, pod *corev1.Pod) {
	defer close(pending.done)
	ctx, cancel := context.WithTimeout(context.Background(), assertionTimeout)
	defer cancel()
	seconds := int64(assertionLifetime / time.Second)
	account := pending.account
	r, err := a.requester.RequestToken(ctx, account.Namespace, account.Name, &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences:         []string{exchangeAudience},
		ExpirationSeconds: &seconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}})
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		pending.err, pending.expires = assertionError(pod, err), time.Now().Add(refusalTTL)
		if !kube.IsUnavailable(err) {
			delete(a.verified, string(pod.UID))
		}
		return
	}
	pending.token, pending.expires = r.Status.Token, r.Status.ExpirationTimestamp.Time
	if a.byPod[string(pod.UID)] == pending { // otherwise the pod was released during the request
		a.verified[string(pod.UID)] = struct{}{}
	}
}

// podUIDs returns the UIDs of the pods for which an assertion was requested and that were not released.
func (a *Assertions) podUIDs() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Keys(a.byPod))
}

// release removes what is stored about a pod.
func (a *Assertions) release(uid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.byPod, uid)
	delete(a.verified, uid)
}

// ServiceAccountOf returns the ServiceAccount that the pod runs as.
func ServiceAccountOf(pod *corev1.Pod) token.Ref {
	return token.Ref{Namespace: pod.Namespace, Name: cmp.Or(pod.Spec.ServiceAccountName, "default")}
}

func assertionError(pod *corev1.Pod, err error) error {
	account := ServiceAccountOf(pod)
	switch {
	case apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err):
		return &token.Error{Class: token.Denied, Reason: identity.ServiceAccountForbidden, Err: err,
			Detail: fmt.Sprintf("The API server does not let NMI request tokens of ServiceAccount %s: %v; if NMI lacks the permission, add namespace %s to the value nmi.federatedNamespaces of the chart", account, err, account.Namespace)}
	case kube.IsUnavailable(err):
		return &token.Error{Class: token.Unavailable, Err: err,
			Detail: fmt.Sprintf("NMI cannot get a token of ServiceAccount %s from the API server at the moment: %v", account, err)}
	}
	return podStaleError(fmt.Sprintf("The API server issues no ServiceAccount token for pod %s/%s: %v", pod.Namespace, pod.Name, err), err)
}

// podStaleError returns the error for a pod that is not in NMI's cache of pods, that has another ServiceAccount there,
// or for which the API server issues no assertion although NMI has the permission to request one. The class is
// Unavailable because NMI's cache may be outdated. Once the cache is up to date, a retry can succeed.
func podStaleError(detail string, err error) error {
	return &token.Error{Class: token.Unavailable, Reason: identity.PodStale, Detail: detail, Err: err}
}
