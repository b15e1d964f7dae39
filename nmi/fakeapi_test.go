package nmi

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// fakeAPI is a fake API server for watches of five resources.
type fakeAPI struct {
	t *testing.T
	*httptest.Server

	forbidden string // a resource for which it refuses requests

	mu        sync.Mutex
	version   int
	objects   map[string]map[string]object // by resource and namespace/name
	watches   map[*openWatch]struct{}
	selectors map[string][]string // label selectors of the watches, by resource
}

type object interface {
	metav1.Object
	runtime.Object
}

type openWatch struct {
	resource string
	selector labels.Selector
	events   chan []byte
	ended    chan struct{} // closed when nobody receives events any more
}

func newFakeAPI(t *testing.T, objects ...object) *fakeAPI {
	f := &fakeAPI{t: t, objects: map[string]map[string]object{}, watches: map[*openWatch]struct{}{}, selectors: map[string][]string{}}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	for _, o := range objects {
		f.set(o)
	}
	return f
}

func (f *fakeAPI) config() *rest.Config { return &rest.Config{Host: f.URL} }

func resourceOf(o object) (resource string, kind metav1.TypeMeta) {
	group := v1.GroupVersion.String()
	switch o.(type) {
	case *corev1.Pod:
		return "pods", metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	case *v1.AzureIdentity:
		return v1.AzureIdentities, metav1.TypeMeta{APIVersion: group, Kind: "AzureIdentity"}
	case *v1.AzureIdentityBinding:
		return v1.AzureIdentityBindings, metav1.TypeMeta{APIVersion: group, Kind: "AzureIdentityBinding"}
	case *v1.AzureAssignedIdentity:
		return v1.AzureAssignedIdentities, metav1.TypeMeta{APIVersion: group, Kind: "AzureAssignedIdentity"}
	}
	return v1.AzurePodIdentityExceptions, metav1.TypeMeta{APIVersion: group, Kind: "AzurePodIdentityException"}
}

// set creates or replaces an object.
func (f *fakeAPI) set(o object) {
	resource, kind := resourceOf(o)
	key := o.GetNamespace() + "/" + o.GetName()
	f.mu.Lock()
	defer f.mu.Unlock()
	o = o.DeepCopyObject().(object)
	o.GetObjectKind().SetGroupVersionKind(kind.GroupVersionKind())
	change := "MODIFIED"
	if f.objects[resource] == nil {
		f.objects[resource] = map[string]object{}
	}
	if f.objects[resource][key] == nil {
		change = "ADDED"
	}
	f.objects[resource][key] = o
	f.notify(change, resource, o)
}

func (f *fakeAPI) remove(o object) {
	resource, _ := resourceOf(o)
	key := o.GetNamespace() + "/" + o.GetName()
	f.mu.Lock()
	defer f.mu.Unlock()
	gone := f.objects[resource][key]
	delete(f.objects[resource], key)
	f.notify("DELETED", resource, gone)
}

func (f *fakeAPI) notify(change, resource string, o object) {
	f.version++
	o.SetResourceVersion(strconv.Itoa(f.version))
	for w := range f.watches {
		if w.resource == resource && w.selector.Matches(labels.Set(o.GetLabels())) {
			select {
			case w.events <- event(f.t, change, o):
			case <-w.ended:
			}
		}
	}
}

func event(t *testing.T, change string, o object) []byte {
	encoded, err := json.Marshal(map[string]any{"type": change, "object": o})
	if err != nil {
		t.Error(err)
	}
	return append(encoded, '\n')
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	q := r.URL.Query()
	switch {
	case r.URL.Path == "/readyz":
		return
	case strings.HasSuffix(r.URL.Path, "/"+v1.GroupVersion.String()):
		list := metav1.APIResourceList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIResourceList"}}
		for _, name := range []string{v1.AzureIdentities, v1.AzureIdentityBindings, v1.AzureAssignedIdentities, v1.AzurePodIdentityExceptions} {
			list.APIResources = append(list.APIResources, metav1.APIResource{Name: name})
		}
		_ = json.NewEncoder(w).Encode(list)
		return
	case f.forbids(r):
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure,
			Reason: metav1.StatusReasonForbidden, Code: http.StatusForbidden, Message: f.forbidden + " is forbidden"})
		return
	case q.Get("watch") == "" && strings.HasSuffix(r.URL.Path, "/pods"):
		f.listPods(w)
		return
	case q.Get("watch") == "" || q.Get("sendInitialEvents") != "true":
		f.t.Errorf("unexpected request %s", r.URL)
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	watch := f.open(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:], q.Get("labelSelector"))
	defer func() {
		close(watch.ended) // before the lock: notify may hold it while it sends
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.watches, watch)
	}()
	for {
		if err := http.NewResponseController(w).Flush(); err != nil {
			return
		}
		select {
		case e := <-watch.events:
			_, _ = w.Write(e)
		case <-r.Context().Done():
			return
		}
	}
}

// listPods responds with the list that NMI requests if the watch has not reported the pod of a request.
func (f *fakeAPI) listPods(w http.ResponseWriter) {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}}
	for _, o := range f.objects["pods"] {
		list.Items = append(list.Items, *o.(*corev1.Pod))
	}
	_ = json.NewEncoder(w).Encode(list)
}

func (f *fakeAPI) forbids(r *http.Request) bool {
	return f.forbidden != "" && strings.HasSuffix(r.URL.Path, "/"+f.forbidden)
}

// open starts a watch. The first events of the watch are the existing objects, and then the bookmark that marks the end
// of these objects.
func (f *fakeAPI) open(resource, selector string) *openWatch {
	parsed, err := labels.Parse(selector)
	if err != nil {
		f.t.Error(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.selectors[resource] = append(f.selectors[resource], selector)
	w := &openWatch{resource, parsed, make(chan []byte, 1000), make(chan struct{})}
	for _, o := range f.objects[resource] {
		if parsed.Matches(labels.Set(o.GetLabels())) {
			w.events <- event(f.t, "ADDED", o)
		}
	}
	bookmark := map[string]object{"pods": &corev1.Pod{}, v1.AzureIdentities: &v1.AzureIdentity{}, v1.AzureIdentityBindings: &v1.AzureIdentityBinding{},
		v1.AzureAssignedIdentities: &v1.AzureAssignedIdentity{}, v1.AzurePodIdentityExceptions: &v1.AzurePodIdentityException{}}[resource]
	_, kind := resourceOf(bookmark)
	bookmark.GetObjectKind().SetGroupVersionKind(kind.GroupVersionKind())
	bookmark.SetResourceVersion(strconv.Itoa(f.version))
	bookmark.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	w.events <- event(f.t, "BOOKMARK", bookmark)
	f.watches[w] = struct{}{}
	return w
}

// watched returns the label selectors of the watches of a resource.
func (f *fakeAPI) watched(resource string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.selectors[resource]
}

// watchedResources returns the number of resources that were watched.
func (f *fakeAPI) watchedResources() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.selectors)
}
