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

// violations describes everything in the histories of the API server and of ARM that must never happen. maxWatchDelay
// is the longest time until the controller receives a change.
func (sim *simulation) violations(maxWatchDelay time.Duration) (found []string) {
	v := &violationCheck{simulation: sim, requests: sim.arm.Log(0), transitions: assignedTransitions(sim.api), maxWatchDelay: maxWatchDelay}
	for _, r := range v.requests {
		if r.Operation != azure.OpPatch {
			continue
		}
		if r.Overlap {
			found = append(found, fmt.Sprintf("%s: PATCH of %s (+%v -%v) while another update of the machine was in progress", formatTime(r.Time), lastSegment(r.Resource), lastSegments(r.Add), lastSegments(r.Remove)))
		}
		if n := len(r.Add) + len(r.Remove); n > maxIdentitiesPerPatch {
			found = append(found, fmt.Sprintf("%s: PATCH of %s with %d identities; Azure accepts %d", formatTime(r.Time), lastSegment(r.Resource), n, maxIdentitiesPerPatch))
		}
	}
	changes := sim.arm.Changes(0)
	for _, c := range changes {
		if !c.ByHand {
			found = append(found, v.checkChange(c)...)
		}
	}
	return append(found, v.assignedButNotAttached(changes)...)
}

// violationCheck is a simulation with the histories that its checks use.
type violationCheck struct {
	*simulation
	requests      []azure.ARMRequest
	transitions   []assignedTransition
	maxWatchDelay time.Duration
}

// checkChange checks one change that the controller made.
func (v *violationCheck) checkChange(c azure.ARMChange) (found []string) {
	if why := v.whyForbidden(c); why != "" {
		found = append(found, fmt.Sprintf("%s: %s: forbidden change of MIC: %s %s", formatTime(c.Time), lastSegment(c.Resource), describeChange(c), why))
	}
	if c.Attached {
		return found
	}
	sent := c.Time
	if i := slices.IndexFunc(v.requests, func(r azure.ARMRequest) bool { return r.OperationID == c.OperationID }); i >= 0 {
		sent = v.requests[i].Time
	}
	found = append(found, v.detachedInUse(c, sent)...)
	return append(found, v.assignedDuringDetach(c, sent)...)
}

func describeChange(c azure.ARMChange) string {
	if c.Attached {
		return "attached " + lastSegment(c.Identity)
	}
	return "detached " + lastSegment(c.Identity)
}

// whyForbidden returns why the controller must not make this change, or "".
func (v *violationCheck) whyForbidden(c azure.ARMChange) string {
	switch {
	case c.Identity == azure.SystemIdentity:
		return "(the system-assigned identity)"
	case v.neverBound[c.Identity]:
		return "(which no AzureIdentity ever referenced)"
	case !c.Attached && v.immutable[c.Identity]:
		return "(which must never be detached)"
	case !c.Attached && v.wasForeign(c):
		return "(which somebody else attached)"
	}
	return ""
}

// detachedInUse finds pods that lost an identity in use. The parameter sent is the time when MIC sent the update. The
// identity was in use if at that time the pod had an assignment that allowed tokens, and had been bound to the identity
// without a break for v.maxWatchDelay.
func (v *violationCheck) detachedInUse(c azure.ARMChange, sent time.Time) (found []string) {
	from := sent.Add(-v.maxWatchDelay)
	times := append(slices.Concat(v.decisiveChangeTimes(from, sent)), from, sent)
	for _, a := range v.assignmentsAt(sent) {
		if identityOfAssignment(a) == c.Identity && allowsTokens(a) && v.expectedAtAll(a, c, times) {
			found = append(found, fmt.Sprintf("%s: %s detached from %s (sent %s) although it was in use: %s", formatTime(c.Time), lastSegment(c.Identity), lastSegment(c.Resource), formatTime(sent), describeAssignment(a)))
		}
	}
	return found
}

// assignedDuringDetach finds assignments that became Assigned while their identity was being detached.
func (v *violationCheck) assignedDuringDetach(c azure.ARMChange, sent time.Time) (found []string) {
	for _, a := range v.assignmentsAt(c.Time) {
		if identityOfAssignment(a) != c.Identity || !allowsTokens(a) || ownerPodUID(a) == "" || !v.expectedAtAll(a, c, []time.Time{c.Time}) {
			continue
		}
		if since := assignedSince(a, c.Time, v.transitions); since.After(sent) {
			found = append(found, fmt.Sprintf("%s: %s detached from %s (sent %s), but an assignment of it became Assigned meanwhile, at %s: %s", formatTime(c.Time), lastSegment(c.Identity), lastSegment(c.Resource), formatTime(sent), formatTime(since), describeAssignment(a)))
		}
	}
	return found
}

func (v *violationCheck) assignmentsAt(when time.Time) []*v1.AzureAssignedIdentity {
	return listObjectsAt[v1.AzureAssignedIdentity](v.api, v.api.versionAt(when))
}

// decisiveChangeTimes returns the times of changes to objects that determine which pod should have which identity.
func (v *violationCheck) decisiveChangeTimes(after, until time.Time) []time.Time {
	return slices.Concat(changeTimes[corev1.Pod](v.api, after, until), changeTimes[corev1.Node](v.api, after, until),
		changeTimes[v1.AzureIdentity](v.api, after, until), changeTimes[v1.AzureIdentityBinding](v.api, after, until))
}

// expectedAtAll reports whether the assignment a was expected on the machine of the change c at each of the times.
func (v *violationCheck) expectedAtAll(a *v1.AzureAssignedIdentity, c azure.ARMChange, times []time.Time) bool {
	for _, t := range times {
		expected := v.objectsAt(t).expected
		if !slices.ContainsFunc(expected, func(d expectedAssignment) bool { return d.machine == c.Resource && d.matches(a) }) {
			return false
		}
	}
	return true
}

// assignedSince returns the last time, not later than until, when an assignment became Assigned; zero if there is none.
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

func assignedTransitions(s *apiServer) (transitions []assignedTransition) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range kindFor[v1.AzureAssignedIdentity](s).history {
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

// assignedButNotAttached finds assignments that became Assigned while the identity was not attached. It ignores deleted
// machines, and identities that were attached or detached externally: the controller learns of such changes only later.
func (v *violationCheck) assignedButNotAttached(changes []azure.ARMChange) (found []string) {
	for _, p := range v.transitions {
		resource := identityOfAssignment(p.assignment)
		providerID, _ := v.objectsAt(p.at).providerID(p.assignment.Spec.NodeName)
		machine := machineOfProviderID(providerID)
		if resource == "" || machine == "" {
			continue
		}
		attached := v.initiallyAttached[machine][resource]
		external := v.deletedMachines[machine]
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
