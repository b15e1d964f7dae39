package nmitest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	cachetest "k8s.io/client-go/tools/cache/testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/nmi/token"
)

// Kubernetes implements the interfaces through which package credentials uses the cluster. For SecretSource and
// TokenRequester it fakes an API server that has one Secret, ns/password, and issues tokens of ServiceAccounts. For
// PodGetter it fakes NMI's cache of pods.
type Kubernetes struct {
	Secrets *cachetest.FakeControllerSource
	Changed chan string // receives the revisions that OnSecretChange is called with

	Mu         sync.Mutex
	Forbidden  bool // SecretListWatch returns a ListWatch whose calls are forbidden
	Watches    int  // number of calls of SecretListWatch
	Requests   []*authenticationv1.TokenRequest
	TokenError error                  // if set, RequestToken returns it instead of a token
	Pods       map[string]*corev1.Pod // by UID
}

// NewKubernetes returns a fake whose Secret has the value "first".
func NewKubernetes(t *testing.T) *Kubernetes {
	c := &Kubernetes{Secrets: cachetest.NewFakeControllerSource(), Changed: make(chan string, 10), Pods: map[string]*corev1.Pod{}}
	t.Cleanup(c.Secrets.Shutdown)
	c.Secrets.Add(Secret("first"))
	return c
}

// Secret returns the Secret ns/password with this value.
func Secret(value string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "password"}, Data: map[string][]byte{"clientSecret": []byte(value)}}
}

// SecretListWatch returns a ListWatch of the Secret for an informer.
func (c *Kubernetes) SecretListWatch(string, string) *cache.ListWatch {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.Watches++
	forbidden := c.Forbidden
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			if forbidden {
				return nil, apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "password", errors.New("no role"))
			}
			return c.Secrets.List(o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
			if forbidden {
				return nil, apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "password", errors.New("no role"))
			}
			return c.Secrets.Watch(o)
		},
	}
}

// RequestToken returns a token that contains the name of the ServiceAccount, or TokenError.
func (c *Kubernetes) RequestToken(_ context.Context, namespace, account string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.Requests = append(c.Requests, r)
	if c.TokenError != nil {
		return nil, c.TokenError
	}
	lifetime := time.Duration(*r.Spec.ExpirationSeconds) * time.Second
	return &authenticationv1.TokenRequest{Status: authenticationv1.TokenRequestStatus{Token: "assertion-of-" + namespace + "/" + account, ExpirationTimestamp: metav1.NewTime(time.Now().Add(lifetime))}}, nil
}

// PodByUID returns the pod with this UID from Pods.
func (c *Kubernetes) PodByUID(uid string) (*corev1.Pod, bool) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	p, ok := c.Pods[uid]
	return p, ok
}

// ReadSecret returns the Secret with the value "read", so that tests can tell a read from a watch.
func (c *Kubernetes) ReadSecret(context.Context, string, string) (*corev1.Secret, error) {
	return Secret("read"), nil
}

// OnSecretChange sends the revision to Changed.
func (c *Kubernetes) OnSecretChange(_ token.Ref, revision string) { c.Changed <- revision }
