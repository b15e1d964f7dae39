package cluster

import (
	"context"
	"fmt"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/internal/kube"
)

// Handlers are called for each event of the cluster with what it affects. They must not block.
type Handlers struct {
	Pod            func(key string)        // the pod must be reconciled
	Binding        func(key string)        // the binding must be checked
	PodScheduled   func(key string)        // the pod was scheduled now
	IdentityEdited func(resourceID string) // Azure may accept now what it refused
	WatchFailed    func()                  // client-go logs why
}

// Handle registers handlers. They are called as soon as Run fills the caches.
func (c *Cluster) Handle(h Handlers) error {
	podsWith := func(index, value string) {
		keys, _ := c.pods.GetIndexer().IndexKeys(index, value) // the index exists
		for _, key := range keys {
			h.Pod(key)
		}
	}
	bindingsOf := func(identity string) {
		for _, b := range kube.ByIndex[*Binding](c.bindings, byIdentity, identity) {
			h.Binding(b.Key())
			podsWith(bySelector, b.Value.Selector)
		}
	}
	handlers := map[cache.SharedIndexInformer]cache.ResourceEventHandler{
		c.pods: kube.TypedHandler(func(old, now *Pod) {
			if now != nil && now.Node != "" && !now.Finished && (old == nil || old.Node == "") {
				h.PodScheduled(now.Key())
			}
			h.Pod(kube.Newest(old, now).Key())
		}),
		c.nodes: kube.TypedHandler(func(old, now *Node) {
			if old != nil && now != nil && old.MachineKey == now.MachineKey && old.Problem == now.Problem {
				return
			}
			name := kube.Newest(old, now).Name
			podsWith(byNode, name)
			for _, a := range kube.ByIndex[*Assignment](c.assignments, byNode, name) {
				h.Pod(a.Pod)
			}
		}),
		c.namespaces: kube.TypedHandler(func(_, now *Namespace) {
			if now != nil && now.Terminating {
				for _, a := range kube.ByIndex[*Assignment](c.assignments, cache.NamespaceIndex, now.Name) {
					h.Pod(a.Pod)
				}
			}
		}),
		c.identities: kube.TypedHandler(func(old, now *AzureIdentity) {
			if old != nil && now != nil && old.ResourceVersion != now.ResourceVersion {
				h.IdentityEdited(now.ResourceID)
			}
			bindingsOf(kube.Newest(old, now).Key())
		}),
		c.bindings: kube.TypedHandler(func(old, now *Binding) {
			for _, b := range []*Binding{old, now} {
				if b != nil {
					podsWith(bySelector, b.Value.Selector)
				}
			}
			h.Binding(kube.Newest(old, now).Key())
		}),
		c.assignments: kube.TypedHandler(func(old, now *Assignment) {
			c.own.observe(kube.Newest(old, now), now == nil)
			h.Pod(kube.Newest(old, now).Pod)
		}),
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
