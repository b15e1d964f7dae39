package mic

import (
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// Managed identities that AzureIdentities name. Azure does not know the last one.
var managedNames = []string{"u0", "u1", "u2", "u3", "ghost"}

// nodeProviders are the nodes of stories. Two spell their scale set differently; two are on nothing that Azure knows.
var nodeProviders = map[string]string{
	"n0": "azure://" + scaleSetID("Set-A") + "/virtualMachines/0",
	"n1": "azure://" + strings.ToLower(scaleSetID("Set-A")) + "/virtualMachines/1",
	"n2": "azure://" + scaleSetID("Set-B") + "/virtualMachines/0",
	"n3": "azure://" + virtualMachineID("n3"),
	"n4": "azure://" + virtualMachineID("n4"),
	"n5": "kind://docker/kind/n5",
}

func sorted[V any](m map[string]V) iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

// addMachine makes a machine, with an identity on it that MIC has no business with.
func (s *sequence) addMachine(id string) {
	if _, there := s.arm.Machine(id); there || id == "" {
		return
	}
	kubelet := identityID("kubelet")
	m := azure.Machine{ID: id, Identities: []string{kubelet}}
	if strings.HasSuffix(id, "a") {
		m.SystemAssigned = &azure.Identity{ClientID: clientID("system"), ObjectID: clientID("system")}
	}
	s.requireNoError(s.arm.AddMachine(m))
	addIdentity(s.initiallyAttached, id, azure.FoldID(kubelet))
	addIdentity(s.foreign, id, azure.FoldID(kubelet))
	s.foreignPeriods = append(s.foreignPeriods, foreignPeriod{machine: id, identity: azure.FoldID(kubelet), from: time.Now()})
}

func (s *sequence) anyMachine(r *rand.Rand) azure.Machine {
	machines := s.arm.Machines()
	return machines[r.IntN(len(machines))]
}

func (s *sequence) changeDelay(r *rand.Rand) string {
	delay := pick(r, 0, 0, 3*time.Second, 20*time.Second, 60*time.Second)
	s.arm.Change(func(a *azure.ARMSettings) { a.Delay = delay })
	return fmt.Sprintf("updates take Azure %s", delay)
}

// failARMRequests makes some of the next requests go wrong.
func (s *sequence) failARMRequests(r *rand.Rand) string {
	f := azure.ARMFault{Count: 1 + r.IntN(4), Operation: pick(r, azure.OpGet, azure.OpPatch, azure.OpPatch, azure.OpPoll, "")}
	if r.IntN(2) == 0 {
		f.Resource = s.anyMachine(r).ID
	}
	switch r.IntN(9) {
	case 0:
		f.Status, f.RetryAfter = http.StatusTooManyRequests, r.IntN(90)
	case 1:
		f.Status = pick(r, http.StatusConflict, http.StatusPreconditionFailed)
	case 2, 3:
		f.Status, f.Apply = pick(r, 500, 502, 503, 504), r.IntN(2) == 0
	case 4:
		f.Hang, f.Apply, f.Count = true, r.IntN(2) == 0, 1+r.IntN(2)
	case 5:
		f.Drop, f.Apply = true, r.IntN(2) == 0
	case 6:
		f.Operation, f.Fails, f.Apply = azure.OpPatch, true, r.IntN(3) == 0
	case 7:
		f.Status = pick(r, http.StatusForbidden, http.StatusUnauthorized, http.StatusNotFound, http.StatusBadRequest)
	case 8:
		f.Latency = randomDuration(r, time.Second, 40*time.Second)
	}
	s.requireNoError(s.arm.SetFault(f))
	return fmt.Sprintf("the next %d requests %q of %q: status %d, retry after %d, hang %t, drop %t, fails %t, late %s, yet applied: %t",
		f.Count, f.Operation, lastSegment(f.Resource), f.Status, f.RetryAfter, f.Hang, f.Drop, f.Fails, f.Latency, f.Apply)
}

// makeIdentityRefused makes Azure refuse one from now on: MIC may not assign it, or it does not exist any more.
func (s *sequence) makeIdentityRefused(r *rand.Rand) string {
	id := azure.FoldID(identityID(pick(r, managedNames[:4]...)))
	naming := pick(r, azure.NamedInDetails, azure.NamedInText, azure.Unnamed)
	s.refused[id] = true
	switch r.IntN(3) {
	case 0:
		s.arm.DeleteIdentity(id)
		delete(s.existing, id)
		return fmt.Sprintf("%s is deleted in Azure", lastSegment(id))
	case 1:
		s.requireNoError(s.arm.SetIdentityFault(azure.IdentityFault{Identity: id, Denied: true, Naming: naming}))
		return fmt.Sprintf("%s may not be assigned by MIC (named: %s)", lastSegment(id), naming)
	default:
		s.requireNoError(s.arm.SetIdentityFault(azure.IdentityFault{Identity: id, Missing: true, Naming: naming}))
		return fmt.Sprintf("Azure does not find %s (named: %s)", lastSegment(id), naming)
	}
}

func (s *sequence) makeIdentityAccepted(r *rand.Rand) string {
	ids := slices.Sorted(maps.Keys(s.refused))
	id := ids[r.IntN(len(ids))]
	if id == azure.FoldID(identityID("ghost")) {
		return ""
	}
	delete(s.refused, id)
	s.defineManagedIdentity(lastSegment(id))
	s.requireNoError(s.arm.SetIdentityFault(azure.IdentityFault{Identity: id}))
	return fmt.Sprintf("%s can be assigned again", lastSegment(id))
}

// defineManagedIdentity is managedIdentity, and notes that it exists.
func (s *sequence) defineManagedIdentity(name string) {
	s.existing[azure.FoldID(s.addManagedIdentity(name))] = true
}

func (s *sequence) detachManually(r *rand.Rand) string {
	m := s.anyMachine(r)
	if len(m.Identities) == 0 {
		return ""
	}
	id := m.Identities[r.IntN(len(m.Identities))]
	s.detachExternally(m.ID, id)
	return fmt.Sprintf("%s is detached from %s by hand", lastSegment(id), lastSegment(m.ID))
}

// attachManually attaches an identity that MIC has not had to do with so far.
func (s *sequence) attachManually(r *rand.Rand) string {
	m := s.anyMachine(r)
	id := identityID(pick(r, "other", "u0", "u1", "u2", "u3"))
	folded := azure.FoldID(id)
	if s.arm.Attached(m.ID, id) || !s.existing[folded] || s.arm.Settings().NoETags && lastSegment(folded) != "other" {
		return ""
	}
	heardOf := func(a *v1.AzureAssignedIdentity) bool { return identityOfAssignment(a) == folded }
	for _, c := range allStates[v1.AzureAssignedIdentity](s.api) {
		if heardOf(c) {
			return ""
		}
	}
	for _, o := range allStates[corev1.ConfigMap](s.api) {
		if strings.Contains(strings.ToLower(fmt.Sprint(o.Data)), folded) {
			return ""
		}
	}
	s.attachExternally(m.ID, id)
	return fmt.Sprintf("%s is attached to %s by somebody else", lastSegment(id), lastSegment(m.ID))
}

func (s *sequence) setMachineState(r *rand.Rand) string {
	m, state := s.anyMachine(r), pick(r, "Deleting", "Updating", "Failed")
	s.requireNoError(s.arm.SetProvisioningState(m.ID, state))
	s.schedule(randomDuration(r, time.Second, 5*time.Minute), func() {
		if _, there := s.arm.Machine(m.ID); there {
			s.requireNoError(s.arm.SetProvisioningState(m.ID, ""))
		}
	})
	return fmt.Sprintf("%s is %s", lastSegment(m.ID), state)
}

func (s *sequence) failAPIRequests(r *rand.Rand) string {
	var statuses []int
	for range 1 + r.IntN(10) {
		statuses = append(statuses, pick(r, 500, 503, 504, 429, 0))
	}
	s.api.failNextRequests(statuses...)
	return fmt.Sprintf("the next requests to the API server: %v", statuses)
}

func (s *sequence) makeAPIUnavailable(r *rand.Rand) string {
	d := randomDuration(r, time.Second, 4*time.Minute)
	s.api.makeUnavailable()
	s.schedule(d, func() {
		s.api.makeAvailable()
		s.logf("   the API server is back")
	})
	return fmt.Sprintf("the API server is away for %s", d)
}

func (s *sequence) expireWatches(*rand.Rand) string {
	s.api.expireWatches()
	return "watches cannot go on where they were"
}

func (s *sequence) delayWatch(r *rand.Rand) string {
	resource, d := pick(r, "pods", "nodes", "azureidentities", "azureidentitybindings", "azureassignedidentities", "namespaces"), randomDuration(r, time.Second, 20*time.Second)
	s.api.delayWatches(resource, d)
	s.maxWatchDelay += d
	return fmt.Sprintf("watches of %s are %s late", resource, d)
}

// crashLeader kills the leader now or at one of its next writes, before or after that has taken effect.
func (s *sequence) crashLeader(r *rand.Rand) string {
	p := s.leader
	s.restartDelay = randomDuration(r, 0, pick(r, time.Second, time.Minute, 4*time.Minute))
	if p == nil {
		return ""
	}
	n, applied := r.IntN(6), r.IntN(2) == 0
	if n == 0 {
		s.handleCrash(p)
		return fmt.Sprintf("%s is killed, to be back after %s", p.conn.name, s.restartDelay)
	}
	p.crashAt(n, applied, func() { s.crashes <- p })
	return fmt.Sprintf("%s is to be killed at write %d from now, applied: %t, to be back after %s", p.conn.name, n, applied, s.restartDelay)
}

// changeLeader makes another one the leader while the last one is stepping down.
func (s *sequence) changeLeader(*rand.Rand) string {
	if s.leader == nil {
		return ""
	}
	s.leader.stop()
	s.leader = nil
	s.startLeader()
	return "the lease goes to another MIC"
}
