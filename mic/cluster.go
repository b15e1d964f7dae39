package mic

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
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
type cluster struct {
	pods, nodes, namespaces, identities, bindings, assignments cache.SharedIndexInformer

	connection

	mu      sync.Mutex
	written map[string][]*write // by pod; our own writes that the watch has not brought yet
	buried  []burial            // what the watch said to be gone, of late
	let     map[string]struct{} // UIDs of assignments that were let go, and of whose end the watch has yet to tell
}

// burial is an assignment that is gone.
type burial struct {
	key, version string
	at           time.Time
}

// write is an assignment as the API server answered to a write of ours.
type write struct {
	*assignment
	until time.Time
}

// writeKept is how long a write stands for what the watch has not brought. By then it has, or the object is gone and
// the watch had said so before the answer to the write was here.
const writeKept = 30 * time.Second

// object is what the informer needs to know an object by.
type object struct{ namespace, name, version string }

func objectOf(o metav1.Object) object {
	return object{o.GetNamespace(), o.GetName(), o.GetResourceVersion()}
}

// GetObjectMeta makes what embeds an object one for the informer.
func (o *object) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Namespace: o.namespace, Name: o.name, ResourceVersion: o.version}
}

func (o *object) key() string { return keyOf(o.namespace, o.name) }

func keyOf(namespace, name string) string {
	if namespace == "" {
		return name
	}
	return namespace + "/" + name
}

// pod is a pod with the label.
type pod struct {
	object
	uid, node, selector string
	finished            bool // all of its containers are done for good: it needs nothing
}

// node is a node and the machine beneath it.
type node struct {
	object
	machine azure.Resource
	key     string // of the machine; "" if there is none that Azure knows
	problem string // why there is none
}

// namespace is here only to say whether it is on its way out.
type namespace struct {
	object
	terminating bool
}

// azureIdentity and binding keep the whole object, of which assignments hold copies. There are far fewer than pods.
type azureIdentity struct {
	object
	whole    *v1.AzureIdentity
	value    identity.Identity
	resource string // folded resource ID of a managed identity; "" for what needs no machine
}

type binding struct {
	object
	whole *v1.AzureIdentityBinding
	value identity.Binding
}

// assignment is an AzureAssignedIdentity.
type assignment struct {
	object
	uid                string
	pod, podUID, node  string // namespace/name; podUID is "" in objects of the predecessor
	identity, resource string // namespace/name; folded resource ID, "" for what needs no machine
	digest             uint64 // of the copies
	state              v1.AssignmentState
	message            string
	held, deleting     bool     // has our finalizer; is being deleted
	finalizers         []string // of others
}

// legacy reports whether the predecessor wrote it.
func (a *assignment) legacy() bool { return a.podUID == "" }

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
		return &pod{objectOf(o), string(o.UID), o.Spec.NodeName, o.Labels[v1.BindingLabel],
			o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed}, nil
	case *corev1.Node:
		return trimNode(o), nil
	case *corev1.Namespace:
		return &namespace{objectOf(o), o.DeletionTimestamp != nil}, nil
	case *v1.AzureIdentity:
		o.ManagedFields = nil
		i := &azureIdentity{object: objectOf(o), whole: o, value: identity.FromAzureIdentity(o)}
		if i.value.Kind == identity.UserAssigned {
			i.resource = azure.Fold(i.value.ResourceID)
		}
		return i, nil
	case *v1.AzureIdentityBinding:
		o.ManagedFields = nil
		return &binding{objectOf(o), o, identity.FromAzureIdentityBinding(o)}, nil
	case *v1.AzureAssignedIdentity:
		return trimAssignment(o), nil
	}
	return o, nil
}

func trimNode(o *corev1.Node) *node {
	n := &node{object: objectOf(o)}
	machine, err := azure.ParseProviderID(o.Spec.ProviderID)
	if err != nil {
		n.problem = fmt.Sprintf("spec.providerID of node %s: %v", o.Name, err)
		return n
	}
	n.machine, n.key = machine, machine.Key()
	return n
}

func trimAssignment(o *v1.AzureAssignedIdentity) *assignment {
	a := &assignment{
		object: objectOf(o), uid: string(o.UID),
		pod: keyOf(o.Spec.PodNamespace, o.Spec.Pod), node: o.Spec.NodeName,
		state: o.Status.Status, message: o.Status.Message,
		deleting: o.DeletionTimestamp != nil,
	}
	for _, owner := range o.OwnerReferences {
		if owner.Kind == "Pod" && owner.APIVersion == "v1" {
			a.podUID = string(owner.UID)
		}
	}
	for _, f := range o.Finalizers {
		if f == v1.AssignedIdentityFinalizer {
			a.held = true
		} else {
			a.finalizers = append(a.finalizers, f)
		}
	}
	if o.Spec.AzureIdentityRef != nil {
		i := o.Spec.AzureIdentityRef.AzureIdentity()
		a.identity = keyOf(i.Namespace, i.Name)
		if identity.Kind(i.Spec.Type) == identity.UserAssigned {
			a.resource = azure.Fold(i.Spec.ResourceID)
		}
		if o.Spec.AzureBindingRef != nil {
			a.digest = digestOf(i, o.Spec.AzureBindingRef.AzureIdentityBinding())
		}
	}
	return a
}

// newCluster prepares the caches; the informers have yet to be run.
func newCluster(core, crds rest.Interface) (*cluster, error) {
	c := &cluster{written: map[string][]*write{}, let: map[string]struct{}{}}
	informer := func(client rest.Interface, resource string, kind runtime.Object, selector string, indexers cache.Indexers) cache.SharedIndexInformer {
		lw := cache.NewFilteredListWatchFromClient(client, resource, metav1.NamespaceAll, func(o *metav1.ListOptions) { o.LabelSelector = selector })
		c.heed(resource, lw)
		return cache.NewSharedIndexInformer(lw, kind, 0, indexers)
	}
	c.pods = informer(core, "pods", &corev1.Pod{}, v1.BindingLabel, cache.Indexers{
		bySelector: index(func(p *pod) string { return p.selector }),
		byNode:     index(func(p *pod) string { return p.node }),
	})
	c.nodes = informer(core, "nodes", &corev1.Node{}, "", cache.Indexers{byMachine: index(func(n *node) string { return n.key })})
	c.namespaces = informer(core, "namespaces", &corev1.Namespace{}, "", cache.Indexers{})
	c.identities = informer(crds, v1.AzureIdentities, &v1.AzureIdentity{}, "", cache.Indexers{})
	c.bindings = informer(crds, v1.AzureIdentityBindings, &v1.AzureIdentityBinding{}, "", cache.Indexers{
		bySelector: index(func(b *binding) string { return b.value.Selector }),
		byIdentity: index(func(b *binding) string { return keyOf(b.namespace, b.value.AzureIdentity) }),
	})
	c.assignments = informer(crds, v1.AzureAssignedIdentities, &v1.AzureAssignedIdentity{}, "", cache.Indexers{
		byPod:                index(func(a *assignment) string { return a.pod }),
		byNode:               index(func(a *assignment) string { return a.node }),
		cache.NamespaceIndex: index(func(a *assignment) string { return a.namespace }),
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

func (c *cluster) all() []cache.SharedIndexInformer {
	return []cache.SharedIndexInformer{c.pods, c.nodes, c.namespaces, c.identities, c.bindings, c.assignments}
}

// index makes an index function of one that gives the one value of an object, or "".
func index[T any](value func(T) string) cache.IndexFunc {
	return func(o any) ([]string, error) {
		t, ok := o.(T)
		if !ok {
			return nil, fmt.Errorf("%T in a cache of another kind", o)
		}
		if v := value(t); v != "" {
			return []string{v}, nil
		}
		return nil, nil
	}
}

// run fills the caches and waits until all are filled once. They are kept up to date until ctx ends.
func (c *cluster) run(ctx context.Context, wait *sync.WaitGroup) bool {
	var synced []cache.InformerSynced
	for _, informer := range c.all() {
		wait.Go(func() { informer.RunWithContext(ctx) })
		synced = append(synced, informer.HasSynced)
	}
	return cache.WaitForCacheSync(ctx.Done(), synced...)
}

func get[T any](informer cache.SharedIndexInformer, key string) (none T, ok bool) {
	o, ok, err := informer.GetIndexer().GetByKey(key)
	if err != nil || !ok {
		return none, false
	}
	t, ok := o.(T)
	return t, ok
}

// with returns the objects that an index has under a value. The index exists, so there is no error.
func with[T any](informer cache.SharedIndexInformer, name, value string) []T {
	objects, _ := informer.GetIndexer().ByIndex(name, value)
	found := make([]T, 0, len(objects))
	for _, o := range objects {
		if t, ok := o.(T); ok {
			found = append(found, t)
		}
	}
	return found
}

// assignmentsOf returns the assignments of a pod (namespace/name), as they are after our own last writes.
func (c *cluster) assignmentsOf(pod string) []*assignment {
	found := with[*assignment](c.assignments, byPod, pod)
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	found = slices.DeleteFunc(found, func(a *assignment) bool {
		_, gone := c.let[a.uid]
		return gone
	})
	for _, w := range c.written[pod] {
		i := slices.IndexFunc(found, func(a *assignment) bool { return a.key() == w.key() })
		switch {
		case now.After(w.until):
		case i < 0:
			found = append(found, w.assignment)
		case newer(w.version, found[i].version):
			found[i] = w.assignment
		}
	}
	slices.SortFunc(found, func(a, b *assignment) int { return cmp.Compare(a.key(), b.key()) })
	return found
}

// letGo notes that nothing holds an assignment any more that is being deleted.
func (c *cluster) letGo(a *assignment) {
	c.forget(a.pod, a.key(), "")
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.ContainsFunc(c.buried, func(b burial) bool { return b.key == a.key() }) {
		c.let[a.uid] = struct{}{}
	}
}

// wrote notes what the API server answered to a write, until the watch brings it.
func (c *cluster) wrote(o *v1.AzureAssignedIdentity) *assignment {
	a := trimAssignment(o)
	seen, ok := get[*assignment](c.assignments, a.key())
	c.forget(a.pod, a.key(), "")
	c.mu.Lock()
	defer c.mu.Unlock()
	gone := slices.ContainsFunc(c.buried, func(b burial) bool { return b.key == a.key() && !newer(a.version, b.version) })
	if !gone && (!ok || newer(a.version, seen.version)) {
		c.written[a.pod] = append(c.written[a.pod], &write{a, time.Now().Add(writeKept)})
	}
	return a
}

// heard forgets a write that the watch has brought, or that is overtaken.
func (c *cluster) heard(a *assignment, gone bool) {
	version := a.version
	if gone {
		version = ""
		c.bury(a)
	}
	c.forget(a.pod, a.key(), version)
}

// bury notes that an assignment is gone, for the case that the answer to a write of ours is still on its way.
func (c *cluster) bury(a *assignment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	old := slices.IndexFunc(c.buried, func(b burial) bool { return now.Sub(b.at) < writeKept })
	if old < 0 {
		old = len(c.buried)
	}
	c.buried = append(slices.Delete(c.buried, 0, old), burial{a.key(), a.version, now})
	delete(c.let, a.uid)
}

// unheard reports whether there are writes of ours for a pod that the watch has not brought yet.
func (c *cluster) unheard(pod string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.written[pod]) > 0
}

// forget drops the write of an object, unless it is newer than the version.
func (c *cluster) forget(pod, key, version string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	writes, ok := c.written[pod]
	if !ok {
		return
	}
	writes = slices.DeleteFunc(writes, func(w *write) bool { return w.key() == key && !newer(w.version, version) })
	if len(writes) == 0 {
		delete(c.written, pod)
	} else {
		c.written[pod] = writes
	}
}

// newer compares resource versions, which the API server guarantees to be numbers that grow. Nothing is newer than none.
func newer(a, b string) bool {
	if b == "" {
		return false
	}
	x, errX := strconv.ParseUint(a, 10, 64)
	y, errY := strconv.ParseUint(b, 10, 64)
	return errX == nil && errY == nil && x > y
}

// facts are what the decision needs to know about a pod, and the objects behind them.
func (c *cluster) facts(p *pod) (identity.Facts, map[string]*azureIdentity, []*binding) {
	var facts identity.Facts
	identities := map[string]*azureIdentity{}
	bindings := with[*binding](c.bindings, bySelector, p.selector)
	slices.SortFunc(bindings, func(a, b *binding) int { return cmp.Compare(a.key(), b.key()) })
	for _, b := range bindings {
		facts.Bindings = append(facts.Bindings, b.value)
		key := keyOf(b.namespace, b.value.AzureIdentity)
		if i, ok := get[*azureIdentity](c.identities, key); ok && identities[key] == nil {
			identities[key] = i
			facts.Identities = append(facts.Identities, i.value)
		}
	}
	return facts, identities, bindings
}

// terminating reports whether a namespace is on its way out, or gone.
func (c *cluster) terminating(name string) bool {
	n, ok := get[*namespace](c.namespaces, name)
	return !ok || n.terminating
}
