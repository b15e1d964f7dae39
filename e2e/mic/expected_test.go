package mic

import (
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// expectedAssignment is an identity that a pod should have. It is derived from the objects independently of the
// controller's code.
type expectedAssignment struct {
	pod          string // namespace/name
	uid          string
	node         string
	identity     string // namespace/name
	identityType v1.IdentityType
	resource     string // resource ID in the form of azure.FoldID; "" for types that are not attached to a machine
	machine      string // ID in the form of azure.FoldID; "" if the node is not on Azure
}

// objects are the objects that determine which pod should have which identity, as they were at one time. Callers must
// not change them.
type objects struct {
	pods       []*corev1.Pod
	nodes      []*corev1.Node
	identities []*v1.AzureIdentity
	bindings   []*v1.AzureIdentityBinding
	expected   []expectedAssignment // derived from the fields above
}

var decisiveResources = []string{"pods", "nodes", "azureidentities.aadpodidentity.k8s.io", "azureidentitybindings.aadpodidentity.k8s.io"}

// objectsAt returns the objects as they were at the given time.
func (sim *simulation) objectsAt(when time.Time) *objects {
	version := sim.api.versionAt(when, decisiveResources...)
	if o, ok := sim.objectsByVersion[version]; ok {
		return o
	}
	o := &objects{pods: listObjectsAt[corev1.Pod](sim.api, version), nodes: listObjectsAt[corev1.Node](sim.api, version),
		identities: listObjectsAt[v1.AzureIdentity](sim.api, version), bindings: listObjectsAt[v1.AzureIdentityBinding](sim.api, version)}
	o.expected = o.expectedAssignments()
	sim.objectsByVersion[version] = o
	return o
}

func (o *objects) expectedAssignments() (found []expectedAssignment) {
	identities := map[string]*v1.AzureIdentity{}
	for _, i := range o.identities {
		identities[key(i)] = i
	}
	for _, p := range o.pods {
		label, labelled := p.Labels[v1.BindingLabel]
		providerID, scheduled := o.providerID(p.Spec.NodeName)
		if !scheduled || !labelled || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		has := map[string]bool{}
		for _, b := range o.bindings {
			i := identities[b.Namespace+"/"+b.Spec.AzureIdentity]
			if b.Spec.Selector != label || i == nil || !isUsable(i) || has[key(i)] ||
				i.Annotations[v1.BehaviorAnnotation] == v1.BehaviorNamespaced && i.Namespace != p.Namespace {
				continue
			}
			has[key(i)] = true
			c := expectedAssignment{pod: key(p), uid: string(p.UID), node: p.Spec.NodeName, identity: key(i), identityType: i.Spec.Type, machine: machineOfProviderID(providerID)}
			if i.Spec.Type == v1.UserAssignedMSI {
				c.resource = azure.FoldID(i.Spec.ResourceID)
			}
			found = append(found, c)
		}
	}
	return found
}

func (o *objects) providerID(node string) (string, bool) {
	for _, n := range o.nodes {
		if n.Name == node {
			return n.Spec.ProviderID, true
		}
	}
	return "", false
}

// isUsable reports whether an AzureIdentity is well-formed. The only defect that the tests create is a resource ID that
// is not that of a managed identity.
func isUsable(i *v1.AzureIdentity) bool {
	return i.Spec.Type != v1.UserAssignedMSI || strings.Contains(strings.ToLower(i.Spec.ResourceID), "/userassignedidentities/")
}

// machineOfProviderID returns the folded ID of the virtual machine or scale set of a provider ID, or "" if the
// provider ID is not one of Azure.
func machineOfProviderID(providerID string) string {
	id, ok := strings.CutPrefix(strings.ToLower(providerID), "azure://")
	if !ok {
		return ""
	}
	if set, _, ok := strings.Cut(id, "/virtualmachinescalesets/"); ok {
		name, _, _ := strings.Cut(id[len(set)+len("/virtualmachinescalesets/"):], "/")
		return set + "/virtualmachinescalesets/" + name
	}
	return id
}

// identityOfAssignment returns the folded resource ID of the identity that an assignment needs on the machine; "" for
// types that are not attached.
func identityOfAssignment(a *v1.AzureAssignedIdentity) string {
	if a.Spec.AzureIdentityRef == nil || a.Spec.AzureIdentityRef.Spec.Type != v1.UserAssignedMSI {
		return ""
	}
	return azure.FoldID(a.Spec.AzureIdentityRef.Spec.ResourceID)
}

// ownerPodUID returns the UID of the pod that owns an assignment; "" for assignments of AAD Pod Identity.
func ownerPodUID(a *v1.AzureAssignedIdentity) string {
	for _, r := range a.OwnerReferences {
		if r.Kind == "Pod" {
			return string(r.UID)
		}
	}
	return ""
}

// matches reports whether a is the expected assignment.
func (c expectedAssignment) matches(a *v1.AzureAssignedIdentity) bool {
	i := a.Spec.AzureIdentityRef
	if i == nil || a.Spec.PodNamespace+"/"+a.Spec.Pod != c.pod || i.Metadata.Namespace+"/"+i.Metadata.Name != c.identity {
		return false
	}
	owner := ownerPodUID(a)
	return (owner == "" || owner == c.uid) && a.Spec.NodeName == c.node && i.Spec.Type == c.identityType && identityOfAssignment(a) == c.resource
}

// allowsTokens reports whether an assignment is in a state in which NMI gives tokens to its pod.
func allowsTokens(a *v1.AzureAssignedIdentity) bool {
	return a.Status.Status == v1.AssignmentAssigned || a.Status.Status == v1.AssignmentLegacy && ownerPodUID(a) == ""
}
