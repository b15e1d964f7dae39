package mic

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
)

// schedule runs work of a cluster component, such as the garbage collector, after d and with s.mu held.
func (s *objectStore) schedule(d time.Duration, work func()) {
	time.AfterFunc(d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		work()
	})
}

// bindPod handles the subresource with which the scheduler assigns a pod to a node.
func (s *apiServer) bindPod(c *call) (*http.Response, error) {
	old, ok := c.kind.objects[objectKey{c.namespace, c.name}]
	if !ok {
		return nil, apierrors.NewNotFound(c.kind.groupResource(), c.name)
	}
	var binding corev1.Binding
	if err := json.Unmarshal(c.body, &binding); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if node, _, _ := unstructured.NestedString(old.Object, "spec", "nodeName"); node != "" || old.GetDeletionTimestamp() != nil {
		return nil, apierrors.NewConflict(c.kind.groupResource(), c.name, fmt.Errorf("the pod is already assigned to node %q or is being deleted", node))
	}
	u := old.DeepCopy()
	if err := unstructured.SetNestedField(u.Object, binding.Target.Name, "spec", "nodeName"); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if _, err := s.replace(c.kind, old, u); err != nil {
		return nil, err
	}
	return jsonResponse(http.StatusCreated, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess, Code: http.StatusCreated})
}

// isRunning reports whether a kubelet has to stop the pod before it can be deleted.
func isRunning(pod *object) bool {
	node, _, _ := unstructured.NestedString(pod.Object, "spec", "nodeName")
	phase, _, _ := unstructured.NestedString(pod.Object, "status", "phase")
	return node != "" && phase != "Succeeded" && phase != "Failed"
}

// finishPodDeletion removes a pod that is being deleted, as the kubelet does when it has stopped the pod's containers.
// A pod with finalizers remains.
func (s *objectStore) finishPodDeletion(k *kind, key objectKey, uid types.UID) {
	if old, ok := k.objects[key]; ok && old.GetUID() == uid {
		s.commit(k, old, old.DeepCopy(), len(old.GetFinalizers()) == 0)
	}
}

// collectDependents schedules the garbage collection of the objects that name a deleted object as an owner.
func (s *objectStore) collectDependents(owner types.UID) {
	for _, k := range s.kinds {
		for key, o := range k.objects {
			if slices.ContainsFunc(o.GetOwnerReferences(), func(r metav1.OwnerReference) bool { return r.UID == owner }) {
				s.schedule(s.collectDelay, func() { s.collectGarbage(k, key, o.GetUID()) })
			}
		}
	}
}

// collectGarbage deletes an object if none of its owners exists. Namespaced owners are looked up in the object's own
// namespace only.
func (s *objectStore) collectGarbage(k *kind, key objectKey, uid types.UID) {
	o, ok := k.objects[key]
	if !ok || o.GetUID() != uid || len(o.GetOwnerReferences()) == 0 {
		return
	}
	for _, r := range o.GetOwnerReferences() {
		owners := s.kindOf(func(k *kind) bool { return k.Kind == r.Kind && k.GroupVersion().String() == r.APIVersion })
		if owners == nil {
			return // the garbage collector does not delete what has an owner of an unknown kind
		}
		at := objectKey{name: r.Name}
		if owners.namespaced {
			at.namespace = key.namespace
		}
		if owner, ok := owners.objects[at]; ok && owner.GetUID() == r.UID {
			return
		}
	}
	_, _ = s.remove(k, key, metav1.DeleteOptions{}) // the only possible error is NotFound, and the object exists
}

// emptyNamespace deletes the content of a namespace that is being deleted, repeatedly until it is empty, and then the
// namespace itself.
func (s *objectStore) emptyNamespace(name string) {
	namespaces := s.kinds["namespaces"]
	namespace, ok := namespaces.objects[objectKey{"", name}]
	if !ok || namespace.GetDeletionTimestamp() == nil {
		return
	}
	left := 0
	for _, k := range s.kinds {
		for key := range k.objects {
			if key.namespace != name {
				continue
			}
			_, _ = s.remove(k, key, metav1.DeleteOptions{})
			if _, ok := k.objects[key]; ok {
				left++
			}
		}
	}
	if left > 0 {
		s.schedule(s.namespaceDelay, func() { s.emptyNamespace(name) })
		return
	}
	s.commit(namespaces, namespace, namespace.DeepCopy(), true)
}
