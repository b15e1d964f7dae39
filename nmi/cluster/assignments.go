package cluster

import (
	"reflect"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/tools/cache"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
)

// byPod is the index of assignments by their pod, namespace/name.
const byPod = "pod"

// assignment is what is kept of an AzureAssignedIdentity.
type assignment struct {
	identity.Assignment
	// received is when this state of it came: a little after MIC wrote it, or when the watch began.
	received time.Time
}

// watchAssignments adds to the watch what standard mode needs: the assignments on this node, and news of all changes that
// a request may wait for.
func (w *Watch) watchAssignments() error {
	mine := func(o *metav1.ListOptions) {
		o.LabelSelector = labels.Set{v1.NodeNameLabel: v1.NodeNameLabelValue(w.node)}.String()
	}
	source := cache.NewFilteredListWatchFromClient(w.crds, v1.AzureAssignedIdentities, metav1.NamespaceAll, mine)
	w.assignments = cache.NewSharedIndexInformer(w.reconnector.wrap(v1.AzureAssignedIdentities, source), &v1.AzureAssignedIdentity{}, 0, cache.Indexers{byPod: podOfAssignment})
	for _, handled := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{w.pods, w.notifyOnChange(func(o any) Key {
			pod := o.(*corev1.Pod)
			return PodKey(pod.Namespace, pod.Name)
		})},
		{w.assignments, w.notifyOnChange(func(o any) Key {
			a := o.(*Kept[assignment]).Value
			return PodKey(a.PodNamespace, a.PodName)
		})},
		{w.bindings, w.notifyOnChange(func(o any) Key { return BindingsKey(o.(*Kept[identity.Binding]).Value.Selector) })},
		{w.exceptions, w.notifyOnChange(func(o any) Key { return ExceptionsKey(o.(*Kept[identity.Exception]).Value.Namespace) })},
		{w.identities, w.notifyOnChange(func(any) Key { return IdentitiesKey() })},
	} {
		if _, err := handled.informer.AddEventHandler(handled.handler); err != nil {
			return err
		}
	}
	return nil
}

// notifyOnChange returns a handler that tells the news of each object that changed.
func (w *Watch) notifyOnChange(about func(any) Key) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { w.Notifier.Notify(about(o)) },
		UpdateFunc: func(old, now any) {
			if equalState(old, now) {
				return
			}
			before, after := about(old), about(now)
			w.Notifier.Notify(after)
			if before != after {
				w.Notifier.Notify(before)
			}
		},
		DeleteFunc: func(o any) {
			if gone := LastState(o); gone != nil {
				w.Notifier.Notify(about(gone))
			}
		},
	}
}

// equalState reports whether two states of an object mean the same: after a watch has begun anew, all objects come again.
func equalState(old, now any) bool {
	if i, ok := old.(*Kept[identity.Identity]); ok {
		return i.Value.Equal(now.(*Kept[identity.Identity]).Value)
	}
	if b, ok := old.(*Kept[identity.Binding]); ok {
		return b.Value == now.(*Kept[identity.Binding]).Value
	}
	return reflect.DeepEqual(old, now)
}

func podOfAssignment(o any) ([]string, error) {
	a, ok := o.(*Kept[assignment])
	if !ok {
		return nil, nil
	}
	return []string{a.Value.PodNamespace + "/" + a.Value.PodName}, nil
}

// assignmentsOf returns what is assigned to the pods of this name.
func (w *Watch) assignmentsOf(pod *corev1.Pod) ([]any, error) {
	return w.assignments.GetIndexer().ByIndex(byPod, pod.Namespace+"/"+pod.Name)
}

// AssignedSince returns since when the identity is known to be assigned to the machine of the pod, and the zero time if it
// is not.
func (w *Watch) AssignedSince(pod *corev1.Pod, id *identity.Identity) time.Time {
	var since time.Time
	found, _ := w.assignmentsOf(pod) // fails for an index that does not exist, and facts would have failed before
	for _, o := range found {
		a := &o.(*Kept[assignment]).Value
		if a.Usable() && a.Covers(IdentityPod(pod), id) && (since.IsZero() || a.received.Before(since)) {
			since = a.received
		}
	}
	return since
}

// IdentityPod is the pod as the decision knows it.
func IdentityPod(pod *corev1.Pod) identity.Pod {
	return identity.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), Labels: pod.Labels}
}
