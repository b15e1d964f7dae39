package mic

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// apiServer is a fake Kubernetes API server in memory. It includes the garbage collector, the namespace controller and
// kubelets that stop deleted pods. It checks metadata, resource versions, preconditions and patches like a real API
// server, but it does not check objects against the schemas of their definitions.
type apiServer struct {
	objectStore
	faults apiFaults
}

// objectStore stores the objects of the API server, and applies the rules for changes to them.
type objectStore struct {
	mu      sync.Mutex
	kinds   map[string]*kind // by resource and group, such as "leases.coordination.k8s.io"
	version int64
	uids    int

	// How long the garbage collector, the namespace controller and a kubelet take.
	collectDelay, namespaceDelay, podStop time.Duration
}

// kind is a resource with all its objects.
type kind struct {
	schema.GroupVersionKind
	resource   string
	namespaced bool
	hasStatus  bool // status is a subresource
	strict     bool // the rules of custom resources apply; for example, an update must have a resourceVersion
	goType     reflect.Type

	objects   map[objectKey]*object
	history   []change // all changes since the start
	compacted int64    // watches cannot start before this version
	streams   map[*watchStream]struct{}

	watchDelay time.Duration // a fault: how long watches delay the events
}

type objectKey struct{ namespace, name string }

func (k *kind) groupResource() schema.GroupResource {
	return schema.GroupResource{Group: k.Group, Resource: k.resource}
}

func newAPIServer() *apiServer {
	s := &apiServer{objectStore: objectStore{kinds: map[string]*kind{}, version: 1000, collectDelay: time.Second, namespaceDelay: time.Second, podStop: 2 * time.Second}}
	core := corev1.SchemeGroupVersion
	s.add(core, "namespaces", corev1.Namespace{}, kind{})
	s.add(core, "nodes", corev1.Node{}, kind{})
	s.add(core, "pods", corev1.Pod{}, kind{namespaced: true, hasStatus: true})
	s.add(core, "configmaps", corev1.ConfigMap{}, kind{namespaced: true})
	s.add(core, "events", corev1.Event{}, kind{namespaced: true})
	s.add(eventsv1.SchemeGroupVersion, "events", eventsv1.Event{}, kind{namespaced: true})
	s.add(coordinationv1.SchemeGroupVersion, "leases", coordinationv1.Lease{}, kind{namespaced: true})
	s.add(v1.GroupVersion, "azureidentities", v1.AzureIdentity{}, kind{namespaced: true, strict: true})
	s.add(v1.GroupVersion, "azureidentitybindings", v1.AzureIdentityBinding{}, kind{namespaced: true, strict: true})
	s.add(v1.GroupVersion, "azureassignedidentities", v1.AzureAssignedIdentity{}, kind{namespaced: true, strict: true, hasStatus: true})
	s.add(v1.GroupVersion, "azurepodidentityexceptions", v1.AzurePodIdentityException{}, kind{namespaced: true, strict: true})
	return s
}

func (s *objectStore) add(gv schema.GroupVersion, resource string, example any, k kind) {
	k.goType = reflect.TypeOf(example)
	k.GroupVersionKind, k.resource = gv.WithKind(k.goType.Name()), resource
	k.objects, k.streams = map[objectKey]*object{}, map[*watchStream]struct{}{}
	s.kinds[k.groupResource().String()] = &k
}

// kindOf returns a kind that matches; nil if there is none.
func (s *objectStore) kindOf(match func(*kind) bool) *kind {
	for _, k := range s.kinds {
		if match(k) {
			return k
		}
	}
	return nil
}

// call is one request to the API server.
type call struct {
	verb                 string // get, list, watch, create, update, patch, delete, deletecollection
	kind                 *kind
	namespace, name, sub string
	path                 string
	query                url.Values
	header               http.Header
	body                 []byte
}

func (c *call) String() string {
	if c.kind == nil {
		return c.verb + " " + c.path
	}
	text := c.verb + " " + c.kind.resource
	if c.sub != "" {
		text += "/" + c.sub
	}
	return strings.TrimSpace(text + " " + strings.Trim(c.namespace+"/"+c.name, "/"))
}

// isWrite reports whether the call can change anything.
func (c *call) isWrite() bool { return c.verb != "get" && c.verb != "list" && c.verb != "watch" }

var verbs = map[string]string{
	http.MethodGet: "get", http.MethodPost: "create", http.MethodPut: "update", http.MethodPatch: "patch", http.MethodDelete: "delete",
}

// parse parses a request and its path below /api/v1 or /apis/GROUP/VERSION. The call has no kind if it has another path
// or names an unknown resource.
func (s *apiServer) parse(r *http.Request) (*call, error) {
	c := &call{verb: verbs[r.Method], path: r.URL.Path, query: r.URL.Query(), header: r.Header}
	if r.Body != nil {
		var err error
		c.body, err = io.ReadAll(r.Body)
		if err = errors.Join(err, r.Body.Close()); err != nil {
			return nil, err
		}
	}
	group, rest := "", strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case rest[0] == "api" && len(rest) > 2:
		rest = rest[2:]
	case rest[0] == "apis" && len(rest) > 3:
		group, rest = rest[1], rest[3:]
	default:
		return c, nil // discovery or a health check
	}
	if rest[0] == "namespaces" && len(rest) > 2 {
		c.namespace, rest = rest[1], rest[2:]
	}
	c.kind = s.kinds[schema.GroupResource{Group: group, Resource: rest[0]}.String()]
	if len(rest) > 1 {
		c.name = rest[1]
	}
	if len(rest) > 2 {
		c.sub = rest[2]
	}
	switch {
	case c.verb == "get" && c.query.Get("watch") != "":
		c.verb = "watch"
	case c.verb == "get" && c.name == "":
		c.verb = "list"
	case c.verb == "delete" && c.name == "":
		c.verb = "deletecollection"
	}
	return c, nil
}

// handle is the apiHandler of the fake. It returns the response to a call, or the fault that is injected instead.
func (s *apiServer) handle(ctx context.Context, _ *http.Request, c *call) (*http.Response, error) {
	if err := s.injectedFault(ctx, c); err != nil {
		return errorResponse(err)
	}
	response, err := s.serve(ctx, c)
	if err != nil {
		return statusResponse(err), nil
	}
	return response, nil
}

// serve handles one call. Its caller sends an error to the client as a Status.
func (s *apiServer) serve(ctx context.Context, c *call) (*http.Response, error) {
	if c.kind == nil {
		return s.discover(c)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case c.kind.resource == "pods" && c.sub == "binding" && c.verb == "create":
		return s.bindPod(c)
	case c.sub != "" && (c.sub != "status" || !c.kind.hasStatus):
		return nil, apierrors.NewNotFound(c.kind.groupResource(), c.name+"/"+c.sub)
	}
	switch c.verb {
	case "get":
		o, ok := c.kind.objects[objectKey{c.namespace, c.name}]
		if !ok {
			return nil, apierrors.NewNotFound(c.kind.groupResource(), c.name)
		}
		return c.objectResponse(http.StatusOK, o)
	case "list":
		return s.list(c)
	case "watch":
		return s.watch(ctx, c)
	case "create":
		u, err := c.decode()
		if err != nil {
			return nil, err
		}
		o, err := s.create(c.kind, c.namespace, u)
		return c.writeResponse(http.StatusCreated, o, err)
	case "update":
		u, err := c.decode()
		if err != nil {
			return nil, err
		}
		o, err := s.update(c.kind, objectKey{c.namespace, c.name}, c.sub, u)
		return c.writeResponse(http.StatusOK, o, err)
	case "patch":
		o, err := s.patch(c)
		return c.writeResponse(http.StatusOK, o, err)
	case "delete":
		options, err := c.deleteOptions()
		if err != nil {
			return nil, err
		}
		o, err := s.remove(c.kind, objectKey{c.namespace, c.name}, options)
		if _, remains := c.kind.objects[objectKey{c.namespace, c.name}]; err == nil && !remains && c.kind.resource != "pods" {
			return jsonResponse(http.StatusOK, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess})
		}
		return c.writeResponse(http.StatusOK, o, err)
	}
	return nil, apierrors.NewMethodNotSupported(c.kind.groupResource(), c.verb)
}

func (c *call) writeResponse(status int, o *object, err error) (*http.Response, error) {
	if err != nil {
		return nil, err
	}
	return c.objectResponse(status, o)
}

// discover answers requests for discovery, health and the version.
func (s *apiServer) discover(c *call) (*http.Response, error) {
	parts := strings.Split(strings.Trim(c.path, "/"), "/")
	switch {
	case c.path == "/readyz" || c.path == "/livez" || c.path == "/healthz":
		return textResponse(http.StatusOK, "text/plain", []byte("ok")), nil
	case c.path == "/version":
		return jsonResponse(http.StatusOK, map[string]string{"major": "1", "minor": "37", "gitVersion": "v1.37.0"})
	case c.path == "/api":
		return jsonResponse(http.StatusOK, metav1.APIVersions{TypeMeta: metav1.TypeMeta{Kind: "APIVersions"}, Versions: []string{"v1"}})
	case c.path == "/apis":
		return jsonResponse(http.StatusOK, s.groups())
	case parts[0] == "api" && len(parts) == 2:
		return jsonResponse(http.StatusOK, s.resources(schema.GroupVersion{Version: parts[1]}))
	case parts[0] == "apis" && len(parts) == 3:
		return jsonResponse(http.StatusOK, s.resources(schema.GroupVersion{Group: parts[1], Version: parts[2]}))
	}
	return nil, apierrors.NewGenericServerResponse(http.StatusNotFound, c.verb, schema.GroupResource{}, c.path, "no such path", 0, true)
}

func (s *apiServer) groups() metav1.APIGroupList {
	list := metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}}
	seen := map[string]bool{"": true}
	for _, k := range s.kinds {
		if seen[k.Group] {
			continue
		}
		seen[k.Group] = true
		version := metav1.GroupVersionForDiscovery{GroupVersion: k.GroupVersion().String(), Version: k.Version}
		list.Groups = append(list.Groups, metav1.APIGroup{Name: k.Group, Versions: []metav1.GroupVersionForDiscovery{version}, PreferredVersion: version})
	}
	return list
}

func (s *apiServer) resources(gv schema.GroupVersion) metav1.APIResourceList {
	list := metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: gv.String()}
	for _, k := range s.kinds {
		if k.GroupVersion() != gv {
			continue
		}
		one := metav1.APIResource{Name: k.resource, SingularName: strings.ToLower(k.Kind), Kind: k.Kind, Namespaced: k.namespaced,
			Verbs: metav1.Verbs{"get", "list", "watch", "create", "update", "patch", "delete"}}
		list.APIResources = append(list.APIResources, one)
		if k.hasStatus {
			one.Name, one.Verbs = k.resource+"/status", metav1.Verbs{"get", "update", "patch"}
			list.APIResources = append(list.APIResources, one)
		}
	}
	return list
}

func jsonResponse(status int, v any) (*http.Response, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return textResponse(status, "application/json", data), nil
}

func textResponse(status int, contentType string, body []byte) *http.Response {
	return &http.Response{
		Status: fmt.Sprintf("%d %s", status, http.StatusText(status)), StatusCode: status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Content-Type": {contentType}}, ContentLength: int64(len(body)),
		Body: io.NopCloser(strings.NewReader(string(body))),
	}
}

// statusResponse is the response to a call that failed.
func statusResponse(err error) *http.Response {
	var failure apierrors.APIStatus
	if !errors.As(err, &failure) {
		failure = apierrors.NewInternalError(err)
	}
	status := failure.Status()
	status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	r, err := jsonResponse(int(status.Code), status)
	if err != nil {
		panic(err) // a Status can always be encoded
	}
	if status.Details != nil && status.Details.RetryAfterSeconds > 0 {
		r.Header.Set("Retry-After", fmt.Sprint(status.Details.RetryAfterSeconds))
	}
	return r
}
