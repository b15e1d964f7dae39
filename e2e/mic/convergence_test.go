package mic

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// convergenceErrors lists what is not as it has to be once everything has come to rest.
func (w *simulation) convergenceErrors() (wrong []string) {
	now := w.objectsAt(time.Now())
	claims := now.expected
	wrong = append(wrong, w.assignmentErrors(claims, now)...)
	for _, m := range w.arm.Machines() {
		wrong = append(wrong, w.machineErrors(m, claims)...)
	}
	for _, o := range listObjects[corev1.ConfigMap](w.api) {
		if o.Namespace == micNamespace {
			wrong = append(wrong, w.ledgerErrors(o, claims)...)
		}
	}
	return wrong
}

func (w *simulation) assignmentErrors(claims []expectedAssignment, now *objects) (wrong []string) {
	left := listObjects[v1.AzureAssignedIdentity](w.api)
	for _, c := range claims {
		i := slices.IndexFunc(left, func(a *v1.AzureAssignedIdentity) bool { return ownerPodUID(a) != "" && c.matches(a) })
		if i < 0 {
			wrong = append(wrong, fmt.Sprintf("pod %s has no AzureAssignedIdentity for %s (%s)", c.pod, c.identity, lastSegment(c.resource)))
			continue
		}
		a := left[i]
		left = slices.Delete(left, i, i+1)
		want, message := w.expectedState(c)
		if a.Status.Status != want || (a.Status.Message != "") != message || a.DeletionTimestamp != nil {
			wrong = append(wrong, fmt.Sprintf("%s is %q (message %q, being deleted: %t); want %q, with a message: %t",
				describeAssignment(a), a.Status.Status, a.Status.Message, a.DeletionTimestamp != nil, want, message))
		}
		if a.Namespace+"/"+a.Spec.Pod != c.pod || a.Labels[v1.NodeNameLabel] != v1.NodeNameLabelValue(c.node) || !slices.Contains(a.Finalizers, v1.AssignedIdentityFinalizer) {
			wrong = append(wrong, fmt.Sprintf("%s: namespace %s, labels %v, finalizers %v", describeAssignment(a), a.Namespace, a.Labels, a.Finalizers))
		}
		for _, i := range now.identities {
			if i.Namespace+"/"+i.Name == c.identity && a.Spec.AzureIdentityRef.Spec.ClientID != i.Spec.ClientID {
				wrong = append(wrong, fmt.Sprintf("%s has client ID %s, the AzureIdentity %s", describeAssignment(a), a.Spec.AzureIdentityRef.Spec.ClientID, i.Spec.ClientID))
			}
		}
	}
	for _, a := range left {
		wrong = append(wrong, fmt.Sprintf("%s is left over (%q, being deleted: %t)", describeAssignment(a), a.Status.Status, a.DeletionTimestamp != nil))
	}
	return wrong
}

// expectedState is the state of an assignment at rest, and whether it says what is in the way.
func (w *simulation) expectedState(c expectedAssignment) (v1.AssignmentState, bool) {
	if c.identityType != v1.UserAssignedMSI {
		return v1.AssignmentAssigned, false
	}
	if c.machine != "" && w.arm.Attached(c.machine, c.resource) {
		return v1.AssignmentAssigned, false
	}
	return v1.AssignmentCreated, true
}

func (w *simulation) machineErrors(m azure.Machine, claims []expectedAssignment) (wrong []string) {
	id := azure.FoldID(m.ID)
	var wanted []string
	for _, c := range claims {
		if c.machine == id && c.resource != "" {
			wanted = append(wanted, c.resource)
		}
	}
	for _, i := range wanted {
		if !slices.Contains(m.Identities, i) && !w.refused[i] {
			wrong = append(wrong, fmt.Sprintf("%s is not on %s, where a pod wants it", lastSegment(i), lastSegment(id)))
		}
	}
	for i := range w.foreign[id] {
		if !slices.Contains(m.Identities, i) {
			wrong = append(wrong, fmt.Sprintf("%s is not on %s any more, where somebody else attached it", lastSegment(i), lastSegment(id)))
		}
	}
	for _, i := range m.Identities {
		if !slices.Contains(wanted, i) && !w.foreign[id][i] && !w.immutable[i] {
			wrong = append(wrong, fmt.Sprintf("%s is left on %s", lastSegment(i), lastSegment(id)))
		}
	}
	return wrong
}

var identityPattern = regexp.MustCompile(`(?i)/subscriptions/[^"/]+/resourcegroups/[^"/]+/providers/Microsoft\.ManagedIdentity/userAssignedIdentities/[^"/]+`)

// ledgerErrors looks for identities that the controller remembers of a machine without need, whatever the form.
func (w *simulation) ledgerErrors(o *corev1.ConfigMap, claims []expectedAssignment) (wrong []string) {
	text := fmt.Sprint(o.Data)
	for _, id := range identityPattern.FindAllString(text, -1) {
		id = azure.FoldID(id)
		if !slices.ContainsFunc(claims, func(c expectedAssignment) bool {
			return c.resource == id && c.machine != "" && strings.Contains(strings.ToLower(text), c.machine)
		}) {
			wrong = append(wrong, fmt.Sprintf("ConfigMap %s still has %s: %s", o.Name, lastSegment(id), text))
		}
	}
	return wrong
}

func lastSegment(id string) string { return id[strings.LastIndex(id, "/")+1:] }

func describeAssignment(a *v1.AzureAssignedIdentity) string {
	identity := "?"
	if i := a.Spec.AzureIdentityRef; i != nil {
		identity = i.Metadata.Namespace + "/" + i.Metadata.Name
	}
	return fmt.Sprintf("AzureAssignedIdentity %s/%s (pod %s/%s %s, %s, %s, on %s)", a.Namespace, a.Name, a.Spec.PodNamespace, a.Spec.Pod, ownerPodUID(a), identity, lastSegment(identityOfAssignment(a)), a.Spec.NodeName)
}
