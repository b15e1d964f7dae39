package credentials

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/token"
)

func TestEachPodIsVerifiedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := nmitest.NewKubernetes(t)
		a := newAssertions(c)
		p := nmitest.Pod("app", "uid-1", "10.0.0.1")
		p.Spec.ServiceAccountName = "robot"
		c.Pods["uid-1"] = p
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				if err := a.verify(t.Context(), p); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		account := token.Ref{Namespace: "ns", Name: "robot"}
		got, err := a.Assertion(t.Context(), "uid-1", account)
		if err != nil || got != "assertion-of-ns/robot" || len(c.Requests) != 1 {
			t.Fatalf("20 calls of verify and one of Assertion: got %q, %v with %d requests, want one request", got, err, len(c.Requests))
		}
		spec := c.Requests[0].Spec
		if spec.BoundObjectRef == nil || spec.BoundObjectRef.Kind != "Pod" || spec.BoundObjectRef.Name != "app" || spec.BoundObjectRef.UID != "uid-1" ||
			!slices.Equal(spec.Audiences, []string{"api://AzureADTokenExchange"}) || *spec.ExpirationSeconds != 600 {
			t.Errorf("the request for the assertion has the spec %+v", spec)
		}
		// NMI does not use an assertion near its expiry any more, but the pod stays verified.
		time.Sleep(assertionLifetime - minRemainingLifetime + time.Second)
		if err := a.verify(t.Context(), p); err != nil || len(c.Requests) != 1 {
			t.Errorf("with an assertion near its expiry, verify returned %v after %d requests; want no error and no second request", err, len(c.Requests))
		}
		if _, err := a.Assertion(t.Context(), "uid-1", account); err != nil || len(c.Requests) != 2 {
			t.Errorf("with an assertion near its expiry, Assertion returned %v after %d requests; want no error and a second request", err, len(c.Requests))
		}
		// An unavailable API server does not revoke the verification; a refusal does.
		time.Sleep(assertionLifetime)
		c.TokenError = errors.New("connection refused")
		if _, err := a.Assertion(t.Context(), "uid-1", account); err == nil || a.verify(t.Context(), p) != nil {
			t.Errorf("while the API server is unavailable, Assertion returned %v; want an error, and the pod still verified", err)
		}
		time.Sleep(refusalTTL + time.Millisecond)
		c.TokenError = apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, "app")
		if _, err := a.Assertion(t.Context(), "uid-1", account); err == nil || a.verify(t.Context(), p) == nil {
			t.Errorf("after a refusal, Assertion returned %v; want an error, and the pod no longer verified", err)
		}
		a.release("uid-1")
		if len(a.byPod) != 0 || len(a.verified) != 0 {
			t.Error("a released pod is still stored")
		}
	})
}

func TestAPodThatIsNotVerifiedGetsNoPrincipal(t *testing.T) {
	resource := schema.GroupResource{Resource: "serviceaccounts/token"}
	for _, c := range []struct {
		name   string
		err    error
		class  token.Class
		reason identity.Reason
		says   string
	}{
		{"no right", apierrors.NewForbidden(resource, "default", errors.New("no role")), token.Denied, identity.ServiceAccountForbidden, "nmi.federatedNamespaces"},
		{"deleted", apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, "app"), token.Unavailable, identity.PodStale, "ns/app"},
		{"created again", apierrors.NewConflict(resource, "app", errors.New("another UID")), token.Unavailable, identity.PodStale, "ns/app"},
		{"unavailable", errors.New("connection refused"), token.Unavailable, "", "API server"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cluster := nmitest.NewKubernetes(t)
				cluster.TokenError = c.err
				a := newAssertions(cluster)
				p := nmitest.Pod("app", "uid-1", "10.0.0.1")
				var e *token.Error
				for range 10 {
					if err := a.verify(t.Context(), p); !errors.As(err, &e) || e.Class != c.class || e.Reason != c.reason || !strings.Contains(e.Detail, c.says) {
						t.Fatalf("verify returned %v", err)
					}
				}
				if len(cluster.Requests) != 1 {
					t.Errorf("10 calls of verify sent %d requests to the API server, want one", len(cluster.Requests))
				}
				cluster.TokenError = nil
				time.Sleep(refusalTTL + time.Millisecond)
				if err := a.verify(t.Context(), p); err != nil {
					t.Errorf("after the refusal expired: %v", err)
				}
			})
		})
	}
}

// The pod is from a list of the API server; the watch has not reported it yet.
func TestAPodThatTheWatchHasNotReportedYetGetsAnAssertion(t *testing.T) {
	c := nmitest.NewKubernetes(t)
	a := newAssertions(c)
	if err := a.verify(t.Context(), nmitest.Pod("app", "uid-1", "10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	if got, err := a.Assertion(t.Context(), "uid-1", token.Ref{Namespace: "ns", Name: "default"}); err != nil || got != "assertion-of-ns/default" || len(c.Requests) != 1 {
		t.Errorf("got %q, %v with %d requests", got, err, len(c.Requests))
	}
}

func TestAnAssertionIsOnlyForPodsOfItsServiceAccount(t *testing.T) {
	c := nmitest.NewKubernetes(t)
	c.Pods["uid-1"] = nmitest.Pod("app", "uid-1", "10.0.0.1")
	for _, ref := range []token.Ref{{Namespace: "ns", Name: "other"}, {Namespace: "elsewhere", Name: "default"}} {
		var e *token.Error
		if _, err := newAssertions(c).Assertion(t.Context(), "uid-1", ref); !errors.As(err, &e) || e.Reason != identity.PodStale {
			t.Errorf("Assertion for ServiceAccount %s, which is not that of the pod, returned %v; want reason pod_stale", ref, err)
		}
	}
	if _, err := newAssertions(c).Assertion(t.Context(), "uid-2", token.Ref{Namespace: "ns", Name: "default"}); err == nil || len(c.Requests) != 0 {
		t.Errorf("Assertion for a pod that is gone returned %v; want an error, and no request to the API server", err)
	}
}

func newAssertions(c *nmitest.Kubernetes) *Assertions { return NewAssertions(c, c) }
