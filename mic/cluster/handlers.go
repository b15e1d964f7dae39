package cluster

import (
	"context"
	"fmt"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/internal/kube"
)

// Handlers are called for each event of the cluster, with the objects that the event affects. They must not block.
type Handlers struct {
	Pod            func(key string)        // the pod must be reconciled
	Binding        func(key string)        // the binding must be checked
	PodScheduled   func(key string)        // the pod is scheduled, which MIC did not know before
	IdentityEdited func(resourceID string) // an AzureIdentity with this resource ID was edited; Azure may no longer refuse the identity
	WatchFailed    func()                  // a watch failed; client-go logs why
}

// Handle registers handlers. They are called as soon as Run fills the caches.
func (c *Cluster) Handle(h Handlers) error {
	e := &eventHandler{c, h}
	handlers := map[cache.SharedIndexInformer]cache.ResourceEventHandler{
		c.pods:        kube.TypedHandler(e.pod),
		c.nodes:       kube.TypedHandler(e.node),
		c.namespaces:  kube.TypedHandler(e.namespace),
		c.identities:  kube.TypedHandler(e.identity),
		c.bindings:    kube.TypedHandler(e.binding),
		c.assignments: kube.TypedHandler(e.assignment),
	}
	watchFailed := func(ctx context.Context, r *cache.Reflector, err error) {
		h.WatchFailed()
		cache.DefaultWatchErrorHandler(ctx, r, err)
	}
	for informer, handler := range handlers {
		if err := informer.SetWatchErrorHandlerWithContext(watchFailed); err != nil {
			return err
		}
		if _, err := informer.AddEventHandler(handler); err != nil {
			return fmt.Errorf("registering event handlers: %w", err)
		}
	}
	return nil
}

// eventHandler maps each event to the pods and bindings that it affects. In its methods old is nil for an added object,
// and current is nil for a deleted one.
type eventHandler struct {
	cluster *Cluster
	call    Handlers
}

func (e *eventHandler) pod(old, current *Pod) {
	if current != nil && current.Node != "" && !current.Finished && (old == nil || old.Node == "") {
		e.call.PodScheduled(current.Key())
	}
	e.call.Pod(kube.Newest(old, current).Key())
}

func (e *eventHandler) node(old, current *Node) {
	if old != nil && current != nil && old.MachineKey == current.MachineKey && old.Problem == current.Problem {
		return
	}
	name := kube.Newest(old, current).Name
	e.podsWith(byNode, name)
	for _, a := range kube.ByIndex[*Assignment](e.cluster.assignments, byNode, name) {
		e.call.Pod(a.Pod)
	}
}

func (e *eventHandler) namespace(_, current *namespace) {
	if current != nil && current.terminating {
		for _, a := range kube.ByIndex[*Assignment](e.cluster.assignments, cache.NamespaceIndex, current.Name) {
			e.call.Pod(a.Pod)
		}
	}
}

func (e *eventHandler) identity(old, current *AzureIdentity) {
	if old != nil && current != nil && old.ResourceVersion != current.ResourceVersion {
		e.call.IdentityEdited(current.ResourceID)
	}
	for _, b := range kube.ByIndex[*Binding](e.cluster.bindings, byIdentity, kube.Newest(old, current).Key()) {
		e.call.Binding(b.Key())
		e.podsWith(bySelector, b.Value.Selector)
	}
}

func (e *eventHandler) binding(old, current *Binding) {
	for _, b := range []*Binding{old, current} {
		if b != nil {
			e.podsWith(bySelector, b.Value.Selector)
		}
	}
	e.call.Binding(kube.Newest(old, current).Key())
}

func (e *eventHandler) assignment(old, current *Assignment) {
	a := kube.Newest(old, current)
	e.cluster.own.observe(a, current == nil)
	e.call.Pod(a.Pod)
}

func (e *eventHandler) podsWith(index, value string) {
	keys, _ := e.cluster.pods.GetIndexer().IndexKeys(index, value) // it fails only for an index that does not exist
	for _, key := range keys {
		e.call.Pod(key)
	}
}
