package mic

import (
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// mostInOnePatch is how many identities Azure takes in one update.
const mostInOnePatch = 150

// harmDone lists what must not have happened at any time, from what the API server and ARM wrote down. watchNeeds is how
// long a change of the cluster may take to be known to the controller.
func (w *world) harmDone(watchNeeds time.Duration) (harm []string) {
	requests, changes, made := w.arm.Log(0), w.arm.Changes(0), w.promises()
	for _, r := range requests {
		if r.Operation != azure.OpPatch {
			continue
		}
		if r.Overlap {
			harm = append(harm, fmt.Sprintf("%s: PATCH of %s (+%v -%v) while another was going on", clock(r.Time), short(r.Resource), shorts(r.Add), shorts(r.Remove)))
		}
		if n := len(r.Add) + len(r.Remove); n > mostInOnePatch {
			harm = append(harm, fmt.Sprintf("%s: PATCH of %s with %d identities", clock(r.Time), short(r.Resource), n))
		}
	}
	for _, c := range changes {
		if c.ByHand {
			continue
		}
		if why := w.untouchable(c); why != "" {
			harm = append(harm, fmt.Sprintf("%s: %s: %s %s", clock(c.Time), short(c.Resource), deed(c), why))
		}
		if c.Attached {
			continue
		}
		sent := c.Time
		if i := slices.IndexFunc(requests, func(r azure.ARMRequest) bool { return r.OperationID == c.OperationID }); i >= 0 {
			sent = requests[i].Time
		}
		harm = append(harm, w.inUse(c, sent, watchNeeds)...)
		harm = append(harm, w.promisedMeanwhile(c, sent, made)...)
	}
	return append(harm, w.assignedInVain(made, changes)...)
}

func deed(c azure.ARMChange) string {
	if c.Attached {
		return "attached " + short(c.Identity)
	}
	return "detached " + short(c.Identity)
}

// untouchable says why the controller had to leave an identity alone, or "".
func (w *world) untouchable(c azure.ARMChange) string {
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

// inUse finds pods that lost an identity that they used. A pod used it if, when the update was sent, it had an
// assignment that let it have tokens, and was bound to the identity without a break for as long as the watch needs.
func (w *world) inUse(c azure.ARMChange, sent time.Time, watchNeeds time.Duration) (harm []string) {
	from := sent.Add(-watchNeeds)
	times := append(slices.Concat(w.clusterChanges(from, sent)), from, sent)
	for _, a := range w.assignmentsAt(sent) {
		if resourceOf(a) == c.Identity && lets(a) && w.heldAt(a, c, times) {
			harm = append(harm, fmt.Sprintf("%s: %s detached from %s (sent %s) although it was in use: %s", clock(c.Time), short(c.Identity), short(c.Resource), clock(sent), describe(a)))
		}
	}
	return harm
}

// promisedMeanwhile finds pods to which an identity was promised while it was on its way out.
func (w *world) promisedMeanwhile(c azure.ARMChange, sent time.Time, made []promise) (harm []string) {
	for _, a := range w.assignmentsAt(c.Time) {
		if resourceOf(a) != c.Identity || !lets(a) || ownerOf(a) == "" || !w.heldAt(a, c, []time.Time{c.Time}) {
			continue
		}
		if since := assignedSince(a, c.Time, made); since.After(sent) {
			harm = append(harm, fmt.Sprintf("%s: %s detached from %s (sent %s) and promised at %s: %s", clock(c.Time), short(c.Identity), short(c.Resource), clock(sent), clock(since), describe(a)))
		}
	}
	return harm
}

func (w *world) assignmentsAt(when time.Time) []*v1.AzureAssignedIdentity {
	return at[v1.AzureAssignedIdentity](w.api, w.api.versionAt(when))
}

// clusterChanges are the times at which anything changed of which may follow who is to have what.
func (w *world) clusterChanges(after, until time.Time) []time.Time {
	return slices.Concat(changedBetween[corev1.Pod](w.api, after, until), changedBetween[corev1.Node](w.api, after, until),
		changedBetween[v1.AzureIdentity](w.api, after, until), changedBetween[v1.AzureIdentityBinding](w.api, after, until))
}

// heldAt reports whether an assignment was somebody's due on the machine at each of these times.
func (w *world) heldAt(a *v1.AzureAssignedIdentity, c azure.ARMChange, times []time.Time) bool {
	for _, t := range times {
		claims := w.objectsAt(t).claims
		if !slices.ContainsFunc(claims, func(d claim) bool { return d.machine == c.Resource && d.isFor(a) }) {
			return false
		}
	}
	return true
}

// assignedSince is when an assignment, as it was at a time, was last made Assigned.
func assignedSince(a *v1.AzureAssignedIdentity, until time.Time, made []promise) (since time.Time) {
	for _, p := range made {
		if p.assignment.UID == a.UID && !p.at.After(until) {
			since = p.at
		}
	}
	return since
}

// promise is an assignment becoming Assigned.
type promise struct {
	at         time.Time
	assignment *v1.AzureAssignedIdentity
}

func (w *world) promises() (made []promise) {
	w.api.mu.Lock()
	defer w.api.mu.Unlock()
	for _, c := range kindFor[v1.AzureAssignedIdentity](w.api).history {
		now := seen[v1.AzureAssignedIdentity](c.now)
		if now.Status.Status != v1.AssignmentAssigned || ownerOf(now) == "" || c.gone {
			continue
		}
		if c.before == nil || seen[v1.AzureAssignedIdentity](c.before).Status.Status != v1.AssignmentAssigned {
			made = append(made, promise{c.at, now})
		}
	}
	return made
}

// assignedInVain finds assignments that became Assigned while the identity was not on the machine. Who detaches by hand
// does so behind the controller's back: that is found out later.
func (w *world) assignedInVain(made []promise, changes []azure.ARMChange) (harm []string) {
	for _, p := range made {
		resource := resourceOf(p.assignment)
		providerID, _ := w.objectsAt(p.at).providerID(p.assignment.Spec.NodeName)
		machine := machineOf(providerID)
		if resource == "" || machine == "" {
			continue
		}
		attached := w.attachedFirst[machine][resource]
		byHand := w.machineGone[machine]
		for _, c := range changes {
			if c.Resource == machine && c.Identity == resource && !c.Time.After(p.at) {
				attached, byHand = c.Attached, byHand || c.ByHand
			}
		}
		if !attached && !byHand {
			harm = append(harm, fmt.Sprintf("%s: %s became Assigned, and %s was not on %s", clock(p.at), describe(p.assignment), short(resource), short(machine)))
		}
	}
	return harm
}

func shorts(ids []string) (names []string) {
	for _, id := range ids {
		names = append(names, short(id))
	}
	return names
}

// clock is the time since the test began; faked time begins at midnight.
func clock(t time.Time) string { return t.UTC().Format("15:04:05.000") }
