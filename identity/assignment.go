package identity

import "fmt"

// State is the state of an assignment.
type State string

const (
	StateLegacy     State = "" // the object has no state; see Usable
	StateCreated    State = "Created"
	StateAssigned   State = "Assigned"
	StateUnassigned State = "Unassigned"
)

// Assignment has the fields of an AzureAssignedIdentity that the decision reads.
type Assignment struct {
	IdentityNamespace, IdentityName string
	// Kind and ResourceID of the identity when the assignment was created.
	Kind       Kind
	ResourceID string

	PodNamespace, PodName string
	// PodUID is the UID of the pod that owns the AzureAssignedIdentity. It is empty for objects of AAD Pod Identity, which
	// have no owner.
	PodUID string

	State State
	// Message says why the identity could not be attached to the machine yet; empty if there is no problem.
	Message string
}

// Covers reports whether the assignment is for this pod and the current version of this identity. An assignment with an
// owner does not cover a later pod of the same name. An assignment without an owner has no UID to compare, so it covers
// each pod of its namespace and name. After a change of the identity's type or, for UserAssigned, of its resource ID,
// the assignment no longer covers the identity.
func (a Assignment) Covers(pod Pod, i *Identity) bool {
	return a.PodName == pod.Name && a.PodNamespace == pod.Namespace && (a.PodUID == "" || a.PodUID == pod.UID) &&
		a.IdentityName == i.Name && a.IdentityNamespace == i.Namespace && a.Kind == i.Kind &&
		(i.Kind != UserAssigned || sameResource(a.ResourceID, i.ResourceID))
}

// Usable reports whether the pod may use the identity. StateLegacy has two meanings. Without an owner, the assignment
// is from a version of AAD Pod Identity that had no states, and its existence means that the identity is attached. With
// a pod as its owner, the assignment is from MIC, which has not set the state yet.
func (a Assignment) Usable() bool {
	return a.State == StateAssigned || a.State == StateLegacy && a.PodUID == ""
}

// Assigned returns nil if one of the assignments allows the pod to use the identity. Otherwise it returns a decision
// with the outcome Pending.
func Assigned(pod Pod, i *Identity, assignments []Assignment) *Decision {
	created, message := false, ""
	for _, a := range assignments {
		if !a.Covers(pod, i) || a.State == StateUnassigned {
			continue
		}
		if a.Usable() {
			return nil
		}
		created, message = true, max(message, a.Message)
	}
	d := Decision{Outcome: Pending, Reason: AssignmentPending, Identity: i}
	switch {
	case message != "":
		d.Reason = AssignmentFailed
		d.Detail = fmt.Sprintf("AzureIdentity %s could not be assigned to the machine of pod %s/%s yet: %s", i.Key(), pod.Namespace, pod.Name, message)
	case created:
		d.Detail = fmt.Sprintf("AzureIdentity %s is being assigned to the machine of pod %s/%s", i.Key(), pod.Namespace, pod.Name)
	default:
		d.Detail = fmt.Sprintf("AzureIdentity %s is not assigned to the machine of pod %s/%s yet: MIC still has to create an AzureAssignedIdentity for the pod and the current AzureIdentity", i.Key(), pod.Namespace, pod.Name)
	}
	return &d
}
