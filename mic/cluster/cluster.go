package cluster

import (
	"cmp"
	"context"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
)

// Names of the indexes.
const (
	bySelector = "selector" // pods by the value of their label, bindings by their selector
	byNode     = "node"     // pods and assignments
	byPod      = "pod"      // assignments
	byIdentity = "identity" // bindings
	byMachine  = "machine"  // nodes
)

// Cluster holds the caches of the objects that MIC reads, and computes from them which assignments each pod should have.
type Cluster struct {
	pods, nodes, namespaces, identities, bindings, assignments cache.SharedIndexInformer

	watchState
	own     ownWrites
	options Options
}

// Options determine what Desired returns.
type Options struct {
	Rules identity.Rules
	Drain bool // no pod desires anything; for removing all assignments
}

// New returns a Cluster with empty caches. core is a client of the core resources, crds one of the custom resources.
func New(core, crds rest.Interface, o Options) (*Cluster, error) {
	c := &Cluster{own: newOwnWrites(), options: o}
	informer := func(client rest.Interface, resource string, kind runtime.Object, selector string, indexers cache.Indexers) cache.SharedIndexInformer {
		lw := cache.NewFilteredListWatchFromClient(client, resource, metav1.NamespaceAll, func(o *metav1.ListOptions) { o.LabelSelector = selector })
		c.trackWatch(resource, lw)
		return cache.NewSharedIndexInformer(lw, kind, 0, indexers)
	}
	c.pods = informer(core, "pods", &corev1.Pod{}, v1.BindingLabel, cache.Indexers{
		bySelector: kube.IndexBy(func(p *Pod) string { return p.Selector }),
		byNode:     kube.IndexBy(func(p *Pod) string { return p.Node }),
	})
	c.nodes = informer(core, "nodes", &corev1.Node{}, "", cache.Indexers{byMachine: kube.IndexBy(func(n *Node) string { return n.MachineKey })})
	c.namespaces = informer(core, "namespaces", &corev1.Namespace{}, "", cache.Indexers{})
	c.identities = informer(crds, v1.AzureIdentities, &v1.AzureIdentity{}, "", cache.Indexers{})
	c.bindings = informer(crds, v1.AzureIdentityBindings, &v1.AzureIdentityBinding{}, "", cache.Indexers{
		bySelector: kube.IndexBy(func(b *Binding) string { return b.Value.Selector }),
		byIdentity: kube.IndexBy(func(b *Binding) string { return kube.Key(b.Namespace, b.Value.AzureIdentity) }),
	})
	c.assignments = informer(crds, v1.AzureAssignedIdentities, &v1.AzureAssignedIdentity{}, "", cache.Indexers{
		byPod:                kube.IndexBy(func(a *Assignment) string { return a.Pod }),
		byNode:               kube.IndexBy(func(a *Assignment) string { return a.Node }),
		cache.NamespaceIndex: kube.IndexBy(func(a *Assignment) string { return a.Namespace }),
	})
	for _, informer := range c.informers() {
		if err := informer.SetTransform(trim); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *Cluster) informers() []cache.SharedIndexInformer {
	return []cache.SharedIndexInformer{c.pods, c.nodes, c.namespaces, c.identities, c.bindings, c.assignments}
}

// Run starts the watches and waits until they have filled all caches. It returns false if ctx ends first. The watches
// run until ctx ends; wait counts their goroutines.
func (c *Cluster) Run(ctx context.Context, wait *sync.WaitGroup) bool {
	var synced []cache.InformerSynced
	for _, informer := range c.informers() {
		wait.Go(func() { informer.RunWithContext(ctx) })
		synced = append(synced, informer.HasSynced)
	}
	return cache.WaitForCacheSync(ctx.Done(), synced...)
}

// AssignmentsOf returns the assignments of a pod (namespace/name) as they are after the last writes of this process;
// see the package documentation.
func (c *Cluster) AssignmentsOf(pod string) []*Assignment {
	found := c.own.overlay(pod, kube.ByIndex[*Assignment](c.assignments, byPod, pod))
	slices.SortFunc(found, func(a, b *Assignment) int { return cmp.Compare(a.Key(), b.Key()) })
	return found
}

// HasUnobservedWrites reports whether this process created or updated assignments of a pod and the watch has not
// delivered that yet.
func (c *Cluster) HasUnobservedWrites(pod string) bool { return c.own.unobserved(pod) }

// recordWrite records the response to a write of an assignment.
func (c *Cluster) recordWrite(o *v1.AzureAssignedIdentity) *Assignment {
	observed, _ := kube.Get[*Assignment](c.assignments, kube.Key(o.Namespace, o.Name))
	return c.own.record(o, observed)
}

// NamespaceTerminating reports whether a namespace is being deleted or is not in the cache: it was deleted, or the
// watch has not delivered it yet.
func (c *Cluster) NamespaceTerminating(name string) bool {
	n, ok := kube.Get[*namespace](c.namespaces, name)
	return !ok || n.terminating
}

// Pod returns a pod by its key, or nil.
func (c *Cluster) Pod(key string) *Pod {
	p, _ := kube.Get[*Pod](c.pods, key)
	return p
}

// Pods returns all pods.
func (c *Cluster) Pods() []*Pod { return all[*Pod](c.pods) }

// PodsOn returns the pods that are scheduled to a node.
func (c *Cluster) PodsOn(node string) []*Pod { return kube.ByIndex[*Pod](c.pods, byNode, node) }

// Node returns a node, or nil.
func (c *Cluster) Node(name string) *Node {
	n, _ := kube.Get[*Node](c.nodes, name)
	return n
}

// NodesOf returns the nodes of a machine.
func (c *Cluster) NodesOf(machineKey string) []*Node {
	return kube.ByIndex[*Node](c.nodes, byMachine, machineKey)
}

// Binding returns a binding by its key, or nil.
func (c *Cluster) Binding(key string) *Binding {
	b, _ := kube.Get[*Binding](c.bindings, key)
	return b
}

// Identity returns an AzureIdentity by its key, or nil.
func (c *Cluster) Identity(key string) *AzureIdentity {
	i, _ := kube.Get[*AzureIdentity](c.identities, key)
	return i
}

// Assignments returns all assignments as the watch delivered them.
func (c *Cluster) Assignments() []*Assignment { return all[*Assignment](c.assignments) }

// HasAssignments reports whether any assignment is left.
func (c *Cluster) HasAssignments() bool { return len(c.assignments.GetIndexer().ListKeys()) > 0 }

func all[T any](informer cache.SharedIndexInformer) (found []T) {
	for _, o := range informer.GetIndexer().List() {
		if t, ok := o.(T); ok {
			found = append(found, t)
		}
	}
	return found
}
