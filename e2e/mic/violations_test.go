package mic

import (
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// maxIdentitiesPerPatch is how many identities Azure takes in one update.
const maxIdentitiesPerPatch = 150

// violations lists what must not have happened at any time, from what the API server and ARM wrote down. watchNeeds is how
// long a change of the cluster may take to be known to the controller.
func (w *simulation) violations(watchNeeds time.Duration) (harm []string) {
	requests, changes, made := w.arm.Log(0), w.arm.Changes(0), w.assignedTransitions()
	for _, r := range requests {
		if r.Operation != azure.OpPatch {
			continue
		}
		if r.Overlap {
			harm = append(harm, fmt.Sprintf("%s: PATCH of %s (+%v -%v) while another was going on", formatTime(r.Time), lastSegment(r.Resource), lastSegments(r.Add), lastSegments(r.Remove)))
		}
		if n := len(r.Add) + len(r.Remove); n > maxIdentitiesPerPatch {
			harm = append(harm, fmt.Sprintf("%s: PATCH of %s with %d identities", formatTime(r.Time), lastSegment(r.Resource), n))
		}
	}
	for _, c := range changes {
		if c.ByHand {
			continue
		}
		if why := w.whyForbidden(c); why != "" {
			harm = append(harm, fmt.Sprintf("%s: %s: %s %s", formatTime(c.Time), lastSegment(c.Resource), describeChange(c), why))
		}
		if c.Attached {
			continue
		}
		sent := c.Time
		if i := slices.IndexFunc(requests, func(r azure.ARMRequest) bool { return r.OperationID == c.OperationID }); i >= 0 {
			sent = requests[i].Time
		}
		harm = append(harm, w.detachedInUse(c, sent, watchNeeds)...)
		harm = append(harm, w.assignedDuringDetach(c, sent, made)...)
	}
	return append(harm, w.assignedButNotAttached(made, changes)...)
}

func describeChange(c azure.ARMChange) string {
	if c.Attached {
		return "attached " + lastSegment(c.Identity)
	}
	return "detached " + lastSegment(c.Identity)
}

// whyForbidden says why the controller had to leave an identity alone, or "".
func (w *simulation) whyForbidden(c azure.ARMChange) string {
	switch {
	case c.Identity == azure.SystemIdentity:
		return "(the machine's own)"
	case w.neverBound[c.Identity]:
		return "(nothing in the cluster ever named it)"
	case !c.Attached && w.immutable[c.Identity]:
		return "(never to be detached)"
	case !c.Attached && w.wasForeign(c):
		return "(which somebody else had attached)"
	}
	return ""
}

// detachedInUse finds pods that lost an identity that they used. A pod used it if, when the update was sent, it had an
// assignment that let it have tokens, and was bound to the identity without a break for as long as the watch needs.
func (w *simulation) detachedInUse(c azure.ARMChange, sent time.Time, watchNeeds time.Duration) (harm []string) {
	from := sent.Add(-watchNeeds)
	times := append(slices.Concat(w.decisiveChangeTimes(from, sent)), from, sent)
	for _, a := range w.assignmentsAt(sent) {
		if identityOfAssignment(a) == c.Identity && allowsTokens(a) && w.expectedAtAll(a, c, times) {
			harm = append(harm, fmt.Sprintf("%s: %s detached from %s (sent %s) although it was in use: %s", formatTime(c.Time), lastSegment(c.Identity), lastSegment(c.Resource), formatTime(sent), describeAssignment(a)))
		}
	}
	return harm
}

// assignedDuringDetach finds pods to which an identity was promised while it was on its way out.
func (w *simulation) assignedDuringDetach(c azure.ARMChange, sent time.Time, made []assignedTransition) (harm []string) {
	for _, a := range w.assignmentsAt(c.Time) {
		if identityOfAssignment(a) != c.Identity || !allowsTokens(a) || ownerPodUID(a) == "" || !w.expectedAtAll(a, c, []time.Time{c.Time}) {
			continue
		}
		if since := assignedSince(a, c.Time, made); since.After(sent) {
			harm = append(harm, fmt.Sprintf("%s: %s detached from %s (sent %s) and promised at %s: %s", formatTime(c.Time), lastSegment(c.Identity), lastSegment(c.Resource), formatTime(sent), formatTime(since), describeAssignment(a)))
		}
	}
	return harm
}

func (w *simulation) assignmentsAt(when time.Time) []*v1.AzureAssignedIdentity {
	return listObjectsAt[v1.AzureAssignedIdentity](w.api, w.api.versionAt(when))
}

// decisiveChangeTimes are the times at which anything changed of which may follow who is to have what.
func (w *simulation) decisiveChangeTimes(after, until time.Time) []time.Time {
	return slices.Concat(changeTimes[corev1.Pod](w.api, after, until), changeTimes[corev1.Node](w.api, after, until),
		changeTimes[v1.AzureIdentity](w.api, after, until), changeTimes[v1.AzureIdentityBinding](w.api, after, until))
}

// expectedAtAll reports whether an assignment was somebody's due on the machine at each of these times.
func (w *simulation) expectedAtAll(a *v1.AzureAssignedIdentity, c azure.ARMChange, times []time.Time) bool {
	for _, t := range times {
		claims := w.objectsAt(t).expected
		if !slices.ContainsFunc(claims, func(d expectedAssignment) bool { return d.machine == c.Resource && d.matches(a) }) {
			return false
		}
	}
	return true
}

// assignedSince is when an assignment, as it was at a time, was last made Assigned.
func assignedSince(a *v1.AzureAssignedIdentity, until time.Time, made []assignedTransition) (since time.Time) {
	for _, p := range made {
		if p.assignment.UID == a.UID && !p.at.After(until) {
			since = p.at
		}
	}
	return since
}

// assignedTransition is an assignment becoming Assigned.
type assignedTransition struct {
	at         time.Time
	assignment *v1.AzureAssignedIdentity
}

func (w *simulation) assignedTransitions() (made []assignedTransition) {
	w.api.mu.Lock()
	defer w.api.mu.Unlock()
	for _, c := range kindFor[v1.AzureAssignedIdentity](w.api).history {
		now := decodedObject[v1.AzureAssignedIdentity](c.after)
		if now.Status.Status != v1.AssignmentAssigned || ownerPodUID(now) == "" || c.deleted {
			continue
		}
		if c.before == nil || decodedObject[v1.AzureAssignedIdentity](c.before).Status.Status != v1.AssignmentAssigned {
			made = append(made, assignedTransition{c.at, now})
		}
	}
	return made
}

// assignedButNotAttached finds assignments that became Assigned while the identity was not on the machine. Who detaches by hand
// does so behind the controller's back: that is found out later.
func (w *simulation) assignedButNotAttached(made []assignedTransition, changes []azure.ARMChange) (harm []string) {
	for _, p := range made {
		resource := identityOfAssignment(p.assignment)
		providerID, _ := w.objectsAt(p.at).providerID(p.assignment.Spec.NodeName)
		machine := machineOfProviderID(providerID)
		if resource == "" || machine == "" {
			continue
		}
		attached := w.initiallyAttached[machine][resource]
		byHand := w.deletedMachines[machine]
		for _, c := range changes {
			if c.Resource == machine && c.Identity == resource && !c.Time.After(p.at) {
				attached, byHand = c.Attached, byHand || c.ByHand
			}
		}
		if !attached && !byHand {
			harm = append(harm, fmt.Sprintf("%s: %s became Assigned, and %s was not on %s", formatTime(p.at), describeAssignment(p.assignment), lastSegment(resource), lastSegment(machine)))
		}
	}
	return harm
}

func lastSegments(ids []string) (names []string) {
	for _, id := range ids {
		names = append(names, lastSegment(id))
	}
	return names
}

// formatTime is the time since the test began; faked time begins at midnight.
func formatTime(t time.Time) string { return t.UTC().Format("15:04:05.000") }
