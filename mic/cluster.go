package mic

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/azure"
)

// Names of the indexes.
const (
	bySelector = "selector" // pods and bindings by the selector that makes them meet
	byNode     = "node"     // pods and assignments
	byPod      = "pod"      // assignments
	byIdentity = "identity" // bindings
)

// cluster holds what MIC has to know of the cluster, each object cut down to what is read: of the pods only those that
// a binding could select. Objects in its caches are shared and must not be changed.
//
// It stands on client-go's informers rather than on the cache of controller-runtime, which keeps objects in their own
// types: a cut-down Pod would still take ten times the memory of what is read of it, for every pod of the cluster.
type Cluster struct {
	pods, nodes, namespaces, identities, bindings, assignments cache.SharedIndexInformer

	watchState

	mu       sync.Mutex
	writes   map[string][]*ownWrite // by pod; our own writes that the watch has not brought yet
	deleted  []deletedAssignment    // what the watch said to be gone, of late
	released map[string]struct{}    // UIDs of assignments that were let go, and of whose end the watch has yet to tell
}

// burial is an assignment that is gone.
type deletedAssignment struct {
	key, resourceVersion string
	at                   time.Time
}

// write is an assignment as the API server answered to a write of ours.
type ownWrite struct {
	*Assignment
	expires time.Time
}

// writeKept is how long a write stands for what the watch has not brought. By then it has, or the object is gone and
// the watch had said so before the answer to the write was here.
const WriteTTL = 30 * time.Second

// pod is a pod with the label.
type Pod struct {
	kube.Meta
	UID, Node, Selector string
	Finished            bool // all of its containers are done for good: it needs nothing
}

// node is a node and the machine beneath it.
type Node struct {
	kube.Meta
	Machine    azure.Resource
	MachineKey string // of the machine; "" if there is none that Azure knows
	Problem    string // why there is none
}

// namespace is here only to say whether it is on its way out.
type Namespace struct {
	kube.Meta
	Terminating bool
}

// azureIdentity and binding keep the whole object, of which assignments hold copies. There are far fewer than pods.
type AzureIdentity struct {
	kube.Meta
	Full       *v1.AzureIdentity
	Value      identity.Identity
	ResourceID string // folded resource ID of a managed identity; "" for what needs no machine
}

type Binding struct {
	kube.Meta
	Full  *v1.AzureIdentityBinding
	Value identity.Binding
}

// assignment is an AzureAssignedIdentity.
type Assignment struct {
	kube.Meta
	UID                    string
	Pod, PodUID, Node      string // namespace/name; podUID is "" in objects of the predecessor
	Identity, ResourceID   string // namespace/name; folded resource ID, "" for what needs no machine
	Digest                 uint64 // of the copies
	State                  v1.AssignmentState
	Message                string
	HasFinalizer, Deleting bool     // has our finalizer; is being deleted
	otherFinalizers        []string // of others
}

// legacy reports whether the predecessor wrote it.
func (a *Assignment) Legacy() bool { return a.PodUID == "" }

// digestOf tells whether the copies in an assignment say what the objects say now, as far as anybody reads them.
func digestOf(i *v1.AzureIdentity, b *v1.AzureIdentityBinding) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%+v\x00%s\x00%s\x00%s", identity.FromAzureIdentity(i), b.Namespace, b.Name, b.Spec.Selector)
	return h.Sum64()
}

// trim cuts an object down to what is read here, before it is kept.
func trim(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Pod:
		return &Pod{kube.MetaOf(o), string(o.UID), o.Spec.NodeName, o.Labels[v1.BindingLabel],
			o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed}, nil
	case *corev1.Node:
		return trimNode(o), nil
	case *corev1.Namespace:
		return &Namespace{kube.MetaOf(o), o.DeletionTimestamp != nil}, nil
	case *v1.AzureIdentity:
		o.ManagedFields = nil
		i := &AzureIdentity{Meta: kube.MetaOf(o), Full: o, Value: identity.FromAzureIdentity(o)}
		if i.Value.Kind == identity.UserAssigned {
			i.ResourceID = azure.Fold(i.Value.ResourceID)
		}
		return i, nil
	case *v1.AzureIdentityBinding:
		o.ManagedFields = nil
		return &Binding{kube.MetaOf(o), o, identity.FromAzureIdentityBinding(o)}, nil
	case *v1.AzureAssignedIdentity:
		return trimAssignment(o), nil
	}
	return o, nil
}

func trimNode(o *corev1.Node) *Node {
	n := &Node{Meta: kube.MetaOf(o)}
	machine, err := azure.ParseProviderID(o.Spec.ProviderID)
	if err != nil {
		n.Problem = fmt.Sprintf("spec.providerID of node %s: %v", o.Name, err)
		return n
	}
	n.Machine, n.MachineKey = machine, machine.Key()
	return n
}

func trimAssignment(o *v1.AzureAssignedIdentity) *Assignment {
	a := &Assignment{
		Meta: kube.MetaOf(o), UID: string(o.UID),
		Pod: kube.Key(o.Spec.PodNamespace, o.Spec.Pod), Node: o.Spec.NodeName,
		State: o.Status.Status, Message: o.Status.Message,
		Deleting: o.DeletionTimestamp != nil,
	}
	for _, owner := range o.OwnerReferences {
		if owner.Kind == "Pod" && owner.APIVersion == "v1" {
			a.PodUID = string(owner.UID)
		}
	}
	for _, f := range o.Finalizers {
		if f == v1.AssignedIdentityFinalizer {
			a.HasFinalizer = true
		} else {
			a.otherFinalizers = append(a.otherFinalizers, f)
		}
	}
	if o.Spec.AzureIdentityRef != nil {
		i := o.Spec.AzureIdentityRef.AzureIdentity()
		a.Identity = kube.Key(i.Namespace, i.Name)
		if identity.Kind(i.Spec.Type) == identity.UserAssigned {
			a.ResourceID = azure.Fold(i.Spec.ResourceID)
		}
		if o.Spec.AzureBindingRef != nil {
			a.Digest = digestOf(i, o.Spec.AzureBindingRef.AzureIdentityBinding())
		}
	}
	return a
}

// newCluster prepares the caches; the informers have yet to be run.
func newCluster(core, crds rest.Interface) (*Cluster, error) {
	c := &Cluster{writes: map[string][]*ownWrite{}, released: map[string]struct{}{}}
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
	for _, informer := range c.all() {
		if err := informer.SetTransform(trim); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// byMachine is the index of nodes by the machine beneath them.
const byMachine = "machine"

func (c *Cluster) all() []cache.SharedIndexInformer {
	return []cache.SharedIndexInformer{c.pods, c.nodes, c.namespaces, c.identities, c.bindings, c.assignments}
}

// run fills the caches and waits until all are filled once. They are kept up to date until ctx ends.
func (c *Cluster) Run(ctx context.Context, wait *sync.WaitGroup) bool {
	var synced []cache.InformerSynced
	for _, informer := range c.all() {
		wait.Go(func() { informer.RunWithContext(ctx) })
		synced = append(synced, informer.HasSynced)
	}
	return cache.WaitForCacheSync(ctx.Done(), synced...)
}

// assignmentsOf returns the assignments of a pod (namespace/name), as they are after our own last writes.
func (c *Cluster) AssignmentsOf(pod string) []*Assignment {
	found := kube.ByIndex[*Assignment](c.assignments, byPod, pod)
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	found = slices.DeleteFunc(found, func(a *Assignment) bool {
		_, gone := c.released[a.UID]
		return gone
	})
	for _, w := range c.writes[pod] {
		i := slices.IndexFunc(found, func(a *Assignment) bool { return a.Key() == w.Key() })
		switch {
		case now.After(w.expires):
		case i < 0:
			found = append(found, w.Assignment)
		case newer(w.ResourceVersion, found[i].ResourceVersion):
			found[i] = w.Assignment
		}
	}
	slices.SortFunc(found, func(a, b *Assignment) int { return cmp.Compare(a.Key(), b.Key()) })
	return found
}

// letGo notes that nothing holds an assignment any more that is being deleted.
func (c *Cluster) recordReleased(a *Assignment) {
	c.dropWrite(a.Pod, a.Key(), "")
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.ContainsFunc(c.deleted, func(b deletedAssignment) bool { return b.key == a.Key() }) {
		c.released[a.UID] = struct{}{}
	}
}

// wrote notes what the API server answered to a write, until the watch brings it.
func (c *Cluster) recordWrite(o *v1.AzureAssignedIdentity) *Assignment {
	a := trimAssignment(o)
	seen, ok := kube.Get[*Assignment](c.assignments, a.Key())
	c.dropWrite(a.Pod, a.Key(), "")
	c.mu.Lock()
	defer c.mu.Unlock()
	gone := slices.ContainsFunc(c.deleted, func(b deletedAssignment) bool {
		return b.key == a.Key() && !newer(a.ResourceVersion, b.resourceVersion)
	})
	if !gone && (!ok || newer(a.ResourceVersion, seen.ResourceVersion)) {
		c.writes[a.Pod] = append(c.writes[a.Pod], &ownWrite{a, time.Now().Add(WriteTTL)})
	}
	return a
}

// heard forgets a write that the watch has brought, or that is overtaken.
func (c *Cluster) recordObserved(a *Assignment, gone bool) {
	version := a.ResourceVersion
	if gone {
		version = ""
		c.recordDeleted(a)
	}
	c.dropWrite(a.Pod, a.Key(), version)
}

// bury notes that an assignment is gone, for the case that the answer to a write of ours is still on its way.
func (c *Cluster) recordDeleted(a *Assignment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	old := slices.IndexFunc(c.deleted, func(b deletedAssignment) bool { return now.Sub(b.at) < WriteTTL })
	if old < 0 {
		old = len(c.deleted)
	}
	c.deleted = append(slices.Delete(c.deleted, 0, old), deletedAssignment{a.Key(), a.ResourceVersion, now})
	delete(c.released, a.UID)
}

// unheard reports whether there are writes of ours for a pod that the watch has not brought yet.
func (c *Cluster) HasUnobservedWrites(pod string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.writes[pod]) > 0
}

// forget drops the write of an object, unless it is newer than the version.
func (c *Cluster) dropWrite(pod, key, version string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	writes, ok := c.writes[pod]
	if !ok {
		return
	}
	writes = slices.DeleteFunc(writes, func(w *ownWrite) bool { return w.Key() == key && !newer(w.ResourceVersion, version) })
	if len(writes) == 0 {
		delete(c.writes, pod)
	} else {
		c.writes[pod] = writes
	}
}

// newer reports whether version a is newer than b. Nothing is newer than no version.
func newer(a, b string) bool {
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order > 0
}

// facts are what the decision needs to know about a pod, and the objects behind them.
func (c *Cluster) Facts(p *Pod) (identity.Facts, map[string]*AzureIdentity, []*Binding) {
	var facts identity.Facts
	identities := map[string]*AzureIdentity{}
	bindings := kube.ByIndex[*Binding](c.bindings, bySelector, p.Selector)
	slices.SortFunc(bindings, func(a, b *Binding) int { return cmp.Compare(a.Key(), b.Key()) })
	for _, b := range bindings {
		facts.Bindings = append(facts.Bindings, b.Value)
		key := kube.Key(b.Namespace, b.Value.AzureIdentity)
		if i, ok := kube.Get[*AzureIdentity](c.identities, key); ok && identities[key] == nil {
			identities[key] = i
			facts.Identities = append(facts.Identities, i.Value)
		}
	}
	return facts, identities, bindings
}

// terminating reports whether a namespace is on its way out, or gone.
func (c *Cluster) NamespaceTerminating(name string) bool {
	n, ok := kube.Get[*Namespace](c.namespaces, name)
	return !ok || n.Terminating
}
