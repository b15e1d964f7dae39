package nmi

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/health"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// testNode is an agent without iptables rules, with a fake API server and a fake IMDS that issues a token for every
// client ID.
type testNode struct {
	*agent
	t      *testing.T
	api    *fakeAPI
	server http.Handler
	checks chan struct{} // receives a value each time a request reads the facts
	failed chan struct{} // receives a value for each failure of a watch
}

func newTestNode(t *testing.T, configure func(*Config), objects ...object) *testNode {
	t.Helper()
	c := startTestNode(t, newFakeAPI(t, objects...), configure)
	if err := c.objects.WaitSynced(t.Context(), 20*time.Second); err != nil {
		t.Fatal(err)
	}
	return c
}

func startTestNode(t *testing.T, api *fakeAPI, configure func(*Config)) *testNode {
	t.Helper()
	c := &testNode{t: t, api: api, checks: make(chan struct{}, 1000), failed: make(chan struct{}, 1000)}
	imds := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		client := r.URL.Query().Get("client_id")
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{"access_token": "token-of-" + client, "expires_in": "3600", "resource": "r", "token_type": "Bearer"})
	}))
	t.Cleanup(imds.Close)
	address := netip.MustParseAddrPort(imds.Listener.Addr().String())
	cfg := DefaultConfig()
	cfg.Node, cfg.OperationMode, cfg.Events, cfg.PodVerification = "node1", "Standard", false, "off"
	cfg.MetadataIP, cfg.MetadataPort = address.Addr().String(), int(address.Port())
	configure(&cfg)
	c.agent = &agent{cfg: cfg, capture: &capture{}, logs: telemetry.Loggers{Main: zap.NewNop(), Audit: zap.NewNop()}, metrics: telemetry.NewMetrics(), health: health.New(), hostPodsChanged: make(chan struct{}, 1)}
	c.onAPIFailure = func(operation string) {
		c.metrics.CountAPIFailure(operation)
		if operation == telemetry.APIWatch {
			c.failed <- struct{}{}
		}
	}
	if err := c.connect(t.Context(), t.Context(), c.api.config()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.tokens.Close)
	c.requests.Cluster = c
	c.server = c.newServer()
	go c.objects.Run(t.Context())
	return c
}

// Facts reads the facts of the agent, and then sends to checks.
func (c *testNode) Facts(pod *corev1.Pod) (identity.Facts, error) {
	defer func() { c.checks <- struct{}{} }()
	return c.objects.Facts(pod)
}

func (c *testNode) Latest(pod *corev1.Pod) *corev1.Pod { return c.objects.Latest(pod) }
func (c *testNode) WaitSynced(ctx context.Context, timeout time.Duration) error {
	return c.objects.WaitSynced(ctx, timeout)
}
func (c *testNode) StaleWatch() string { return c.objects.StaleWatch() }

func (c *testNode) begin(source string) <-chan response {
	done, start := make(chan response, 1), time.Now()
	go func() {
		r := httptest.NewRequest(http.MethodGet, nmitest.TokenPath, nil)
		r.RemoteAddr = source + ":40000"
		r.Header.Set("Metadata", "true")
		w := httptest.NewRecorder()
		c.server.ServeHTTP(w, r)
		a := response{status: w.Code, body: map[string]string{}, took: time.Since(start)}
		_ = json.Unmarshal(w.Body.Bytes(), &a.body)
		done <- a
	}()
	return done
}

// beginWait sends a request and returns when the request has read the facts twice: before and after it subscribed to
// changes. From then on, a change of an object that the request depends on wakes the request.
func (c *testNode) beginWait(source string) <-chan response {
	r := c.begin(source)
	<-c.checks
	<-c.checks
	return r
}

func (c *testNode) expect(request <-chan response, status int, says string) {
	c.t.Helper()
	if a := <-request; a.status != status || !strings.Contains(a.body["access_token"]+a.body["reason"], says) {
		c.t.Errorf("got %d %v; want %d and a body with %q", a.status, a.body, status, says)
	}
}

func podIn(ns, name, uid, ip, label string) *corev1.Pod {
	return nmitest.With(nmitest.Pod(name, uid, ip), func(p *corev1.Pod) { p.Namespace, p.Labels = ns, map[string]string{v1.BindingLabel: label} })
}

func azureIdentity(ns, name, client string) *v1.AzureIdentity {
	return &v1.AzureIdentity{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: v1.AzureIdentitySpec{ClientID: client, ResourceID: nmitest.ResourceID(name)}}
}

func binding(ns, name, selector string) *v1.AzureIdentityBinding {
	return &v1.AzureIdentityBinding{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: v1.AzureIdentityBindingSpec{AzureIdentity: name, Selector: selector}}
}

func assignedTo(p *corev1.Pod, i *v1.AzureIdentity, state v1.AssignmentState) *v1.AzureAssignedIdentity {
	return &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name + "-" + i.Name + "-" + string(p.UID), Labels: map[string]string{v1.NodeNameLabel: "node1"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: p.UID}}},
		Spec:   v1.AzureAssignedIdentitySpec{Pod: p.Name, PodNamespace: p.Namespace, NodeName: "node1", AzureIdentityRef: i.Copy()},
		Status: v1.AzureAssignedIdentityStatus{Status: state},
	}
}

// asAADPodIdentity gives an object the form that AAD Pod Identity writes: without owner, and in another namespace.
func asAADPodIdentity(o *v1.AzureAssignedIdentity) *v1.AzureAssignedIdentity {
	o.Namespace, o.OwnerReferences = "default", nil
	return o
}

func TestAWaitingRequestIsNotifiedOfAnAssignmentAtOnce(t *testing.T) {
	p, i := podIn("a", "p", "1", "10.0.0.1", "app"), azureIdentity("b", "x", nmitest.ClientX)
	c := newTestNode(t, func(*Config) {}, p, i, binding("b", "x", "app"))
	if got := c.api.watched(v1.AzureAssignedIdentities); !slices.Equal(got, []string{"nodename=node1"}) {
		t.Errorf("the watches of assignments have the label selectors %q; want one for this node", got)
	}
	r := c.beginWait("10.0.0.1")
	c.api.set(assignedTo(p, i, ""))
	<-c.checks
	c.api.set(assignedTo(p, i, v1.AssignmentCreated))
	<-c.checks
	start := time.Now()
	c.api.set(assignedTo(p, i, v1.AssignmentAssigned))
	c.expect(r, 200, "token-of-"+nmitest.ClientX)
	if took := time.Since(start); took > 10*time.Second { // far less than the request would wait without the event
		t.Errorf("%s passed from the event to the response", took)
	} else {
		t.Logf("%s from the event to the response", took)
	}
	if n := c.objects.Notifier().SubscribedKeys(); n != 0 {
		t.Errorf("%d keys still have subscribers", n)
	}
}

func TestAWaitingRequestIsNotifiedOfWhatEndsItsWait(t *testing.T) {
	p, i, b := podIn("a", "p", "1", "10.0.0.1", "app"), azureIdentity("b", "x", nmitest.ClientX), binding("b", "x", "app")
	for _, c := range []struct {
		name   string
		happen func(*fakeAPI)
		status int
		says   string
	}{
		{"the binding is deleted", func(f *fakeAPI) { f.remove(b) }, 400, "no_matching_binding"},
		{"the identity is deleted", func(f *fakeAPI) { f.remove(i) }, 400, "identity_missing"},
		{"the binding selects others", func(f *fakeAPI) { f.set(binding("b", "x", "others")) }, 400, "no_matching_binding"},
		{"the identity becomes namespaced", func(f *fakeAPI) {
			confined := i.DeepCopy()
			confined.Annotations = map[string]string{v1.BehaviorAnnotation: v1.BehaviorNamespaced}
			f.set(confined)
		}, 400, "no_matching_binding"},
		{"the pod is excepted", func(f *fakeAPI) {
			f.set(&v1.AzurePodIdentityException{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "e"}, Spec: v1.AzurePodIdentityExceptionSpec{PodLabels: map[string]string{v1.BindingLabel: "app"}}})
		}, 200, "token-of-"},
		{"the label of the pod changes", func(f *fakeAPI) { f.set(podIn("a", "p", "1", "10.0.0.1", "others")) }, 400, "no_matching_binding"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newTestNode(t, func(*Config) {}, p, i, b)
			r := n.beginWait("10.0.0.1")
			c.happen(n.api)
			n.expect(r, c.status, c.says)
		})
	}
}

func TestAnAssignmentIsForOnePodOnly(t *testing.T) {
	x := azureIdentity("b", "x", nmitest.ClientX)
	one, other := podIn("a", "p", "1", "10.0.0.1", "app"), podIn("c", "p", "2", "10.0.0.2", "app")
	c := newTestNode(t, func(c *Config) { c.AssignmentWait = 0 }, one, other, x, binding("b", "x", "app"), assignedTo(one, x, v1.AssignmentAssigned))
	c.expect(c.begin("10.0.0.1"), 200, "token-of-"+nmitest.ClientX)
	c.expect(c.begin("10.0.0.2"), 503, "assignment_pending") // the same name in another namespace

	// The pod is created again with the same name, while the assignment of the first pod still exists.
	c.api.remove(one)
	again := nmitest.With(one.DeepCopy(), func(p *corev1.Pod) { p.UID, p.Status.PodIPs[0].IP = types.UID("3"), "10.0.0.3" })
	c.api.set(again)
	c.expect(c.begin("10.0.0.3"), 503, "assignment_pending")

	// An assignment of AAD Pod Identity does not contain the UID of its pod. NMI accepts it all the same.
	c.api.set(asAADPodIdentity(assignedTo(other, x, "")))
	c.waitAssigned(other, x)
	c.expect(c.begin("10.0.0.2"), 200, "token-of-"+nmitest.ClientX)
}

// waitAssigned returns when the agent has received a usable assignment of identity i to pod p.
func (c *testNode) waitAssigned(p *corev1.Pod, i *v1.AzureIdentity) {
	id := identity.FromAzureIdentity(i)
	changed, stop := c.objects.Notifier().Subscribe(cluster.PodKey(p.Namespace, p.Name))
	defer stop()
	for c.objects.AssignedSince(p, &id).IsZero() {
		<-changed
	}
}

func TestForceNamespacedIgnoresBindingsOfOtherNamespaces(t *testing.T) {
	x, own := azureIdentity("b", "x", nmitest.ClientX), azureIdentity("a", "y", nmitest.ClientY)
	p, q := podIn("a", "p", "1", "10.0.0.1", "app"), podIn("c", "q", "2", "10.0.0.2", "app")
	c := newTestNode(t, func(c *Config) { c.ForceNamespaced = true }, p, q, x, own, binding("b", "x", "app"), binding("a", "y", "app"),
		assignedTo(p, own, v1.AssignmentAssigned), assignedTo(q, x, v1.AssignmentAssigned))
	c.expect(c.begin("10.0.0.1"), 200, "token-of-"+nmitest.ClientY)
	c.expect(c.begin("10.0.0.2"), 400, "no_matching_binding")
}

func TestManagedModeDoesNotWatchAssignments(t *testing.T) {
	p, i := podIn("a", "p", "1", "10.0.0.1", "app"), azureIdentity("a", "x", nmitest.ClientX)
	c := newTestNode(t, func(c *Config) { c.OperationMode = ModeManaged }, p, i, binding("a", "x", "app"), binding("b", "x", "app"))
	c.expect(c.begin("10.0.0.1"), 200, "token-of-"+nmitest.ClientX)
	if asked := c.api.watched(v1.AzureAssignedIdentities); len(asked) != 0 || c.api.watchedResources() != 4 || c.requests.Wait != nil {
		t.Errorf("in managed mode, the watches of assignments have the label selectors %q, and %d resources are watched; want no watch of assignments, 4 resources, and no WaitConfig", asked, c.api.watchedResources())
	}
	families, err := c.metrics.Registry.Gather()
	if err != nil || len(families) == 0 {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "podidentity_nmi_assignment_wait_seconds" {
			t.Errorf("in managed mode there is the metric %s, which is only for standard mode", f.GetName())
		}
	}
}

func TestReadinessExplainsAMissingPermission(t *testing.T) {
	api := newFakeAPI(t)
	api.forbidden = v1.AzureAssignedIdentities
	c := startTestNode(t, api, func(c *Config) { c.PodLookupTimeout = 100 * time.Millisecond })
	<-c.failed
	if err := c.health.Ready(); !strings.Contains(err.Error(), "azureassignedidentities is forbidden") || !strings.Contains(err.Error(), "operationMode is standard") {
		t.Errorf("the error of the readiness probe is %v; want the missing permission and operationMode", err)
	}
	c.expect(c.begin("10.0.0.1"), 503, "not_ready")
}

// response is the response to a request, with the time it took.
type response struct {
	status int
	body   map[string]string
	took   time.Duration
}
