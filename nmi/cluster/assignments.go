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
	"github.com/podidentity/podidentity/internal/kube"
)

// byPod is the index of assignments by the namespace/name of their pod.
const byPod = "pod"

// assignment is what the cache keeps of an AzureAssignedIdentity.
type assignment struct {
	identity.Assignment
	// received is when NMI last received the object from the API server. NMI receives the object after each change, and
	// also unchanged each time the informer loads all objects.
	received time.Time
}

func (c *Cache) newAssignmentInformer() cache.SharedIndexInformer {
	onThisNode := func(o *metav1.ListOptions) {
		o.LabelSelector = labels.Set{v1.NodeNameLabel: v1.NodeNameLabelValue(c.cfg.Node)}.String()
	}
	source := cache.NewFilteredListWatchFromClient(c.crds, v1.AzureAssignedIdentities, metav1.NamespaceAll, onThisNode)
	return cache.NewSharedIndexInformer(c.reconnector.wrap(v1.AzureAssignedIdentities, source), &v1.AzureAssignedIdentity{}, 0, cache.Indexers{byPod: podOfAssignment})
}

// notifyOnChanges registers event handlers that call c.notifier for all changes that a waiting request depends on.
func (c *Cache) notifyOnChanges() error {
	for _, handled := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{c.pods, notifyOnChange(&c.notifier, func(p *corev1.Pod) Key { return PodKey(p.Namespace, p.Name) })},
		{c.assignments, notifyOnChange(&c.notifier, func(a *trimmed[assignment]) Key { return PodKey(a.value.PodNamespace, a.value.PodName) })},
		{c.bindings, notifyOnChange(&c.notifier, func(b *trimmed[identity.Binding]) Key { return BindingsKey(b.value.Selector) })},
		{c.exceptions, notifyOnChange(&c.notifier, func(e *trimmed[identity.Exception]) Key { return ExceptionsKey(e.value.Namespace) })},
		{c.identities, notifyOnChange(&c.notifier, func(*trimmed[identity.Identity]) Key { return IdentitiesKey() })},
	} {
		if _, err := handled.informer.AddEventHandler(handled.handler); err != nil {
			return err
		}
	}
	return nil
}

// notifyOnChange returns a handler that calls n.Notify with the key of each object that changed. If the key changed
// with the object, the handler also calls n.Notify with the former key.
func notifyOnChange[T any](n *Notifier, keyOf func(*T) Key) cache.ResourceEventHandler {
	return kube.TypedHandler(func(old, current *T) {
		if old != nil && current != nil && equalState(old, current) {
			return
		}
		key := keyOf(kube.Newest(old, current))
		n.Notify(key)
		if old == nil {
			return
		}
		if before := keyOf(old); before != key {
			n.Notify(before)
		}
	})
}

// equalState reports whether two states of an object are equal for NMI. When an informer loads all objects again, most
// objects are unchanged; without equalState, they would wake all waiting requests. For an assignment equalState always
// returns false, because the field received differs. The only effect is that the waiting requests of the assignment's
// pod are checked once more.
func equalState(old, current any) bool {
	if i, ok := old.(*trimmed[identity.Identity]); ok {
		return i.value.Equal(current.(*trimmed[identity.Identity]).value)
	}
	if b, ok := old.(*trimmed[identity.Binding]); ok {
		return b.value == current.(*trimmed[identity.Binding]).value
	}
	return reflect.DeepEqual(old, current)
}

func podOfAssignment(o any) ([]string, error) {
	a, ok := o.(*trimmed[assignment])
	if !ok {
		return nil, nil
	}
	return []string{a.value.PodNamespace + "/" + a.value.PodName}, nil
}

// assignmentsOf returns the assignments of the pod, and those of other pods that have had its namespace and name.
func (c *Cache) assignmentsOf(pod *corev1.Pod) ([]any, error) {
	return c.assignments.GetIndexer().ByIndex(byPod, pod.Namespace+"/"+pod.Name)
}

// AssignedSince returns when NMI last received a usable assignment of the identity to the pod, or the zero time if
// there is none. If there are several, it returns the earliest of their times. The time can be later than the last
// change of the assignment, because NMI receives unchanged assignments again when the informer loads all objects.
func (c *Cache) AssignedSince(pod *corev1.Pod, id *identity.Identity) time.Time {
	var since time.Time
	found, _ := c.assignmentsOf(pod) // fails only if the index byPod does not exist
	for _, o := range found {
		a := &o.(*trimmed[assignment]).value
		if a.Usable() && a.Covers(IdentityPod(pod), id) && (since.IsZero() || a.received.Before(since)) {
			since = a.received
		}
	}
	return since
}
