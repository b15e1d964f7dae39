package mic

import (
	"context"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// The tests of this package depend on the fake API server, so the fake has tests of its own. compare_test.go compares
// the fake with a real API server.

// runWithClients runs a test with clients of the fake API server.
func runWithClients(t *testing.T, test func(*testing.T, *apiServer, *kubernetes.Clientset, rest.Interface)) {
	synctest.Test(t, func(t *testing.T) {
		s, l := newAPIServer(), newConnection("test", 1)
		defer l.disconnect()
		if _, err := createObject(s, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}}); err != nil {
			t.Fatal(err)
		}
		core, custom, err := newClients(l.apiTransport(s, s.handle), "http://api.test")
		if err != nil {
			t.Fatal(err)
		}
		test(t, s, core, custom)
	})
}

// newClients returns clients for the core resources and for those of this project.
func newClients(transport http.RoundTripper, host string) (*kubernetes.Clientset, rest.Interface, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	if err := v1.AddToScheme(scheme); err != nil {
		return nil, nil, err
	}
	config := &rest.Config{Host: host, Transport: transport, QPS: -1}
	config.GroupVersion, config.APIPath, config.NegotiatedSerializer = &v1.GroupVersion, "/apis", serializer.NewCodecFactory(scheme).WithoutConversion()
	custom, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, nil, err
	}
	core, err := kubernetes.NewForConfig(config)
	return core, custom, err
}

func newAssignment() *v1.AzureAssignedIdentity {
	return &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "a", Finalizers: []string{v1.AssignedIdentityFinalizer}},
		Status:     v1.AzureAssignedIdentityStatus{Status: v1.AssignmentAssigned},
	}
}

func TestTheFakeAPIServerUpdatesStatusOnlyThroughTheSubresource(t *testing.T) {
	runWithClients(t, func(t *testing.T, s *apiServer, _ *kubernetes.Clientset, custom rest.Interface) {
		var made, changed v1.AzureAssignedIdentity
		at := func(r *rest.Request) *rest.Request { return r.Namespace("ns").Resource(v1.AzureAssignedIdentities) }
		if err := at(custom.Post()).Body(newAssignment()).Do(t.Context()).Into(&made); err != nil || made.Status.Status != "" {
			t.Fatalf("a created object must have no status; got %+v, error %v", made.Status, err)
		}
		made.Status.Status, made.Spec.Pod = v1.AssignmentCreated, "p"
		if err := at(custom.Put()).Name("a").Body(&made).Do(t.Context()).Into(&changed); err != nil || changed.Status.Status != "" || changed.Spec.Pod != "p" {
			t.Errorf("an update must change the spec and not the status; got %+v, error %v", changed, err)
		}
		if err := at(custom.Put()).Name("a").Body(&made).Do(t.Context()).Error(); !apierrors.IsConflict(err) {
			t.Errorf("updating from an old version: got %v; want a Conflict", err)
		}
		patch := []byte(`{"spec":{"pod":"q"},"status":{"status":"Assigned"}}`)
		if err := at(custom.Patch(types.MergePatchType)).Name("a").SubResource("status").Body(patch).Do(t.Context()).Into(&changed); err != nil || changed.Status.Status != v1.AssignmentAssigned || changed.Spec.Pod != "p" {
			t.Errorf("a patch of the status must not change the spec; got %+v, error %v", changed, err)
		}
		changed.ResourceVersion = ""
		if err := at(custom.Put()).Name("a").Body(&changed).Do(t.Context()).Error(); !apierrors.IsInvalid(err) {
			t.Errorf("updating without a resourceVersion: got %v; want Invalid", err)
		}
	})
}

func TestTheFakeAPIServerKeepsObjectsWithFinalizersAndCollectsOrphans(t *testing.T) {
	runWithClients(t, func(t *testing.T, s *apiServer, _ *kubernetes.Clientset, custom rest.Interface) {
		p, err := createObject(s, newPod("ns", "p", "", ""))
		if err != nil {
			t.Fatal(err)
		}
		a := newAssignment()
		a.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "p", UID: p.UID}}
		if _, err := createObject(s, a); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		deleteObject[corev1.Pod](s, "ns", "p")
		time.Sleep(2 * time.Second)
		now, exists := getObject[v1.AzureAssignedIdentity](s, "ns", "a")
		if !exists || now.DeletionTimestamp == nil {
			t.Fatalf("after its owner was deleted, the object with a finalizer must exist and have a deletionTimestamp; exists: %t, %+v", exists, now)
		}
		request := custom.Patch(types.JSONPatchType).Namespace("ns").Resource(v1.AzureAssignedIdentities).Name("a")
		if err := request.Body([]byte(`[{"op":"add","path":"/metadata/finalizers/-","value":"x/y"}]`)).Do(t.Context()).Error(); !apierrors.IsInvalid(err) {
			t.Errorf("adding a finalizer to an object that is being deleted: got %v; want Invalid", err)
		}
		editObject(s, "ns", "a", func(a *v1.AzureAssignedIdentity) { a.Finalizers = nil })
		if _, exists := getObject[v1.AzureAssignedIdentity](s, "ns", "a"); exists {
			t.Error("the object still exists after its finalizer was removed")
		}
	})
}

func TestTheFakeAPIServerDeletesANamespaceWhenItIsEmpty(t *testing.T) {
	runWithClients(t, func(t *testing.T, s *apiServer, core *kubernetes.Clientset, _ rest.Interface) {
		if _, err := createObject(s, newAssignment()); err != nil {
			t.Fatal(err)
		}
		deleteObject[corev1.Namespace](s, "", "ns")
		time.Sleep(time.Minute)
		_, err := core.CoreV1().ConfigMaps("ns").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c"}}, metav1.CreateOptions{})
		if !apierrors.IsForbidden(err) || !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			t.Errorf("creating an object in a terminating namespace: got %v; want Forbidden, NamespaceTerminating", err)
		}
		editObject(s, "ns", "a", func(a *v1.AzureAssignedIdentity) { a.Finalizers = nil })
		time.Sleep(2 * time.Second)
		if _, exists := getObject[corev1.Namespace](s, "", "ns"); exists {
			t.Error("the namespace still exists after its last object was deleted")
		}
	})
}

func TestWatchesOfTheFakeAPIServerReportAddedModifiedDeletedAndExpired(t *testing.T) {
	runWithClients(t, func(t *testing.T, s *apiServer, core *kubernetes.Clientset, _ rest.Interface) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		w, err := core.CoreV1().Pods("").Watch(ctx, metav1.ListOptions{LabelSelector: v1.BindingLabel, ResourceVersion: "1000"})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Stop()
		if _, err := createObject(s, newPod("ns", "p", "", "")); err != nil {
			t.Fatal(err)
		}
		label := func(value string) {
			editObject(s, "ns", "p", func(p *corev1.Pod) { p.Labels = map[string]string{v1.BindingLabel: value} })
		}
		label("x")
		label("y")
		editObject(s, "ns", "p", func(p *corev1.Pod) { p.Labels = nil })
		for _, want := range []watch.EventType{watch.Added, watch.Modified, watch.Deleted} {
			if e := <-w.ResultChan(); e.Type != want {
				t.Errorf("the watch sent an event of type %s, want %s", e.Type, want)
			}
		}
		s.expireWatches()
		if e, open := <-w.ResultChan(); open {
			t.Errorf("expireWatches must close the watch; instead the watch sent %v", e)
		}
		again, err := core.CoreV1().Pods("").Watch(ctx, metav1.ListOptions{ResourceVersion: "1001"})
		if err != nil {
			t.Fatal(err)
		}
		defer again.Stop()
		if e := <-again.ResultChan(); e.Type != watch.Error || !apierrors.IsResourceExpired(apierrors.FromObject(e.Object)) {
			t.Errorf("watching from an expired version: got %+v; want an error event with reason Expired", e)
		}
	})
}

func TestTheFakeAPIServerRejectsInvalidNamesLabelsAndOwners(t *testing.T) {
	runWithClients(t, func(t *testing.T, s *apiServer, _ *kubernetes.Clientset, custom rest.Interface) {
		for name, spoil := range map[string]func(*v1.AzureAssignedIdentity){
			"name": func(a *v1.AzureAssignedIdentity) { a.Name = "Upper" },
			"label": func(a *v1.AzureAssignedIdentity) {
				a.Labels = map[string]string{v1.NodeNameLabel: string(make([]byte, 64))}
			},
			"owner": func(a *v1.AzureAssignedIdentity) {
				a.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "p"}}
			},
			"copy": func(a *v1.AzureAssignedIdentity) { a.Spec.AzureIdentityRef = &v1.AzureIdentityCopy{} },
		} {
			a := newAssignment()
			spoil(a)
			if err := custom.Post().Namespace("ns").Resource(v1.AzureAssignedIdentities).Body(a).Do(t.Context()).Error(); !apierrors.IsInvalid(err) {
				t.Errorf("creating an object with an invalid %s: got %v; want Invalid", name, err)
			}
		}
	})
}
