package nmi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

const (
	clientX = "11111111-0000-0000-0000-000000000001"
	clientY = "22222222-0000-0000-0000-000000000002"
	clientS = "33333333-0000-0000-0000-000000000003"
	clientF = "44444444-0000-0000-0000-000000000004"
	getPath = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
)

// azure is a source of tokens that knows some identities and fails as told.
type azure struct {
	mu    sync.Mutex
	asked []token.Key
	fails error
	// failsFor is the client ID that there is no token for.
	failsFor string
	during   func() // what happens while it is asked
}

func (a *azure) Fetch(_ context.Context, call token.Call) (token.Token, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked = append(a.asked, call.Key)
	if a.during != nil {
		a.during()
	}
	if a.fails != nil {
		return token.Token{}, a.fails
	}
	if call.ClientID == a.failsFor && a.failsFor != "" {
		return token.Token{}, &token.Error{Class: token.Unavailable}
	}
	now := time.Now()
	return token.Token{AccessToken: "token-of-" + call.ClientID, Fetched: now, NotBefore: now, ExpiresOn: now.Add(time.Hour), ClientID: call.ClientID, ObjectID: "object-of-" + call.ClientID,
		ID: "id-of-" + call.ClientID, CorrelationID: "correlation"}, nil
}

// bench is a server with pods x (bound to identity x), both (bound to x and y), none (no binding), free (excepted) and
// sp (bound to a service principal).
type bench struct {
	*server
	azure      *azure
	lines      *observer.ObservedLogs
	facts      identity.Facts
	staleWatch string
	cluster    *fakeCluster
}

func newBench(t *testing.T) *bench {
	t.Helper()
	labelled := func(p *corev1.Pod, label string) *corev1.Pod {
		p.Labels = map[string]string{"aadpodidbinding": label}
		return p
	}
	n := newNode1(labelled(nmitest.Pod("x", "1", "10.0.0.1"), "x"), labelled(nmitest.Pod("both", "2", "10.0.0.2"), "both"), nmitest.Pod("none", "3", "10.0.0.3"),
		labelled(nmitest.Pod("free", "4", "10.0.0.4"), "free"), labelled(nmitest.Pod("sp", "5", "10.0.0.5"), "sp"),
		labelled(nmitest.Pod("thief", "8", "10.0.0.8"), "thief"), labelled(nmitest.Pod("fed", "9", "10.0.0.9"), "fed"), nmitest.Pod("twin1", "6", "10.0.0.6"), nmitest.Pod("twin2", "7", "10.0.0.6"))
	n.timeout = 50 * time.Millisecond
	id := func(name, client string) identity.Identity {
		return identity.Identity{Namespace: "ns", Name: name, ClientID: client, ResourceID: "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/" + name}
	}
	facts := identity.Facts{
		Identities: []identity.Identity{id("x", clientX), id("y", clientY),
			{Namespace: "ns", Name: "sp", Kind: identity.ServicePrincipalSecret, ClientID: clientS, TenantID: "t", AuxiliaryTenantIDs: []string{"t2"}, SecretNamespace: "ns", SecretName: "password"},
			{Namespace: "ns", Name: "thief", Kind: identity.ServicePrincipalCertificate, ClientID: clientS, TenantID: "t", SecretNamespace: "other", SecretName: "password"},
			{Namespace: "ns", Name: "fed", Kind: identity.Federated, ClientID: clientF, TenantID: "t"}},
		Bindings: []identity.Binding{
			{Namespace: "ns", Name: "bx", AzureIdentity: "x", Selector: "x"}, {Namespace: "ns", Name: "b1", AzureIdentity: "x", Selector: "both"},
			{Namespace: "ns", Name: "b2", AzureIdentity: "y", Selector: "both"}, {Namespace: "ns", Name: "bsp", AzureIdentity: "sp", Selector: "sp"},
			{Namespace: "ns", Name: "bthief", AzureIdentity: "thief", Selector: "thief"}, {Namespace: "ns", Name: "bfed", AzureIdentity: "fed", Selector: "fed"},
		},
		Exceptions: []identity.Exception{{Namespace: "ns", Name: "e", PodLabels: map[string]string{"aadpodidbinding": "free"}}},
	}
	core, lines := observer.New(zap.InfoLevel)
	b := &bench{azure: &azure{}, lines: lines, facts: facts, cluster: newFakeCluster(t)}
	m := telemetry.NewMetrics()
	c, err := token.NewCache(b.azure, 100, func(string, token.Principal) bool { return true }, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	objectIDs, err := lru.New[token.Principal, string](objectIDsKept)
	if err != nil {
		t.Fatal(err)
	}
	b.server = &server{
		metrics: m, logs: telemetry.Loggers{Main: zap.New(core), Audit: zap.NewNop()}, tenantID: "the-tenant",
		upstream: metadata.NewUpstream(netip.MustParseAddrPort("127.0.0.1:1")),
		tokens: &tokens{
			pods:   n.podFinder,
			facts:  func(*corev1.Pod) (identity.Facts, error) { return copyOf(b.facts), nil },
			ready:  func(context.Context, time.Duration) error { return nil },
			stale:  func() string { return b.staleWatch },
			latest: func(p *corev1.Pod) *corev1.Pod { return p },
			rules:  identity.Rules{Mode: identity.Managed}, cache: c, metrics: m,
			principals: b.principals(t), objectIDs: objectIDs,
		},
	}
	return b
}

// copyOf keeps one request's notes from the next, as fresh facts do.
func copyOf(f identity.Facts) identity.Facts {
	f.Identities = append([]identity.Identity(nil), f.Identities...)
	return f
}

func (b *bench) ask(source, target string, headers ...string) (int, map[string]string) {
	r := httptest.NewRequest(http.MethodGet, target, nil)
	r.RemoteAddr = source + ":40000"
	for _, h := range append(headers, "Metadata: true") {
		k, v, _ := strings.Cut(h, ": ")
		r.Header.Set(k, v)
	}
	w := httptest.NewRecorder()
	b.ServeHTTP(w, r)
	body := map[string]string{}
	_ = json.Unmarshal(w.Body.Bytes(), &body)
	body["Retry-After"] = w.Header().Get("Retry-After")
	return w.Code, body
}

func TestEachPodGetsItsOwnTokenAndNoOther(t *testing.T) {
	const resourceX = "/SUBSCRIPTIONS/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/x"
	cases := []struct {
		name, source, query string
		status              int
		reason              identity.Reason
		token, description  string
	}{
		{"the bound identity", "10.0.0.1", "", 200, identity.Allowed, "token-of-" + clientX, ""},
		{"the bound identity, named", "10.0.0.1", "&client_id=" + clientX, 200, identity.Allowed, "token-of-" + clientX, ""},
		{"another's identity, named", "10.0.0.1", "&client_id=" + clientY, 400, identity.IdentityNotBound, "", "Identity not found"},
		{"two identities", "10.0.0.2", "", 400, identity.MultipleIdentities, "", "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"},
		{"two identities, by client id", "10.0.0.2", "&client_id=" + clientY, 200, identity.Allowed, "token-of-" + clientY, ""},
		{"two identities, by resource id", "10.0.0.2", "&msi_res_id=" + resourceX, 200, identity.Allowed, "token-of-" + clientX, ""},
		{"two identities, by the other name of that", "10.0.0.2", "&mi_res_id=" + resourceX, 200, identity.Allowed, "token-of-" + clientX, ""},
		{"two identities, by object id", "10.0.0.2", "&object_id=OBJECT-of-" + clientY, 200, identity.Allowed, "token-of-" + clientY, ""},
		{"an object id of nobody", "10.0.0.2", "&object_id=x", 400, identity.IdentityNotBound, "", "Identity not found"},
		{"no binding", "10.0.0.3", "", 400, identity.PodNotLabelled, "", "Identity not found"},
		{"no binding, but a name", "10.0.0.3", "&client_id=" + clientX, 400, identity.PodNotLabelled, "", "Identity not found"},
		{"excepted", "10.0.0.4", "", 200, identity.Excepted, "token-of-", ""},
		{"excepted, with a name", "10.0.0.4", "&client_id=" + clientY, 200, identity.Excepted, "token-of-" + clientY, ""},
		{"a Secret of another namespace", "10.0.0.8", "", 403, identity.SecretNotAllowed, "", ""},
		{"a federated identity", "10.0.0.9", "", 200, identity.Allowed, "token-of-" + clientF, ""},
		{"an address of two pods", "10.0.0.6", "", 503, identity.PodAmbiguous, "", ""},
		{"an address of nobody", "10.0.0.99", "", 503, identity.PodUnknown, "", ""},
	}
	b := newBench(t)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b.lines.TakeAll()
			before := testutil.ToFloat64(b.metrics.Decisions.WithLabelValues(string(c.reason)))
			status, body := b.ask(c.source, getPath+c.query)
			if status != c.status || body["access_token"] != c.token {
				t.Errorf("got %d %v", status, body)
			}
			if c.description != "" && body["error_description"] != c.description {
				t.Errorf("IMDS says %q here, we %q", c.description, body["error_description"])
			}
			if status != 200 && body["reason"] != string(c.reason) {
				t.Errorf("the pod is told %q, not %s", body["reason"], c.reason)
			}
			if (status == 503) != (body["Retry-After"] != "") {
				t.Errorf("status %d with Retry-After %q", status, body["Retry-After"])
			}
			lines := b.lines.TakeAll()
			if len(lines) != 1 || lines[0].ContextMap()[telemetry.KeyReason] != string(c.reason) {
				t.Errorf("the log says %v", lines)
			}
			if after := testutil.ToFloat64(b.metrics.Decisions.WithLabelValues(string(c.reason))); after != before+1 {
				t.Errorf("the metric went from %v to %v", before, after)
			}
		})
	}
}

func TestNothingIsFetchedForARefusedPod(t *testing.T) {
	b := newBench(t)
	b.ask("10.0.0.3", getPath)
	b.ask("10.0.0.1", getPath+"&client_id="+clientY)
	b.ask("10.0.0.2", getPath)
	if len(b.azure.asked) != 0 {
		t.Errorf("fetched %v", b.azure.asked)
	}
}

// A token in the cache is of no use to a pod that may not have it.
func TestTheCacheIsAskedAfterTheDecision(t *testing.T) {
	b := newBench(t)
	if status, _ := b.ask("10.0.0.2", getPath+"&client_id="+clientY); status != 200 {
		t.Fatal("the token is not in the cache")
	}
	if status, body := b.ask("10.0.0.1", getPath+"&client_id="+clientY); status != 400 {
		t.Errorf("got %d %v", status, body)
	}
}

func TestFailuresOfTheSourceBecomeWhatClientsUnderstand(t *testing.T) {
	cases := []struct {
		name    string
		err     error
		status  int
		want    map[string]string
		headers string
	}{
		{"away", &token.Error{Class: token.Unavailable, Status: 500}, 503, map[string]string{"error": "service_unavailable", "reason": "upstream_unavailable"}, "2"},
		{"of unknown kind", errors.New("?"), 503, map[string]string{"reason": "upstream_unavailable"}, "2"},
		{"throttled", &token.Error{Class: token.Throttled, RetryAfter: 7 * time.Second}, 429, map[string]string{"error": "too_many_requests", "reason": "upstream_throttled"}, "7"},
		{"not attached", &token.Error{Class: token.Denied, Status: 400, Code: "invalid_request", Description: "Identity not found"}, 400, map[string]string{"error": "invalid_request", "error_description": "Identity not found", "reason": "upstream_refused"}, ""},
		{"forbidden", &token.Error{Class: token.Denied, Status: 401, Code: "unauthorized_client", Description: "no"}, 403, map[string]string{"error": "unauthorized_client", "reason": "upstream_refused"}, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			b.azure.fails = c.err
			status, body := b.ask("10.0.0.1", getPath)
			if status != c.status || body["Retry-After"] != c.headers {
				t.Errorf("got %d %v", status, body)
			}
			for k, v := range c.want {
				if body[k] != v {
					t.Errorf("%s is %q, want %q", k, body[k], v)
				}
			}
			// "Not found" would be final: the identity asked for may be the one whose token could not be had.
			if objStatus, body := b.ask("10.0.0.2", getPath+"&object_id=object-of-"+clientX); objStatus != c.status {
				t.Errorf("by object id: %d %v", objStatus, body)
			}
		})
	}
}

// The object ID is the same whatever the resource, and one identity's failure is none of the other's.
func TestAnObjectIDIsLearntOnceAndNotFromWhoCannotTell(t *testing.T) {
	b := newBench(t)
	if status, _ := b.ask("10.0.0.2", getPath+"&object_id=object-of-"+clientY); status != 200 {
		t.Fatal(status)
	}
	asked := len(b.azure.asked)
	b.azure.failsFor = clientX
	other := strings.Replace(getPath, "vault", "storage", 1)
	if status, body := b.ask("10.0.0.2", other+"&object_id=object-of-"+clientY); status != 200 || body["access_token"] != "token-of-"+clientY {
		t.Errorf("got %d %v", status, body)
	}
	if now := len(b.azure.asked); now != asked+1 {
		t.Errorf("%d tokens were fetched for one", now-asked)
	}
}

func TestNoTokenAndNoWholeClientIDIsLogged(t *testing.T) {
	b := newBench(t)
	b.ask("10.0.0.1", getPath)
	b.ask("10.0.0.1", getPath+"&client_id="+clientY)
	b.ask("10.0.0.1", getPath+"&client_id="+strings.Repeat("z", 2000))
	for _, line := range b.lines.TakeAll() {
		text := fmt.Sprint(line.ContextMap())
		if strings.Contains(text, "token-of-") || strings.Contains(text, "client_id:"+clientX) || len(line.ContextMap()[telemetry.KeyClientID].(string)) > 20 {
			t.Errorf("logged: %s", text)
		}
	}
}

func TestAClientThatLeavesIsNotedAndNotAnswered(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := httptest.NewRequest(http.MethodGet, getPath, nil).WithContext(ctx)
	r.RemoteAddr = "10.0.0.99:1"
	r.Header.Set("Metadata", "true")
	w := httptest.NewRecorder()
	b.ServeHTTP(w, r)
	if line := b.lines.TakeAll()[0].ContextMap(); w.Body.Len() != 0 || line[telemetry.KeyReason] != "client_gone" {
		t.Errorf("answered %s, logged %v", w.Body, line)
	}
}

func TestTheOtherRoutes(t *testing.T) {
	b := newBench(t)
	if status, body := b.ask("10.0.0.3", "/metadata/identity/info?api-version=2018-02-01"); status != 200 || body["tenantId"] != "the-tenant" {
		t.Errorf("info: %d %v", status, body)
	}
	if status, body := b.ask("10.0.0.3", "/metadata/instance?api-version=2021-02-01"); status != 503 || body["reason"] != "upstream_unavailable" {
		t.Errorf("instance, with nobody there: %d %v", status, body)
	}
	b.blockInstance = true
	if status, body := b.ask("10.0.0.3", "/metadata/instance/compute?api-version=2021-02-01"); status != 403 || body["reason"] != "route_blocked" {
		t.Errorf("instance, blocked: %d %v", status, body)
	}
	if status, body := b.ask("10.0.0.1", "/metadata/identity/issuecredential"); status != 404 || body["error"] != "not_found" {
		t.Errorf("credentials of the machine: %d %v", status, body)
	}
}

func TestBeforeTheCachesAreFilledNobodyIsRefusedForGood(t *testing.T) {
	b := newBench(t)
	b.tokens.ready = func(context.Context, time.Duration) error { return errors.New("caches: not filled yet") }
	if status, body := b.ask("10.0.0.3", getPath); status != 503 || body["reason"] != "not_ready" {
		t.Errorf("got %d %v", status, body)
	}
}
