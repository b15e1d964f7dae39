package mic

import (
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// maxIdentitiesPerPatch is how many identities Azure accepts in one update.
const maxIdentitiesPerPatch = 150

// violations lists what must not have happened at any time, from the histories of the API server and of ARM. maxWatchDelay
// is how long it may take until the controller has received a change.
func (sim *simulation) violations(maxWatchDelay time.Duration) (found []string) {
	requests, changes, transitions := sim.arm.Log(0), sim.arm.Changes(0), sim.assignedTransitions()
	for _, r := range requests {
		if r.Operation != azure.OpPatch {
			continue
		}
		if r.Overlap {
			found = append(found, fmt.Sprintf("%s: PATCH of %s (+%v -%v) while another was in progress", formatTime(r.Time), lastSegment(r.Resource), lastSegments(r.Add), lastSegments(r.Remove)))
		}
		if n := len(r.Add) + len(r.Remove); n > maxIdentitiesPerPatch {
			found = append(found, fmt.Sprintf("%s: PATCH of %s with %d identities", formatTime(r.Time), lastSegment(r.Resource), n))
		}
	}
	for _, c := range changes {
		if c.ByHand {
			continue
		}
		if why := sim.whyForbidden(c); why != "" {
			found = append(found, fmt.Sprintf("%s: %s: %s %s", formatTime(c.Time), lastSegment(c.Resource), describeChange(c), why))
		}
		if c.Attached {
			continue
		}
		sent := c.Time
		if i := slices.IndexFunc(requests, func(r azure.ARMRequest) bool { return r.OperationID == c.OperationID }); i >= 0 {
			sent = requests[i].Time
		}
		found = append(found, sim.detachedInUse(c, sent, maxWatchDelay)...)
		found = append(found, sim.assignedDuringDetach(c, sent, transitions)...)
	}
	return append(found, sim.assignedButNotAttached(transitions, changes)...)
}

func describeChange(c azure.ARMChange) string {
	if c.Attached {
		return "attached " + lastSegment(c.Identity)
	}
	return "detached " + lastSegment(c.Identity)
}

// whyForbidden returns why the controller must not make this change, or "".
func (sim *simulation) whyForbidden(c azure.ARMChange) string {
	switch {
	case c.Identity == azure.SystemIdentity:
		return "(the system-assigned identity)"
	case sim.neverBound[c.Identity]:
		return "(which no AzureIdentity ever referenced)"
	case !c.Attached && sim.immutable[c.Identity]:
		return "(which must never be detached)"
	case !c.Attached && sim.wasForeign(c):
		return "(which somebody else attached)"
	}
	return ""
}

// detachedInUse finds pods that lost an identity in use. A pod used it if, when the update was sent, the pod had an
// assignment that allowed tokens, and had been bound to the identity without a break for maxWatchDelay.
func (sim *simulation) detachedInUse(c azure.ARMChange, sent time.Time, maxWatchDelay time.Duration) (found []string) {
	from := sent.Add(-maxWatchDelay)
	times := append(slices.Concat(sim.decisiveChangeTimes(from, sent)), from, sent)
	for _, a := range sim.assignmentsAt(sent) {
		if identityOfAssignment(a) == c.Identity && allowsTokens(a) && sim.expectedAtAll(a, c, times) {
			found = append(found, fmt.Sprintf("%s: %s detached from %s (sent %s) although it was in use: %s", formatTime(c.Time), lastSegment(c.Identity), lastSegment(c.Resource), formatTime(sent), describeAssignment(a)))
		}
	}
	return found
}

// assignedDuringDetach finds assignments that became Assigned while their identity was being detached.
func (sim *simulation) assignedDuringDetach(c azure.ARMChange, sent time.Time, transitions []assignedTransition) (found []string) {
	for _, a := range sim.assignmentsAt(c.Time) {
		if identityOfAssignment(a) != c.Identity || !allowsTokens(a) || ownerPodUID(a) == "" || !sim.expectedAtAll(a, c, []time.Time{c.Time}) {
			continue
		}
		if since := assignedSince(a, c.Time, transitions); since.After(sent) {
			found = append(found, fmt.Sprintf("%s: %s detached from %s (sent %s) and Assigned at %s: %s", formatTime(c.Time), lastSegment(c.Identity), lastSegment(c.Resource), formatTime(sent), formatTime(since), describeAssignment(a)))
		}
	}
	return found
}

func (sim *simulation) assignmentsAt(when time.Time) []*v1.AzureAssignedIdentity {
	return listObjectsAt[v1.AzureAssignedIdentity](sim.api, sim.api.versionAt(when))
}

// decisiveChangeTimes returns the times of changes to objects that determine which pod should have which identity.
func (sim *simulation) decisiveChangeTimes(after, until time.Time) []time.Time {
	return slices.Concat(changeTimes[corev1.Pod](sim.api, after, until), changeTimes[corev1.Node](sim.api, after, until),
		changeTimes[v1.AzureIdentity](sim.api, after, until), changeTimes[v1.AzureIdentityBinding](sim.api, after, until))
}

// expectedAtAll reports whether the assignment was expected on the machine of the change at each of these times.
func (sim *simulation) expectedAtAll(a *v1.AzureAssignedIdentity, c azure.ARMChange, times []time.Time) bool {
	for _, t := range times {
		expected := sim.objectsAt(t).expected
		if !slices.ContainsFunc(expected, func(d expectedAssignment) bool { return d.machine == c.Resource && d.matches(a) }) {
			return false
		}
	}
	return true
}

// assignedSince returns when an assignment last became Assigned, up to some time.
func assignedSince(a *v1.AzureAssignedIdentity, until time.Time, transitions []assignedTransition) (since time.Time) {
	for _, p := range transitions {
		if p.assignment.UID == a.UID && !p.at.After(until) {
			since = p.at
		}
	}
	return since
}

// assignedTransition is an assignment that became Assigned.
type assignedTransition struct {
	at         time.Time
	assignment *v1.AzureAssignedIdentity
}

func (sim *simulation) assignedTransitions() (transitions []assignedTransition) {
	sim.api.mu.Lock()
	defer sim.api.mu.Unlock()
	for _, c := range kindFor[v1.AzureAssignedIdentity](sim.api).history {
		now := decodedObject[v1.AzureAssignedIdentity](c.after)
		if now.Status.Status != v1.AssignmentAssigned || ownerPodUID(now) == "" || c.deleted {
			continue
		}
		if c.before == nil || decodedObject[v1.AzureAssignedIdentity](c.before).Status.Status != v1.AssignmentAssigned {
			transitions = append(transitions, assignedTransition{c.at, now})
		}
	}
	return transitions
}

// assignedButNotAttached finds assignments that became Assigned while the identity was not attached. External detachments
// are excluded: the controller learns of them only later.
func (sim *simulation) assignedButNotAttached(transitions []assignedTransition, changes []azure.ARMChange) (found []string) {
	for _, p := range transitions {
		resource := identityOfAssignment(p.assignment)
		providerID, _ := sim.objectsAt(p.at).providerID(p.assignment.Spec.NodeName)
		machine := machineOfProviderID(providerID)
		if resource == "" || machine == "" {
			continue
		}
		attached := sim.initiallyAttached[machine][resource]
		external := sim.deletedMachines[machine]
		for _, c := range changes {
			if c.Resource == machine && c.Identity == resource && !c.Time.After(p.at) {
				attached, external = c.Attached, external || c.ByHand
			}
		}
		if !attached && !external {
			found = append(found, fmt.Sprintf("%s: %s became Assigned, but %s was not attached to %s", formatTime(p.at), describeAssignment(p.assignment), lastSegment(resource), lastSegment(machine)))
		}
	}
	return found
}

func lastSegments(ids []string) (names []string) {
	for _, id := range ids {
		names = append(names, lastSegment(id))
	}
	return names
}

// formatTime formats the time since the start of the test: the fake clock starts at midnight.
func formatTime(t time.Time) string { return t.UTC().Format("15:04:05.000") }
