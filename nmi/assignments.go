package nmi

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
func (w *watch) watchAssignments() error {
	mine := func(o *metav1.ListOptions) {
		o.LabelSelector = labels.Set{v1.NodeNameLabel: v1.NodeNameLabelValue(w.node)}.String()
	}
	source := cache.NewFilteredListWatchFromClient(w.crds, v1.AzureAssignedIdentities, metav1.NamespaceAll, mine)
	w.assignments = cache.NewSharedIndexInformer(w.connection.mend(v1.AzureAssignedIdentities, source), &v1.AzureAssignedIdentity{}, 0, cache.Indexers{byPod: podOfAssignment})
	for _, handled := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{w.pods, w.telling(func(o any) topic {
			pod := o.(*corev1.Pod)
			return topic{ofPod, pod.Namespace + "/" + pod.Name}
		})},
		{w.assignments, w.telling(func(o any) topic {
			a := o.(*kept[assignment]).value
			return topic{ofPod, a.PodNamespace + "/" + a.PodName}
		})},
		{w.bindings, w.telling(func(o any) topic { return topic{ofBindings, o.(*kept[identity.Binding]).value.Selector} })},
		{w.exceptions, w.telling(func(o any) topic { return topic{ofExceptions, o.(*kept[identity.Exception]).value.Namespace} })},
		{w.identities, w.telling(func(any) topic { return topic{ofIdentities, ""} })},
	} {
		if _, err := handled.informer.AddEventHandler(handled.handler); err != nil {
			return err
		}
	}
	return nil
}

// telling returns a handler that tells the news of each object that changed.
func (w *watch) telling(about func(any) topic) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { w.news.tell(about(o)) },
		UpdateFunc: func(old, now any) {
			if same(old, now) {
				return
			}
			before, after := about(old), about(now)
			w.news.tell(after)
			if before != after {
				w.news.tell(before)
			}
		},
		DeleteFunc: func(o any) {
			if gone := lastState(o); gone != nil {
				w.news.tell(about(gone))
			}
		},
	}
}

// same reports whether two states of an object mean the same: after a watch has begun anew, all objects come again.
func same(old, now any) bool {
	if i, ok := old.(*kept[identity.Identity]); ok {
		return i.value.Equal(now.(*kept[identity.Identity]).value)
	}
	if b, ok := old.(*kept[identity.Binding]); ok {
		return b.value == now.(*kept[identity.Binding]).value
	}
	return reflect.DeepEqual(old, now)
}

func podOfAssignment(o any) ([]string, error) {
	a, ok := o.(*kept[assignment])
	if !ok {
		return nil, nil
	}
	return []string{a.value.PodNamespace + "/" + a.value.PodName}, nil
}

// assignmentsOf returns what is assigned to the pods of this name.
func (w *watch) assignmentsOf(pod *corev1.Pod) ([]any, error) {
	return w.assignments.GetIndexer().ByIndex(byPod, pod.Namespace+"/"+pod.Name)
}

// assignedSince returns since when the identity is known to be assigned to the machine of the pod, and the zero time if it
// is not.
func (w *watch) assignedSince(pod *corev1.Pod, id *identity.Identity) time.Time {
	var since time.Time
	found, _ := w.assignmentsOf(pod) // fails for an index that does not exist, and facts would have failed before
	for _, o := range found {
		a := &o.(*kept[assignment]).value
		if a.Usable() && a.Covers(subjectOf(pod), id) && (since.IsZero() || a.received.Before(since)) {
			since = a.received
		}
	}
	return since
}
