package mic

import (
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// expectedAssignment is one identity that one pod is to have, worked out from the objects by other means than the controller's.
type expectedAssignment struct {
	pod          string // namespace/name
	uid          string
	node         string
	identity     string // namespace/name
	identityType v1.IdentityType
	resource     string // folded resource ID; "" for types that need no machine
	machine      string // folded ID; "" if the node has none in Azure
}

// objects are those that decide who is to have what, at some time; to be read only.
type objects struct {
	pods       []*corev1.Pod
	nodes      []*corev1.Node
	identities []*v1.AzureIdentity
	bindings   []*v1.AzureIdentityBinding
	expected   []expectedAssignment // what follows from them
}

var decisiveResources = []string{"pods", "nodes", "azureidentities.aadpodidentity.k8s.io", "azureidentitybindings.aadpodidentity.k8s.io"}

// objectsAt returns those of some time.
func (w *simulation) objectsAt(when time.Time) *objects {
	version := w.api.versionAt(when, decisiveResources...)
	if o, ok := w.objectsByVersion[version]; ok {
		return o
	}
	o := &objects{pods: listObjectsAt[corev1.Pod](w.api, version), nodes: listObjectsAt[corev1.Node](w.api, version),
		identities: listObjectsAt[v1.AzureIdentity](w.api, version), bindings: listObjectsAt[v1.AzureIdentityBinding](w.api, version)}
	o.expected = o.expectedAssignments()
	w.objectsByVersion[version] = o
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

// isUsable tells identities of a form that could work from those that somebody has to correct first. Tests write no other
// malformed ones than these.
func isUsable(i *v1.AzureIdentity) bool {
	return i.Spec.Type != v1.UserAssignedMSI || strings.Contains(strings.ToLower(i.Spec.ResourceID), "/userassignedidentities/")
}

// machineOfProviderID is the virtual machine or scale set of a provider ID, folded, or "" if it is not Azure's.
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

// identityOfAssignment is the identity that an assignment stands for on a machine; "" for types that need none.
func identityOfAssignment(a *v1.AzureAssignedIdentity) string {
	if a.Spec.AzureIdentityRef == nil || a.Spec.AzureIdentityRef.Spec.Type != v1.UserAssignedMSI {
		return ""
	}
	return azure.FoldID(a.Spec.AzureIdentityRef.Spec.ResourceID)
}

// ownerPodUID is the UID of the pod that owns an assignment; "" for those of the predecessor.
func ownerPodUID(a *v1.AzureAssignedIdentity) string {
	for _, r := range a.OwnerReferences {
		if r.Kind == "Pod" {
			return string(r.UID)
		}
	}
	return ""
}

// matches reports whether an assignment is this claim's.
func (c expectedAssignment) matches(a *v1.AzureAssignedIdentity) bool {
	i := a.Spec.AzureIdentityRef
	if i == nil || a.Spec.PodNamespace+"/"+a.Spec.Pod != c.pod || i.Metadata.Namespace+"/"+i.Metadata.Name != c.identity {
		return false
	}
	owner := ownerPodUID(a)
	return (owner == "" || owner == c.uid) && a.Spec.NodeName == c.node && i.Spec.Type == c.identityType && identityOfAssignment(a) == c.resource
}

// allowsTokens reports whether a pod gets tokens by an assignment in its state.
func allowsTokens(a *v1.AzureAssignedIdentity) bool {
	return a.Status.Status == v1.AssignmentAssigned || a.Status.Status == v1.AssignmentLegacy && ownerPodUID(a) == ""
}
