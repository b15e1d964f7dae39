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
	// received is when NMI last received the assignment: after a change of the object, or because the watch started or
	// started again.
	received time.Time
}

// newAssignmentInformer returns the informer of the assignments on this node.
func (c *Cache) newAssignmentInformer() cache.SharedIndexInformer {
	onThisNode := func(o *metav1.ListOptions) {
		o.LabelSelector = labels.Set{v1.NodeNameLabel: v1.NodeNameLabelValue(c.cfg.Node)}.String()
	}
	source := cache.NewFilteredListWatchFromClient(c.crds, v1.AzureAssignedIdentities, metav1.NamespaceAll, onThisNode)
	return cache.NewSharedIndexInformer(c.reconnector.wrap(v1.AzureAssignedIdentities, source), &v1.AzureAssignedIdentity{}, 0, cache.Indexers{byPod: podOfAssignment})
}

// notifyOnChanges registers event handlers that notify of all changes that a waiting request depends on.
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

// notifyOnChange returns a handler that notifies n of the key of each object that changed. If the change also changed
// the key, the handler notifies n of the former key, too.
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

// equalState reports whether two states of an object are equal for NMI. Without it, all waiting requests would be
// notified when a watch starts again, because all objects then arrive again. For an assignment that arrives again it
// returns false, as the field received differs; that only causes an additional check.
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
// there is none. If there are several, it returns the earliest of their times. When a watch starts again, all
// assignments are received again, so the time can be later than the assignment itself.
func (c *Cache) AssignedSince(pod *corev1.Pod, id *identity.Identity) time.Time {
	var since time.Time
	found, _ := c.assignmentsOf(pod) // fails only if the index does not exist, and then Facts has failed before
	for _, o := range found {
		a := &o.(*trimmed[assignment]).value
		if a.Usable() && a.Covers(IdentityPod(pod), id) && (since.IsZero() || a.received.Before(since)) {
			since = a.received
		}
	}
	return since
}
