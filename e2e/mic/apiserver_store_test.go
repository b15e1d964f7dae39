package mic

import (
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/client-go/kubernetes/scheme"
)

// object is one state of one API object. It is immutable.
type object struct {
	*unstructured.Unstructured
	key     objectKey
	raw     []byte // JSON
	decoded any    // see decodedObject
}

// change is one entry of the history of a resource.
type change struct {
	version int64
	at      time.Time
	before  *object // nil: the object was created
	after   *object
	deleted bool // after is the object's last state
}

// commit stores the next state of an object, or deletes the object if gone, and sends the change to the watches. It is
// the only function that changes objects.
func (s *objectStore) commit(k *kind, before *object, u *unstructured.Unstructured, gone bool) *object {
	s.version++
	u.SetGroupVersionKind(k.GroupVersionKind)
	u.SetResourceVersion(strconv.FormatInt(s.version, 10))
	raw, err := json.Marshal(u.Object)
	if err != nil {
		panic(err) // cannot happen: u was decoded from JSON
	}
	key := objectKey{u.GetNamespace(), u.GetName()}
	o := &object{Unstructured: u, key: key, raw: raw}
	if gone {
		delete(k.objects, key)
		s.collectDependents(u.GetUID())
	} else {
		k.objects[key] = o
	}
	c := change{version: s.version, at: time.Now(), before: before, after: o, deleted: gone}
	k.history = append(k.history, c)
	for w := range k.streams {
		w.sendChange(c, k.watchDelay)
	}
	return o
}

func (s *objectStore) create(k *kind, namespace string, u *unstructured.Unstructured) (*object, error) {
	if u.GetName() == "" && u.GetGenerateName() != "" {
		u.SetName(fmt.Sprintf("%s%05d", u.GetGenerateName(), s.version%100000))
	}
	if k.namespaced {
		if u.GetNamespace() == "" {
			u.SetNamespace(namespace)
		}
		if u.GetNamespace() != namespace {
			return nil, apierrors.NewBadRequest("the namespace of the provided object does not match the namespace sent on the request")
		}
		if err := s.checkNamespace(k, u); err != nil {
			return nil, err
		}
	}
	if k.hasStatus {
		unstructured.RemoveNestedField(u.Object, "status")
	}
	if k.resource == "pods" {
		u.Object["status"] = map[string]any{"phase": "Pending"}
	}
	if err := s.validate(k, u); err != nil {
		return nil, err
	}
	if u.GetResourceVersion() != "" {
		return nil, &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure, Code: http.StatusInternalServerError, Message: "resourceVersion should not be set on objects to be created"}}
	}
	if _, ok := k.objects[objectKey{namespace, u.GetName()}]; ok {
		return nil, apierrors.NewAlreadyExists(k.groupResource(), u.GetName())
	}
	return s.insert(k, u)
}

// checkNamespace is the NamespaceLifecycle admission: no object is created in a missing or terminating namespace.
func (s *objectStore) checkNamespace(k *kind, u *unstructured.Unstructured) error {
	namespace, ok := s.kinds["namespaces"].objects[objectKey{"", u.GetNamespace()}]
	if !ok {
		return apierrors.NewNotFound(s.kinds["namespaces"].groupResource(), u.GetNamespace())
	}
	if namespace.GetDeletionTimestamp() == nil {
		return nil
	}
	err := apierrors.NewForbidden(k.groupResource(), u.GetName(), fmt.Errorf("unable to create new content in namespace %s because it is being terminated", u.GetNamespace()))
	err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: "NamespaceTerminating", Message: "namespace is being terminated", Field: "metadata.namespace"}}
	return err
}

// insert stores a new object with its status.
func (s *objectStore) insert(k *kind, u *unstructured.Unstructured) (*object, error) {
	s.uids++
	u.SetUID(types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", s.uids)))
	u.SetCreationTimestamp(metav1.Now())
	u.SetDeletionTimestamp(nil)
	if k.strict || k.resource == "pods" {
		u.SetGeneration(1)
	}
	o := s.commit(k, nil, u, false)
	if len(u.GetOwnerReferences()) > 0 {
		s.schedule(s.collectDelay, func() { s.collectGarbage(k, objectKey{u.GetNamespace(), u.GetName()}, u.GetUID()) })
	}
	return o, nil
}

// update replaces an object. If sub is "status", it replaces only the object's status.
func (s *objectStore) update(k *kind, key objectKey, sub string, u *unstructured.Unstructured) (*object, error) {
	if u.GetNamespace() == "" {
		u.SetNamespace(key.namespace)
	}
	if u.GetName() != key.name || u.GetNamespace() != key.namespace {
		return nil, apierrors.NewBadRequest("the name or namespace of the object does not match that on the URL")
	}
	old, ok := k.objects[key]
	if !ok {
		return nil, apierrors.NewNotFound(k.groupResource(), key.name)
	}
	if u.GetUID() != "" && u.GetUID() != old.GetUID() {
		return nil, apierrors.NewConflict(k.groupResource(), key.name, fmt.Errorf("Precondition failed: UID in precondition: %s, UID in object meta: %s", u.GetUID(), old.GetUID()))
	}
	return s.updateFrom(k, old, sub, u)
}

// updateFrom checks and stores u, the state of an object after an update or a patch. If sub is "status", it stores only
// the status of u.
func (s *objectStore) updateFrom(k *kind, old *object, sub string, u *unstructured.Unstructured) (*object, error) {
	switch {
	case u.GetResourceVersion() == "" && k.strict:
		return nil, k.invalid(u, field.Invalid(field.NewPath("metadata.resourceVersion"), "", "must be specified for an update"))
	case u.GetResourceVersion() != "" && u.GetResourceVersion() != old.GetResourceVersion():
		return nil, apierrors.NewConflict(k.groupResource(), old.key.name, fmt.Errorf("the object has been modified; please apply your changes to the latest version and try again"))
	}
	status := u.Object["status"]
	switch {
	case sub == "status":
		u = old.DeepCopy()
		setOrRemove(u, "status", status)
	case k.hasStatus:
		setOrRemove(u, "status", old.Object["status"])
	}
	switch {
	case u.GetUID() != "" && u.GetUID() != old.GetUID():
		return nil, k.invalid(u, field.Invalid(field.NewPath("metadata.uid"), u.GetUID(), "field is immutable"))
	case k.resource == "pods" && !reflect.DeepEqual(u.Object["spec"], old.Object["spec"]):
		return nil, k.invalid(u, field.Forbidden(field.NewPath("spec"), "pod updates may not change fields other than the image and some others"))
	}
	return s.replace(k, old, u)
}

func (k *kind) invalid(u *unstructured.Unstructured, err *field.Error) error {
	return apierrors.NewInvalid(k.GroupKind(), u.GetName(), field.ErrorList{err})
}

func setOrRemove(u *unstructured.Unstructured, key string, v any) {
	if delete(u.Object, key); v != nil {
		u.Object[key] = v
	}
}

// replace stores u, including its status, as the next state of an object. It ignores what u has in the fields that only
// the server sets.
func (s *objectStore) replace(k *kind, old *object, u *unstructured.Unstructured) (*object, error) {
	u.SetUID(old.GetUID())
	u.SetCreationTimestamp(old.GetCreationTimestamp())
	u.SetDeletionTimestamp(old.GetDeletionTimestamp())
	u.SetDeletionGracePeriodSeconds(old.GetDeletionGracePeriodSeconds())
	u.SetGeneration(old.GetGeneration())
	u.SetResourceVersion(old.GetResourceVersion())
	u.SetGroupVersionKind(k.GroupVersionKind)
	if k.strict && !k.sameContent(u, old) {
		u.SetGeneration(old.GetGeneration() + 1)
	}
	if old.GetDeletionTimestamp() != nil {
		for _, f := range u.GetFinalizers() {
			if !slices.Contains(old.GetFinalizers(), f) {
				return nil, apierrors.NewInvalid(k.GroupKind(), u.GetName(), field.ErrorList{field.Forbidden(field.NewPath("metadata.finalizers"), "no new finalizers can be added if the object is being deleted, found new finalizer "+f)})
			}
		}
	}
	if err := s.validate(k, u); err != nil {
		return nil, err
	}
	if reflect.DeepEqual(u.Object, old.Object) {
		return old, nil
	}
	gone := old.GetDeletionTimestamp() != nil && len(u.GetFinalizers()) == 0 && len(old.GetFinalizers()) > 0
	return s.commit(k, old, u, gone), nil
}

// sameContent reports whether two states of a custom resource differ at most in metadata and in a status that is a
// subresource. All other changes increment the generation.
func (k *kind) sameContent(u *unstructured.Unstructured, old *object) bool {
	ignored := func(key string) bool { return key == "metadata" || key == "status" && k.hasStatus }
	for key, value := range u.Object {
		if !ignored(key) && !reflect.DeepEqual(value, old.Object[key]) {
			return false
		}
	}
	for key := range old.Object {
		if _, ok := u.Object[key]; !ok && !ignored(key) {
			return false
		}
	}
	return true
}

func (s *apiServer) patch(c *call) (*object, error) {
	contentType := c.header.Get("Content-Type")
	if !c.kind.supportsPatch(types.PatchType(contentType)) {
		return nil, apierrors.NewGenericServerResponse(http.StatusUnsupportedMediaType, "patch", c.kind.groupResource(), "", "unsupported patch type "+contentType, 0, true)
	}
	old, ok := c.kind.objects[objectKey{c.namespace, c.name}]
	if !ok {
		return nil, apierrors.NewNotFound(c.kind.groupResource(), c.name)
	}
	patched, err := c.kind.applyPatch(types.PatchType(contentType), old.raw, c.body)
	if err != nil {
		return nil, err
	}
	u := &unstructured.Unstructured{}
	if err := utiljson.Unmarshal(patched, &u.Object); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if u.GetName() != c.name || u.GetNamespace() != c.namespace {
		return nil, apierrors.NewBadRequest("the name or namespace of the object does not match that on the URL")
	}
	return s.updateFrom(c.kind, old, c.sub, u)
}

func (k *kind) supportsPatch(patchType types.PatchType) bool {
	return patchType == types.MergePatchType || patchType == types.JSONPatchType || patchType == types.StrategicMergePatchType && !k.strict
}

func (k *kind) applyPatch(patchType types.PatchType, old, body []byte) ([]byte, error) {
	var patched []byte
	var err error
	switch patchType {
	case types.MergePatchType:
		patched, err = jsonpatch.MergePatch(old, body)
	case types.JSONPatchType:
		var p jsonpatch.Patch
		if p, err = jsonpatch.DecodePatch(body); err == nil {
			patched, err = p.Apply(old)
		}
		if err != nil { // including a failed test operation, as in a real API server
			return nil, apierrors.NewGenericServerResponse(http.StatusUnprocessableEntity, "patch", k.groupResource(), "", err.Error(), 0, true)
		}
	case types.StrategicMergePatchType:
		patched, err = strategicpatch.StrategicMergePatch(old, body, reflect.New(k.goType).Interface())
	}
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	return patched, nil
}

// remove deletes an object. If the object has finalizers, is a pod whose containers must stop first, or is a namespace,
// remove only sets its deletionTimestamp, and the object is deleted later.
func (s *objectStore) remove(k *kind, key objectKey, options metav1.DeleteOptions) (*object, error) {
	old, ok := k.objects[key]
	if !ok {
		return nil, apierrors.NewNotFound(k.groupResource(), key.name)
	}
	if p := options.Preconditions; p != nil {
		if p.UID != nil && *p.UID != old.GetUID() || p.ResourceVersion != nil && *p.ResourceVersion != old.GetResourceVersion() {
			return nil, apierrors.NewConflict(k.groupResource(), key.name, fmt.Errorf("Precondition failed"))
		}
	}
	runs := k.resource == "pods" && (options.GracePeriodSeconds == nil || *options.GracePeriodSeconds > 0) && isRunning(old)
	isNamespace := k.resource == "namespaces"
	atOnce := len(old.GetFinalizers()) == 0 && !runs && !isNamespace
	if old.GetDeletionTimestamp() != nil && !atOnce {
		return old, nil
	}
	u := old.DeepCopy()
	if old.GetDeletionTimestamp() == nil && (!atOnce || k.resource == "pods") {
		now := metav1.Now()
		u.SetDeletionTimestamp(&now)
		u.SetDeletionGracePeriodSeconds(new(int64))
		if generation := u.GetGeneration(); generation > 0 {
			u.SetGeneration(generation + 1)
		}
	}
	o := s.commit(k, old, u, atOnce)
	if atOnce {
		return o, nil
	}
	switch {
	case runs:
		s.schedule(s.podStop, func() { s.finishPodDeletion(k, key, u.GetUID()) })
	case isNamespace:
		s.schedule(s.namespaceDelay, func() { s.emptyNamespace(key.name) })
	}
	return o, nil
}

// validate checks the metadata of an object, and in an assignment the copies of the AzureIdentity and the binding.
func (s *objectStore) validate(k *kind, u *unstructured.Unstructured) error {
	var meta metav1.ObjectMeta
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object["metadata"].(map[string]any), &meta); err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	errs := validation.ValidateObjectMeta(&meta, k.namespaced, validation.NameIsDNSSubdomain, field.NewPath("metadata"))
	for _, f := range meta.Finalizers {
		if !k.strict && !strings.Contains(f, "/") { // finalizers of custom resources may lack a domain
			errs = append(errs, field.Invalid(field.NewPath("metadata.finalizers"), f, "the name is not fully qualified"))
		}
	}
	for _, copied := range []string{"azureIdentityRef", "azureBindingRef"} {
		embedded, ok, _ := unstructured.NestedMap(u.Object, "spec", copied)
		if ok && (embedded["apiVersion"] == nil || embedded["kind"] == nil) {
			errs = append(errs, field.Required(field.NewPath("spec", copied), "apiVersion and kind must not be empty"))
		}
	}
	if len(errs) > 0 {
		return apierrors.NewInvalid(k.GroupKind(), u.GetName(), errs)
	}
	return nil
}

var decoder = serializer.NewCodecFactory(scheme.Scheme).UniversalDeserializer()

// decode decodes the object in the body of a request, JSON or protobuf.
func (c *call) decode() (*unstructured.Unstructured, error) {
	body := c.body
	if strings.HasPrefix(string(body), "k8s\x00") {
		o, _, err := decoder.Decode(body, nil, nil)
		if err == nil {
			body, err = json.Marshal(o)
		}
		if err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
	}
	u := &unstructured.Unstructured{}
	if err := utiljson.Unmarshal(body, &u.Object); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if got := u.GroupVersionKind(); !got.Empty() && got != c.kind.GroupVersionKind {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("the object is a %s, not a %s", got, c.kind.GroupVersionKind))
	}
	return u, nil
}

func (c *call) deleteOptions() (o metav1.DeleteOptions, err error) {
	if len(c.body) == 0 {
		return o, nil
	}
	if strings.HasPrefix(string(c.body), "k8s\x00") {
		_, _, err = decoder.Decode(c.body, nil, &o)
	} else {
		err = json.Unmarshal(c.body, &o)
	}
	if err != nil {
		return o, apierrors.NewBadRequest(err.Error())
	}
	return o, nil
}

// selector returns a filter for the namespace and the selectors of the call.
func (c *call) selector() (func(*object) bool, error) {
	byLabel, err := labels.Parse(c.query.Get("labelSelector"))
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	byField, err := fields.ParseSelector(c.query.Get("fieldSelector"))
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	namespace, all := c.namespace, byLabel.Empty() && byField.Empty()
	return func(o *object) bool {
		if namespace != "" && o.key.namespace != namespace {
			return false
		}
		return all || byLabel.Matches(labels.Set(o.GetLabels())) && byField.Matches(o.fields())
	}, nil
}

func (o *object) fields() fields.Set {
	node, _, _ := unstructured.NestedString(o.Object, "spec", "nodeName")
	phase, _, _ := unstructured.NestedString(o.Object, "status", "phase")
	return fields.Set{"metadata.name": o.GetName(), "metadata.namespace": o.GetNamespace(), "spec.nodeName": node, "status.phase": phase}
}
