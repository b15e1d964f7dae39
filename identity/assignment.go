package identity

import "fmt"

// State is how far the assignment of an identity to the pod's machine has come.
type State string

const (
	StateLegacy     State = "" // written before states existed; see Assignment.Usable
	StateCreated    State = "Created"
	StateAssigned   State = "Assigned"
	StateUnassigned State = "Unassigned"
)

// Assignment is an AzureAssignedIdentity, as far as it matters here.
type Assignment struct {
	IdentityNamespace, IdentityName string
	// Kind and ResourceID are those that the identity had when the assignment was made.
	Kind       Kind
	ResourceID string

	PodNamespace, PodName string
	// PodUID is that of the pod that owns the object. Objects of the predecessor have no owner.
	PodUID string

	State State
	// Message is why the identity is not on the machine yet; empty if nothing is in the way.
	Message string
}

// Covers reports whether the assignment is about this pod and this identity as both are now. One that was made for an
// earlier pod of the name, or before the identity became another resource, says nothing about these.
func (a Assignment) Covers(pod Pod, i *Identity) bool {
	return a.PodName == pod.Name && a.PodNamespace == pod.Namespace && (a.PodUID == "" || a.PodUID == pod.UID) &&
		a.IdentityName == i.Name && a.IdentityNamespace == i.Namespace && a.Kind == i.Kind &&
		(i.Kind != UserAssigned || sameResource(a.ResourceID, i.ResourceID))
}

// Usable reports whether the pod may use the identity. An object without a state is from before there were states, when
// it meant just that; but one that a pod owns is MIC's, and MIC has not said a word on it yet.
func (a Assignment) Usable() bool {
	return a.State == StateAssigned || a.State == StateLegacy && a.PodUID == ""
}

// Assigned returns nil if the identity is assigned to the machine of the pod, or else the decision to wait for that.
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
		d.Detail = fmt.Sprintf("AzureIdentity %s could not be assigned to the machine of pod %s/%s so far: %s", i.Key(), pod.Namespace, pod.Name, message)
	case created:
		d.Detail = fmt.Sprintf("AzureIdentity %s is being assigned to the machine of pod %s/%s", i.Key(), pod.Namespace, pod.Name)
	default:
		d.Detail = fmt.Sprintf("AzureIdentity %s is not assigned to the machine of pod %s/%s, and MIC has not taken it up yet", i.Key(), pod.Namespace, pod.Name)
	}
	return &d
}
