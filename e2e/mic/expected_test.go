package mic

import (
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// claim is one identity that one pod is to have, worked out from the objects by other means than the controller's.
type claim struct {
	pod      string // namespace/name
	uid      string
	node     string
	identity string // namespace/name
	kind     v1.IdentityType
	resource string // folded resource ID; "" for types that need no machine
	machine  string // folded ID; "" if the node has none in Azure
}

// objects are those that decide who is to have what, at some time; to be read only.
type objects struct {
	pods       []*corev1.Pod
	nodes      []*corev1.Node
	identities []*v1.AzureIdentity
	bindings   []*v1.AzureIdentityBinding
	claims     []claim // what follows from them
}

var deciding = []string{"pods", "nodes", "azureidentities.aadpodidentity.k8s.io", "azureidentitybindings.aadpodidentity.k8s.io"}

// objectsAt returns those of some time.
func (w *world) objectsAt(when time.Time) *objects {
	version := w.api.versionAt(when, deciding...)
	if o, ok := w.known[version]; ok {
		return o
	}
	o := &objects{pods: at[corev1.Pod](w.api, version), nodes: at[corev1.Node](w.api, version),
		identities: at[v1.AzureIdentity](w.api, version), bindings: at[v1.AzureIdentityBinding](w.api, version)}
	o.claims = o.whoClaimsWhat()
	w.known[version] = o
	return o
}

func (o *objects) whoClaimsWhat() (found []claim) {
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
			if b.Spec.Selector != label || i == nil || !works(i) || has[key(i)] ||
				i.Annotations[v1.BehaviorAnnotation] == v1.BehaviorNamespaced && i.Namespace != p.Namespace {
				continue
			}
			has[key(i)] = true
			c := claim{pod: key(p), uid: string(p.UID), node: p.Spec.NodeName, identity: key(i), kind: i.Spec.Type, machine: machineOf(providerID)}
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

// works tells identities of a form that could work from those that somebody has to correct first. Tests write no other
// malformed ones than these.
func works(i *v1.AzureIdentity) bool {
	return i.Spec.Type != v1.UserAssignedMSI || strings.Contains(strings.ToLower(i.Spec.ResourceID), "/userassignedidentities/")
}

// machineOf is the virtual machine or scale set of a provider ID, folded, or "" if it is not Azure's.
func machineOf(providerID string) string {
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

// resourceOf is the identity that an assignment stands for on a machine; "" for types that need none.
func resourceOf(a *v1.AzureAssignedIdentity) string {
	if a.Spec.AzureIdentityRef == nil || a.Spec.AzureIdentityRef.Spec.Type != v1.UserAssignedMSI {
		return ""
	}
	return azure.FoldID(a.Spec.AzureIdentityRef.Spec.ResourceID)
}

// ownerOf is the UID of the pod that owns an assignment; "" for those of the predecessor.
func ownerOf(a *v1.AzureAssignedIdentity) string {
	for _, r := range a.OwnerReferences {
		if r.Kind == "Pod" {
			return string(r.UID)
		}
	}
	return ""
}

// isFor reports whether an assignment is this claim's.
func (c claim) isFor(a *v1.AzureAssignedIdentity) bool {
	i := a.Spec.AzureIdentityRef
	if i == nil || a.Spec.PodNamespace+"/"+a.Spec.Pod != c.pod || i.Metadata.Namespace+"/"+i.Metadata.Name != c.identity {
		return false
	}
	owner := ownerOf(a)
	return (owner == "" || owner == c.uid) && a.Spec.NodeName == c.node && i.Spec.Type == c.kind && resourceOf(a) == c.resource
}

// lets reports whether a pod gets tokens by an assignment in its state.
func lets(a *v1.AzureAssignedIdentity) bool {
	return a.Status.Status == v1.AssignmentAssigned || a.Status.Status == v1.AssignmentLegacy && ownerOf(a) == ""
}
