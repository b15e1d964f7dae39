package cluster

import (
	"fmt"
	"hash/fnv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/azure"
)

// Pod is a pod that a binding could select: it has the label aadpodidbinding.
type Pod struct {
	kube.Meta
	UID, Node, Selector string
	Finished            bool // its phase is Succeeded or Failed: no container runs again, and it needs nothing
}

// Node is a node and the machine that it runs on.
type Node struct {
	kube.Meta
	Machine    azure.Resource
	MachineKey string // "" if the provider ID of the node does not name a machine of Azure
	Problem    string // why MachineKey is ""
}

// namespace is a namespace; MIC only needs to know whether it is terminating.
type namespace struct {
	kube.Meta
	terminating bool
}

// AzureIdentity is an AzureIdentity. It keeps the full object, which is copied into assignments. This takes little
// memory, because there are far fewer AzureIdentities than pods.
type AzureIdentity struct {
	kube.Meta
	Full       *v1.AzureIdentity
	Value      identity.Identity
	ResourceID string // folded resource ID of a managed identity; "" for an identity that needs no machine
}

// Binding is an AzureIdentityBinding. It keeps the full object, which is copied into assignments.
type Binding struct {
	kube.Meta
	Full  *v1.AzureIdentityBinding
	Value identity.Binding
}

// Assignment is an AzureAssignedIdentity.
type Assignment struct {
	kube.Meta
	UID             string
	Pod             string // namespace/name
	PodUID          string // "" in objects of AAD Pod Identity
	Node            string
	Identity        string // namespace/name of the AzureIdentity
	ResourceID      string // folded; "" for an identity that needs no machine
	Digest          uint64 // of the copies of the identity and the binding
	State           v1.AssignmentState
	Message         string
	Deleting        bool
	HasFinalizer    bool     // the finalizer of MIC
	otherFinalizers []string // all but that of MIC
}

// Reference returns a reference to the pod, for Events.
func (p *Pod) Reference() *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID)}
}

// Reference returns a reference to the binding, for Events.
func (b *Binding) Reference() *corev1.ObjectReference {
	return &corev1.ObjectReference{
		APIVersion: v1.GroupVersion.String(), Kind: "AzureIdentityBinding", Namespace: b.Namespace, Name: b.Name, UID: b.Full.UID,
	}
}

// Legacy reports whether AAD Pod Identity wrote the assignment: only MIC makes the pod the owner.
func (a *Assignment) Legacy() bool { return a.PodUID == "" }

// digestOf returns a hash of those fields of an identity and a binding that NMI or MIC reads. The copies in an
// assignment are up to date if they have the same digest as the objects.
func digestOf(i *v1.AzureIdentity, b *v1.AzureIdentityBinding) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%+v\x00%s\x00%s\x00%s", identity.FromAzureIdentity(i), b.Namespace, b.Name, b.Spec.Selector)
	return h.Sum64()
}

// trim is the transform of all informers: it returns an object with only the fields that MIC reads, and for identities
// and bindings also the full object.
func trim(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Pod:
		return &Pod{kube.MetaOf(o), string(o.UID), o.Spec.NodeName, o.Labels[v1.BindingLabel],
			o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed}, nil
	case *corev1.Node:
		return trimNode(o), nil
	case *corev1.Namespace:
		return &namespace{kube.MetaOf(o), o.DeletionTimestamp != nil}, nil
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
		n.Problem = fmt.Sprintf("spec.providerID of node %s does not name a machine of Azure, so MIC attaches no identity to this node: %v", o.Name, err)
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
