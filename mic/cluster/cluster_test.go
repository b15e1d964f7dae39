package cluster

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/telemetry"
)

const (
	subscription = "/subscriptions/5ab5c21f-0000-4000-8000-000000000001"
	identityID   = subscription + "/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/Blue"
	providerID   = "azure://" + subscription + "/resourceGroups/g/providers/Microsoft.Compute/virtualMachines/vm-1"
)

// server is a fake API server with a response for each method and path. It records the requests.
type server struct {
	mu        sync.Mutex
	responses map[string]any // by method and path; a *metav1.Status is an error
	requests  []string
	bodies    []string
}

func (s *server) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := r.Method + " " + r.URL.Path
	s.requests = append(s.requests, key)
	body := ""
	if r.Body != nil {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		body = string(b)
	}
	s.bodies = append(s.bodies, body)
	response, ok := s.responses[key]
	if !ok {
		response = &apierrors.NewNotFound(v1.GroupVersion.WithResource("").GroupResource(), r.URL.Path).ErrStatus
	}
	code := http.StatusOK
	if status, failed := response.(*metav1.Status); failed {
		status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
		code = int(status.Code)
	}
	b, err := json.Marshal(response)
	if err != nil {
		return nil, err
	}
	return &http.Response{
		StatusCode: code, Request: r, Body: io.NopCloser(bytes.NewReader(b)),
		Header: http.Header{"Content-Type": {runtime.ContentTypeJSON}},
	}, nil
}

func newTestCluster(t *testing.T, s *server) (*Cluster, *Writer) {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := v1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	crds, err := kube.Client(&rest.Config{Host: "http://api.test", Transport: s}, scheme, v1.GroupVersion, "/apis", runtime.ContentTypeJSON)
	if err != nil {
		t.Fatal(err)
	}
	c, err := New(&rest.RESTClient{}, crds, Options{Rules: identity.Rules{Mode: identity.Standard}})
	if err != nil {
		t.Fatal(err)
	}
	m, err := telemetry.NewMetrics(prometheus.NewRegistry(), func() int { return 0 })
	if err != nil {
		t.Fatal(err)
	}
	return c, NewWriter(crds, c, m)
}

func meta(namespace, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(namespace + name), ResourceVersion: "1"}
}

func testPod() *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: meta("ns", "web"), Spec: corev1.PodSpec{NodeName: "node-1"}}
	p.Labels = map[string]string{v1.BindingLabel: "blue"}
	return p
}

func testNode() *corev1.Node {
	return &corev1.Node{ObjectMeta: meta("", "node-1"), Spec: corev1.NodeSpec{ProviderID: providerID}}
}

func testIdentity() *v1.AzureIdentity {
	return &v1.AzureIdentity{ObjectMeta: meta("ns", "blue"), Spec: v1.AzureIdentitySpec{
		Type: v1.UserAssignedMSI, ResourceID: identityID, ClientID: "c11e0000-0000-4000-8000-000000000001",
	}}
}

func testBinding() *v1.AzureIdentityBinding {
	return &v1.AzureIdentityBinding{ObjectMeta: meta("ns", "binding"), Spec: v1.AzureIdentityBindingSpec{AzureIdentity: "blue", Selector: "blue"}}
}

// fill adds objects to the caches as the informers do.
func fill(t *testing.T, c *Cluster, objects ...metav1.Object) {
	t.Helper()
	for _, o := range objects {
		trimmed, err := trim(o)
		if err != nil {
			t.Fatal(err)
		}
		informer := c.pods
		switch trimmed.(type) {
		case *Node:
			informer = c.nodes
		case *namespace:
			informer = c.namespaces
		case *AzureIdentity:
			informer = c.identities
		case *Binding:
			informer = c.bindings
		case *Assignment:
			informer = c.assignments
		}
		if err := informer.GetIndexer().Add(trimmed); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAPodDesiresWhatItsBindingsAndItsNodeSay(t *testing.T) {
	cases := map[string]struct {
		change               func(*corev1.Pod, *corev1.Node, *v1.AzureIdentity, *v1.AzureIdentityBinding)
		assignments, problem int
		machine              bool
	}{
		"bound": {func(*corev1.Pod, *corev1.Node, *v1.AzureIdentity, *v1.AzureIdentityBinding) {}, 1, 0, true},
		"not scheduled": {func(p *corev1.Pod, _ *corev1.Node, _ *v1.AzureIdentity, _ *v1.AzureIdentityBinding) {
			p.Spec.NodeName = ""
		}, 0, 0, false},
		"finished": {func(p *corev1.Pod, _ *corev1.Node, _ *v1.AzureIdentity, _ *v1.AzureIdentityBinding) {
			p.Status.Phase = corev1.PodSucceeded
		}, 0, 0, false},
		"node unknown": {func(p *corev1.Pod, _ *corev1.Node, _ *v1.AzureIdentity, _ *v1.AzureIdentityBinding) {
			p.Spec.NodeName = "node-2"
		}, 0, 0, false},
		"another selector": {func(_ *corev1.Pod, _ *corev1.Node, _ *v1.AzureIdentity, b *v1.AzureIdentityBinding) {
			b.Spec.Selector = "red"
		}, 0, 0, false},
		"identity is absent": {func(_ *corev1.Pod, _ *corev1.Node, _ *v1.AzureIdentity, b *v1.AzureIdentityBinding) {
			b.Spec.AzureIdentity = "red"
		}, 0, 0, false},
		"identity invalid": {func(_ *corev1.Pod, _ *corev1.Node, i *v1.AzureIdentity, _ *v1.AzureIdentityBinding) {
			i.Spec.ResourceID = "blue"
		}, 0, 1, false},
		"node not in Azure": {func(_ *corev1.Pod, n *corev1.Node, _ *v1.AzureIdentity, _ *v1.AzureIdentityBinding) {
			n.Spec.ProviderID = "kind://node"
		}, 1, 0, false},
	}
	for name, test := range cases {
		t.Run(name, func(t *testing.T) {
			c, _ := newTestCluster(t, &server{})
			p, n, i, b := testPod(), testNode(), testIdentity(), testBinding()
			test.change(p, n, i, b)
			fill(t, c, p, n, i, b)
			d := c.Desired(c.Pod("ns/web"))
			if len(d.Assignments) != test.assignments || len(d.Problems) != test.problem {
				t.Fatalf("got %+v", d)
			}
			for _, a := range d.Assignments {
				if a.ResourceID != strings.ToLower(identityID) || (a.MachineKey != "") != test.machine || (a.Problem == "") != test.machine {
					t.Errorf("got %+v", a)
				}
			}
			c.options.Drain = true
			if d := c.Desired(c.Pod("ns/web")); len(d.Assignments) > 0 {
				t.Errorf("with Drain the pod desires %+v", d)
			}
		})
	}
	c, _ := newTestCluster(t, &server{})
	if d := c.Desired(c.Pod("ns/web")); len(d.Assignments)+len(d.Problems) > 0 {
		t.Errorf("a deleted pod desires %+v", d)
	}
}

// calls returns an eventHandler, and a function that returns the sorted calls of its Handlers since its last use.
func calls(t *testing.T, c *Cluster) (*eventHandler, func() []string) {
	t.Helper()
	var got []string
	add := func(what string) func(string) { return func(key string) { got = append(got, what+" "+key) } }
	e := &eventHandler{c, Handlers{Pod: add("pod"), Binding: add("binding"), PodScheduled: add("scheduled"), IdentityEdited: add("edited")}}
	return e, func() []string {
		slices.Sort(got)
		taken := slices.Compact(got)
		got = nil
		return taken
	}
}

func trimmed[T any](t *testing.T, o metav1.Object) *T {
	t.Helper()
	result, err := trim(o)
	if err != nil {
		t.Fatal(err)
	}
	return result.(*T)
}

func TestAnEventAffectsOnlyWhatRefersToItsObject(t *testing.T) {
	c, _ := newTestCluster(t, &server{})
	other := testPod()
	other.Name, other.Labels[v1.BindingLabel], other.Spec.NodeName = "other", "red", "node-2"
	assigned := assignmentObject("a", "1", v1.AssignmentAssigned)
	assigned.Spec.NodeName, assigned.Spec.Pod = "node-1", "moved"
	fill(t, c, testPod(), other, testNode(), testIdentity(), testBinding(), assigned)
	e, take := calls(t, c)
	expect := func(when string, want ...string) {
		t.Helper()
		if got := take(); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	pod := trimmed[Pod](t, testPod())
	e.pod(nil, pod)
	expect("a scheduled pod is added", "pod ns/web", "scheduled ns/web")
	e.pod(pod, pod)
	expect("a pod is updated", "pod ns/web")
	e.pod(pod, nil)
	expect("a pod is deleted", "pod ns/web")
	node := trimmed[Node](t, testNode())
	e.node(node, node)
	expect("a node is updated without effect")
	e.node(node, nil)
	expect("a node is deleted", "pod ns/moved", "pod ns/web")
	edited := testIdentity()
	edited.ResourceVersion = "2"
	e.identity(trimmed[AzureIdentity](t, testIdentity()), trimmed[AzureIdentity](t, edited))
	expect("an identity is edited", "binding ns/binding", "edited "+strings.ToLower(identityID), "pod ns/web")
	moved := testBinding()
	moved.Spec.Selector = "red"
	e.binding(trimmed[Binding](t, testBinding()), trimmed[Binding](t, moved))
	expect("a binding is edited", "binding ns/binding", "pod ns/other", "pod ns/web")
	e.namespace(nil, &namespace{Meta: kube.Meta{Name: "ns"}})
	expect("a namespace is added")
	e.namespace(nil, &namespace{Meta: kube.Meta{Name: "ns"}, terminating: true})
	expect("a namespace is being deleted", "pod ns/moved")
	e.assignment(nil, trimmed[Assignment](t, assigned))
	expect("an assignment is added", "pod ns/moved")
}

const path = "/apis/aadpodidentity.k8s.io/v1/namespaces/ns/azureassignedidentities"

func TestAnOwnCreationIsReturnedBeforeTheWatchDeliversIt(t *testing.T) {
	s := &server{responses: map[string]any{"POST " + path: assignmentObject("a", "5", "")}}
	c, w := newTestCluster(t, s)
	fill(t, c, testPod(), testNode(), testIdentity(), testBinding())
	d := c.Desired(c.Pod("ns/web"))
	a, err := w.Create(t.Context(), c.Pod("ns/web"), d.Assignments[0])
	if err != nil || a == nil {
		t.Fatal(a, err)
	}
	if got := c.AssignmentsOf("ns/web"); len(got) != 1 || !c.HasUnobservedWrites("ns/web") {
		t.Errorf("after the creation AssignmentsOf returns %v, want one assignment that the watch has not delivered", got)
	}
	var sent v1.AzureAssignedIdentity
	if err := json.Unmarshal([]byte(s.bodies[0]), &sent); err != nil {
		t.Fatal(err)
	}
	if sent.Name != d.Assignments[0].Name || sent.Spec.Pod != "web" || sent.Spec.NodeName != "node-1" || len(sent.OwnerReferences) != 1 ||
		!slices.Equal(sent.Finalizers, []string{v1.AssignedIdentityFinalizer}) || sent.Spec.AzureIdentityRef.Spec.ResourceID != identityID {
		t.Errorf("created %+v", sent)
	}
	if got := trimAssignment(&sent); got.Digest != d.Assignments[0].Digest || got.Legacy() || !got.HasFinalizer {
		t.Errorf("trimAssignment returns %+v for the created object, want the digest of the desired assignment, and MIC as the writer", got)
	}
}

func TestAnAssignmentThatExistsOrCannotBeCreatedIsNoError(t *testing.T) {
	exists := apierrors.NewAlreadyExists(v1.GroupVersion.WithResource(v1.AzureAssignedIdentities).GroupResource(), "a").ErrStatus
	terminating := apierrors.NewForbidden(v1.GroupVersion.WithResource(v1.AzureAssignedIdentities).GroupResource(), "a", nil).ErrStatus
	terminating.Details.Causes = []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}
	denied := apierrors.NewForbidden(v1.GroupVersion.WithResource(v1.AzureAssignedIdentities).GroupResource(), "a", nil).ErrStatus
	for name, test := range map[string]struct {
		status metav1.Status
		fails  bool
	}{"exists": {exists, false}, "namespace is being deleted": {terminating, false}, "denied": {denied, true}} {
		c, w := newTestCluster(t, &server{responses: map[string]any{"POST " + path: &test.status}})
		fill(t, c, testPod(), testNode(), testIdentity(), testBinding())
		p := c.Pod("ns/web")
		if a, err := w.Create(t.Context(), p, c.Desired(p).Assignments[0]); a != nil || (err != nil) != test.fails {
			t.Errorf("%s: Create returned %v, %v; want no assignment, and an error only if denied", name, a, err)
		}
	}
}

func TestAWrittenStatusIsReturnedBeforeTheWatchDeliversIt(t *testing.T) {
	s := &server{responses: map[string]any{
		"PATCH " + path + "/a/status": assignmentObject("a", "7", v1.AssignmentAssigned),
		"PATCH " + path + "/a":        assignmentObject("a", "6", v1.AssignmentCreated),
	}}
	c, w := newTestCluster(t, s)
	fill(t, c, testPod(), testNode(), testIdentity(), testBinding(), assignmentObject("a", "5", v1.AssignmentCreated))
	a := c.AssignmentsOf("ns/web")[0]
	if _, err := w.UpdateCopies(t.Context(), c.Desired(c.Pod("ns/web")).Assignments[0], a); err != nil {
		t.Fatal(err)
	}
	if err := w.SetState(t.Context(), a, v1.AssignmentAssigned, ""); err != nil {
		t.Fatal(err)
	}
	if got := c.AssignmentsOf("ns/web"); len(got) != 1 || got[0].State != v1.AssignmentAssigned {
		t.Errorf("after the write of the state AssignmentsOf returns %+v, want one assignment that is Assigned", got)
	}
	missing := trimAssignment(assignmentObject("b", "1", ""))
	if err := w.SetState(t.Context(), missing, v1.AssignmentAssigned, "text"); err != nil {
		t.Errorf("SetState of a deleted assignment returned %v, want no error", err)
	}
}

func TestADeletedAssignmentLosesItsFinalizerAndIsNotReturnedAgain(t *testing.T) {
	object := assignmentObject("a", "5", v1.AssignmentAssigned)
	object.UID, object.Finalizers = "uid", []string{v1.AssignedIdentityFinalizer}
	s := &server{responses: map[string]any{
		"PATCH " + path + "/a/status": object, "DELETE " + path + "/a": object, "PATCH " + path + "/a": object,
	}}
	c, w := newTestCluster(t, s)
	fill(t, c, object)
	if err := w.Delete(t.Context(), c.AssignmentsOf("ns/web")[0], true); err != nil {
		t.Fatal(err)
	}
	if want := []string{"PATCH " + path + "/a/status", "DELETE " + path + "/a", "PATCH " + path + "/a"}; !slices.Equal(s.requests, want) {
		t.Errorf("requests %q, want %q", s.requests, want)
	}
	if last := s.bodies[2]; last != `{"metadata":{"finalizers":[],"uid":"uid"}}` {
		t.Errorf("the last patch is %s, want one that removes the finalizer, with the UID", last)
	}
	if got := c.AssignmentsOf("ns/web"); len(got) > 0 {
		t.Errorf("after its deletion AssignmentsOf still returns the assignment: %+v", got)
	}
	gone, denied := &server{}, &server{responses: map[string]any{
		"DELETE " + path + "/a": &apierrors.NewForbidden(v1.GroupVersion.WithResource("").GroupResource(), "a", nil).ErrStatus,
	}}
	for s, fails := range map[*server]bool{gone: false, denied: true} {
		c, w := newTestCluster(t, s)
		fill(t, c, object)
		if err := w.Delete(t.Context(), c.AssignmentsOf("ns/web")[0], false); (err != nil) != fails {
			t.Errorf("deleting an assignment: want an error: %t, got %v", fails, err)
		}
	}
}

func TestLookupsReturnWhatTheCachesHave(t *testing.T) {
	c, _ := newTestCluster(t, &server{})
	if c.Pod("ns/web") != nil || c.Node("node-1") != nil || c.Binding("ns/binding") != nil || c.Identity("ns/blue") != nil || c.HasAssignments() {
		t.Error("a lookup in empty caches returned an object")
	}
	fill(t, c, testPod(), testNode(), testIdentity(), testBinding(), assignmentObject("a", "1", ""),
		&corev1.Namespace{ObjectMeta: meta("", "ns")})
	n := c.Node("node-1")
	if len(c.Pods()) != 1 || len(c.PodsOn("node-1")) != 1 || len(c.NodesOf(n.MachineKey)) != 1 || len(c.Assignments()) != 1 || !c.HasAssignments() ||
		c.Binding("ns/binding") == nil || c.Identity("ns/blue") == nil {
		t.Error("an object is not found")
	}
	if c.NamespaceTerminating("ns") || !c.NamespaceTerminating("deleted") {
		t.Error("NamespaceTerminating returns true for an existing namespace, or false for a deleted one")
	}
	if ref := c.Pod("ns/web").Reference(); ref.UID != "nsweb" || ref.Kind != "Pod" {
		t.Errorf("the reference of the pod is %+v, want its kind and UID", ref)
	}
	if ref := c.Binding("ns/binding").Reference(); ref.UID != "nsbinding" || ref.APIVersion != "aadpodidentity.k8s.io/v1" {
		t.Errorf("the reference of the binding is %+v, want its API version and UID", ref)
	}
}

func TestAWatchIsBehindUntilItHasCaughtUp(t *testing.T) {
	var s watchState
	if s.Behind() {
		t.Error("Behind returns true before any watch")
	}
	s.markDisconnected("pods")
	s.markConnected("nodes", time.Hour) // was not disconnected
	if !s.Behind() {
		t.Error("Behind returns false while a watch is disconnected")
	}
	s.markConnected("pods", -time.Second)
	if s.Behind() {
		t.Error("Behind returns true after the time to catch up")
	}
	s.markDisconnected("pods")
	s.markConnected("pods", time.Hour)
	if !s.Behind() {
		t.Error("Behind returns false while a watch catches up")
	}
}
