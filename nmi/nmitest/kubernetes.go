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

// Kubernetes is the API server as far as principals ask it: one Secret, ns/password, and tokens of ServiceAccounts.
type Kubernetes struct {
	Secrets *cachetest.FakeControllerSource
	Changed chan string // revisions that are not current any more

	Mu        sync.Mutex
	Forbidden bool // Secrets may not be read
	Watches   int
	Requests  []*authenticationv1.TokenRequest
	Refuses   error // instead of a token
	Pods      map[string]*corev1.Pod
}

// NewKubernetes returns one that has the Secret with the value "first".
func NewKubernetes(t *testing.T) *Kubernetes {
	c := &Kubernetes{Secrets: cachetest.NewFakeControllerSource(), Changed: make(chan string, 10), Pods: map[string]*corev1.Pod{}}
	t.Cleanup(c.Secrets.Shutdown)
	c.Secrets.Add(Secret("first"))
	return c
}

// Secret is ns/password.
func Secret(value string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "password"}, Data: map[string][]byte{"clientSecret": []byte(value)}}
}

// Source is where the Secret is watched.
func (c *Kubernetes) Source(token.Ref) *cache.ListWatch {
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

// RequestToken answers with a token that names the ServiceAccount.
func (c *Kubernetes) RequestToken(_ context.Context, namespace, account string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.Requests = append(c.Requests, r)
	if c.Refuses != nil {
		return nil, c.Refuses
	}
	life := time.Duration(*r.Spec.ExpirationSeconds) * time.Second
	return &authenticationv1.TokenRequest{Status: authenticationv1.TokenRequestStatus{Token: "assertion-of-" + namespace + "/" + account, ExpirationTimestamp: metav1.NewTime(time.Now().Add(life))}}, nil
}

// Pod returns the pod of this UID.
func (c *Kubernetes) Pod(uid string) (*corev1.Pod, bool) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	p, ok := c.Pods[uid]
	return p, ok
}

// ReadSecret answers with a Secret that says that it was read.
func (c *Kubernetes) ReadSecret(context.Context, token.Ref) (*corev1.Secret, error) {
	return Secret("read"), nil
}

// SecretChanged sends the revision to Changed.
func (c *Kubernetes) SecretChanged(_ token.Ref, revision string) { c.Changed <- revision }
