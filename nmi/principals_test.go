package nmi

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	cachetest "k8s.io/client-go/tools/cache/testing"

	"github.com/podidentity/podidentity/nmi/token"
)

// fakeCluster is the API server as far as principals ask it: one Secret, ns/password, and tokens of ServiceAccounts.
type fakeCluster struct {
	secrets *cachetest.FakeControllerSource
	ctx     context.Context
	changed chan string // revisions that are not current any more

	mu        sync.Mutex
	forbidden bool // Secrets may not be read
	watches   int
	requests  []*authenticationv1.TokenRequest
	refuses   error // instead of a token
	pods      map[string]*corev1.Pod
}

func newFakeCluster(t *testing.T) *fakeCluster {
	c := &fakeCluster{secrets: cachetest.NewFakeControllerSource(), ctx: t.Context(), changed: make(chan string, 10), pods: map[string]*corev1.Pod{}}
	t.Cleanup(c.secrets.Shutdown)
	c.secrets.Add(secret("first"))
	return c
}

func secret(value string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "password"}, Data: map[string][]byte{"clientSecret": []byte(value)}}
}

func (c *fakeCluster) source(token.Ref) *cache.ListWatch {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watches++
	forbidden := c.forbidden
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			if forbidden {
				return nil, apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "password", errors.New("no role"))
			}
			return c.secrets.List(o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
			if forbidden {
				return nil, apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "password", errors.New("no role"))
			}
			return c.secrets.Watch(o)
		},
	}
}

func (c *fakeCluster) requestToken(_ context.Context, namespace, account string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = append(c.requests, r)
	if c.refuses != nil {
		return nil, c.refuses
	}
	life := time.Duration(*r.Spec.ExpirationSeconds) * time.Second
	return &authenticationv1.TokenRequest{Status: authenticationv1.TokenRequestStatus{Token: "assertion-of-" + namespace + "/" + account, ExpirationTimestamp: metav1.NewTime(time.Now().Add(life))}}, nil
}

func (c *fakeCluster) pod(uid string) (*corev1.Pod, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.pods[uid]
	return p, ok
}

func (c *fakeCluster) newSecrets() *secrets {
	return newSecrets(c.ctx, c.source, func(context.Context, token.Ref) (*corev1.Secret, error) { return secret("read"), nil },
		func(_ token.Ref, revision string) { c.changed <- revision })
}

func (c *fakeCluster) newAssertions() *assertions { return newAssertions(c.requestToken, c.pod) }

func (b *bench) principals(t *testing.T) *principals {
	return &principals{authority: "https://login.example", secrets: b.cluster.newSecrets(), assertions: b.cluster.newAssertions()}
}

func TestAnIdentityOfSeveralTenantsIsAnsweredWithAnArray(t *testing.T) {
	b := newBench(t)
	r := httptest.NewRequest(http.MethodGet, getPath, nil)
	r.RemoteAddr = "10.0.0.5:1"
	r.Header.Set("Metadata", "true")
	w := httptest.NewRecorder()
	b.ServeHTTP(w, r)
	var tokens []map[string]string
	if err := json.Unmarshal(w.Body.Bytes(), &tokens); err != nil || len(tokens) != 2 || tokens[0]["client_id"] != clientS {
		t.Fatalf("%v: %s", err, w.Body)
	}
	if asked := b.azure.asked; len(asked) != 2 || asked[0].TenantID != "t" || asked[1].TenantID != "t2" || asked[0].Secret != passwordRef || asked[0].Revision == "" {
		t.Errorf("asked for %+v", asked)
	}
}

// What was decided before a fetch does not hold after it just because the fetch was long.
func TestWhatChangesDuringAFetchCounts(t *testing.T) {
	const other = "99999999-0000-0000-0000-000000000009"
	for _, c := range []struct {
		name   string
		change func(b *bench)
		status int
		token  string
	}{
		{"nothing", func(*bench) {}, 200, "token-of-" + clientX},
		{"the binding goes", func(b *bench) { b.facts.Bindings = nil }, 400, ""},
		{"the identity goes", func(b *bench) { b.facts.Identities = nil }, 400, ""},
		{"the identity becomes another", func(b *bench) {
			b.facts = copyOf(b.facts)
			b.facts.Identities[0].ClientID = other
		}, 200, "token-of-" + other},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			b.azure.during = func() {
				b.azure.during = nil
				c.change(b)
			}
			if status, body := b.ask("10.0.0.1", getPath); status != c.status || body["access_token"] != c.token {
				t.Errorf("got %d %v", status, body)
			}
		})
	}
}

func TestARefusalOfAnObjectThatMayBeUnheardOfIsNotFinal(t *testing.T) {
	b := newBench(t)
	b.staleWatch = "azureidentities"
	if status, body := b.ask("10.0.0.3", getPath); status != 503 || body["reason"] != "not_ready" || !strings.Contains(body["error_description"], "aadpodidbinding") {
		t.Errorf("got %d %v", status, body)
	}
	if status, _ := b.ask("10.0.0.1", getPath); status != 200 {
		t.Errorf("a bound pod: %d", status)
	}
}

func TestOnlyWhoIsStillBoundIsWorthARenewal(t *testing.T) {
	b := newBench(t)
	x, both, free := b.podOf("10.0.0.1"), b.podOf("10.0.0.2"), b.podOf("10.0.0.4")
	keyOf := func(client string) token.Principal { return token.ManagedKey(client, "", "", "").Principal }
	for _, c := range []struct {
		pod       *corev1.Pod
		principal token.Principal
		want      bool
	}{
		{x, keyOf(clientX), true}, {x, keyOf(clientY), false}, {both, keyOf(clientY), true}, {free, keyOf(clientY), true},
		{free, token.Principal{Source: token.Secret, ClientID: clientS}, false},
	} {
		if got := b.tokens.allowed(c.pod, c.principal); got != c.want {
			t.Errorf("pod %s and %s: %t", c.pod.Name, c.principal.ClientID, got)
		}
	}
	b.facts.Bindings = nil
	if b.tokens.allowed(x, keyOf(clientX)) {
		t.Error("a pod without its binding is")
	}
}

func (b *bench) podOf(ip string) *corev1.Pod {
	p, err := b.tokens.pods.cached(ip)
	if err != nil {
		panic(err)
	}
	return p
}
