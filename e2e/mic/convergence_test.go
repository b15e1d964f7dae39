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

// convergenceErrors lists what differs from the desired state.
func (sim *simulation) convergenceErrors() (wrong []string) {
	c := convergenceCheck{sim, sim.objectsAt(time.Now())}
	wrong = c.assignmentErrors()
	for _, m := range sim.arm.Machines() {
		wrong = append(wrong, c.machineErrors(m)...)
	}
	for _, o := range listObjects[corev1.ConfigMap](sim.api) {
		if o.Namespace == micNamespace {
			wrong = append(wrong, c.ledgerErrors(o)...)
		}
	}
	return wrong
}

// convergenceCheck is a simulation with its objects as of the time of the check.
type convergenceCheck struct {
	*simulation
	now *objects
}

func (check convergenceCheck) assignmentErrors() (wrong []string) {
	remaining := listObjects[v1.AzureAssignedIdentity](check.api)
	for _, c := range check.now.expected {
		i := slices.IndexFunc(remaining, func(a *v1.AzureAssignedIdentity) bool { return ownerPodUID(a) != "" && c.matches(a) })
		if i < 0 {
			wrong = append(wrong, fmt.Sprintf("pod %s has no AzureAssignedIdentity for %s (%s)", c.pod, c.identity, lastSegment(c.resource)))
			continue
		}
		a := remaining[i]
		remaining = slices.Delete(remaining, i, i+1)
		want, message := check.expectedState(c)
		if a.Status.Status != want || (a.Status.Message != "") != message || a.DeletionTimestamp != nil {
			wrong = append(wrong, fmt.Sprintf("%s is %q (message %q, being deleted: %t); want %q, with a message: %t",
				describeAssignment(a), a.Status.Status, a.Status.Message, a.DeletionTimestamp != nil, want, message))
		}
		if a.Namespace+"/"+a.Spec.Pod != c.pod || a.Labels[v1.NodeNameLabel] != v1.NodeNameLabelValue(c.node) || !slices.Contains(a.Finalizers, v1.AssignedIdentityFinalizer) {
			wrong = append(wrong, fmt.Sprintf("%s has a wrong namespace (%s), node label (%v) or finalizer (%v)", describeAssignment(a), a.Namespace, a.Labels, a.Finalizers))
		}
		for _, i := range check.now.identities {
			if i.Namespace+"/"+i.Name == c.identity && a.Spec.AzureIdentityRef.Spec.ClientID != i.Spec.ClientID {
				wrong = append(wrong, fmt.Sprintf("%s has the client ID %s; its AzureIdentity has %s", describeAssignment(a), a.Spec.AzureIdentityRef.Spec.ClientID, i.Spec.ClientID))
			}
		}
	}
	for _, a := range remaining {
		wrong = append(wrong, fmt.Sprintf("%s must not exist (status %q, being deleted: %t)", describeAssignment(a), a.Status.Status, a.DeletionTimestamp != nil))
	}
	return wrong
}

// expectedState returns the state of an assignment after convergence, and whether its status must have a message.
func (check convergenceCheck) expectedState(c expectedAssignment) (v1.AssignmentState, bool) {
	if c.identityType != v1.UserAssignedMSI {
		return v1.AssignmentAssigned, false
	}
	if c.machine != "" && check.arm.Attached(c.machine, c.resource) {
		return v1.AssignmentAssigned, false
	}
	return v1.AssignmentCreated, true
}

func (check convergenceCheck) machineErrors(m azure.Machine) (wrong []string) {
	id := azure.FoldID(m.ID)
	var needed []string
	for _, c := range check.now.expected {
		if c.machine == id && c.resource != "" {
			needed = append(needed, c.resource)
		}
	}
	for _, i := range needed {
		if !slices.Contains(m.Identities, i) && !check.refused[i] {
			wrong = append(wrong, fmt.Sprintf("%s is not attached to %s, where a pod needs it", lastSegment(i), lastSegment(id)))
		}
	}
	for i := range check.foreign[id] {
		if !slices.Contains(m.Identities, i) {
			wrong = append(wrong, fmt.Sprintf("%s is no longer attached to %s, although somebody else attached it", lastSegment(i), lastSegment(id)))
		}
	}
	for _, i := range m.Identities {
		if !slices.Contains(needed, i) && !check.foreign[id][i] && !check.immutable[i] {
			wrong = append(wrong, fmt.Sprintf("%s is still attached to %s, although no pod there needs it", lastSegment(i), lastSegment(id)))
		}
	}
	return wrong
}

var identityPattern = regexp.MustCompile(`(?i)/subscriptions/[^"/]+/resourcegroups/[^"/]+/providers/Microsoft\.ManagedIdentity/userAssignedIdentities/[^"/]+`)

// ledgerErrors finds identities that a ledger of MIC records for a machine although no pod needs them there.
func (check convergenceCheck) ledgerErrors(o *corev1.ConfigMap) (wrong []string) {
	text := fmt.Sprint(o.Data)
	for _, id := range identityPattern.FindAllString(text, -1) {
		id = azure.FoldID(id)
		if !slices.ContainsFunc(check.now.expected, func(c expectedAssignment) bool {
			return c.resource == id && c.machine != "" && strings.Contains(strings.ToLower(text), c.machine)
		}) {
			wrong = append(wrong, fmt.Sprintf("the ledger %s still records %s, which no pod on its machine needs: %s", o.Name, lastSegment(id), text))
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
