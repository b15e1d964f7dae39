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

// managedNames are the managed identities that AzureIdentities reference. "ghost" does not exist in Azure.
var managedNames = []string{"u0", "u1", "u2", "u3", "ghost"}

// nodeProviders are the provider IDs of the nodes, by name. n0 and n1 are in one scale set, but spell its ID
// differently. n5 is not on Azure.
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

// addMachine creates a machine with an identity that MIC must not touch. It does nothing if the machine exists, or if
// id is "", the ID for a node that is not on Azure.
func (s *sequence) addMachine(id string) {
	if _, there := s.arm.Machine(id); there || id == "" {
		return
	}
	kubelet := identityID("kubelet")
	m := azure.Machine{ID: id, Identities: []string{kubelet}}
	if strings.HasSuffix(id, "a") {
		m.SystemAssigned = &azure.Identity{ClientID: clientID("system"), ObjectID: clientID("system")}
	}
	requireNoError(s.t, s.arm.AddMachine(m))
	addIdentity(s.initiallyAttached, id, azure.FoldID(kubelet))
	addIdentity(s.foreign, id, azure.FoldID(kubelet))
	s.foreignPeriods = append(s.foreignPeriods, foreignPeriod{machine: id, identity: azure.FoldID(kubelet), from: time.Now()})
}

func (s *sequence) anyMachine(r *rand.Rand) azure.Machine {
	machines := s.arm.Machines()
	return machines[r.IntN(len(machines))]
}

func changeDelay(s *sequence, r *rand.Rand) string {
	delay := pick(r, 0, 0, 3*time.Second, 20*time.Second, 60*time.Second)
	s.arm.Change(func(a *azure.ARMSettings) { a.Delay = delay })
	return fmt.Sprintf("Azure takes %s for an update", delay)
}

// failARMRequests injects a random fault into some of the next requests to ARM.
func failARMRequests(s *sequence, r *rand.Rand) string {
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
	requireNoError(s.t, s.arm.SetFault(f))
	return fmt.Sprintf("fault for the next %d requests of kind %q (empty: of all kinds) to %q (empty: to all machines): status %d, retry after %d, hang %t, drop %t, fails %t, latency %s, applied: %t",
		f.Count, f.Operation, lastSegment(f.Resource), f.Status, f.RetryAfter, f.Hang, f.Drop, f.Fails, f.Latency, f.Apply)
}

// makeIdentityRefused makes Azure refuse to attach an identity until makeIdentityAccepted is called for it. Either MIC
// has no right to assign the identity, or Azure does not find it.
func makeIdentityRefused(s *sequence, r *rand.Rand) string {
	id := azure.FoldID(identityID(pick(r, managedNames[:4]...)))
	naming := pick(r, azure.NamedInDetails, azure.NamedInText, azure.Unnamed)
	s.refused[id] = true
	switch r.IntN(3) {
	case 0:
		s.arm.DeleteIdentity(id)
		delete(s.existing, id)
		return fmt.Sprintf("%s is deleted in Azure", lastSegment(id))
	case 1:
		requireNoError(s.t, s.arm.SetIdentityFault(azure.IdentityFault{Identity: id, Denied: true, Naming: naming}))
		return fmt.Sprintf("MIC has no right to assign %s (how the error names the identity: %s)", lastSegment(id), naming)
	default:
		requireNoError(s.t, s.arm.SetIdentityFault(azure.IdentityFault{Identity: id, Missing: true, Naming: naming}))
		return fmt.Sprintf("Azure does not find %s (how the error names the identity: %s)", lastSegment(id), naming)
	}
}

func makeIdentityAccepted(s *sequence, r *rand.Rand) string {
	ids := slices.Sorted(maps.Keys(s.refused))
	id := ids[r.IntN(len(ids))]
	if id == azure.FoldID(identityID("ghost")) {
		return ""
	}
	delete(s.refused, id)
	s.defineManagedIdentity(lastSegment(id))
	requireNoError(s.t, s.arm.SetIdentityFault(azure.IdentityFault{Identity: id}))
	return fmt.Sprintf("Azure accepts %s again", lastSegment(id))
}

func (s *sequence) defineManagedIdentity(name string) {
	s.existing[azure.FoldID(s.addManagedIdentity(name))] = true
}

func detachManually(s *sequence, r *rand.Rand) string {
	m := s.anyMachine(r)
	if len(m.Identities) == 0 {
		return ""
	}
	id := m.Identities[r.IntN(len(m.Identities))]
	s.detachExternally(m.ID, id)
	return fmt.Sprintf("%s is detached from %s externally", lastSegment(id), lastSegment(m.ID))
}

// attachManually attaches an identity to a machine, as somebody other than MIC. It does nothing if the identity is
// already attached to the machine, does not exist in Azure, or was ever named by an assignment or a ledger. If ARM
// sends no ETags, it attaches only the identity "other", which MIC never attaches: without ETags, MIC cannot notice
// that somebody attached an identity after MIC had read the machine.
func attachManually(s *sequence, r *rand.Rand) string {
	m := s.anyMachine(r)
	id := identityID(pick(r, "other", "u0", "u1", "u2", "u3"))
	folded := azure.FoldID(id)
	if s.arm.Attached(m.ID, id) || !s.existing[folded] || s.arm.Settings().NoETags && lastSegment(folded) != "other" {
		return ""
	}
	refersToIt := func(a *v1.AzureAssignedIdentity) bool { return identityOfAssignment(a) == folded }
	for _, c := range allStates[v1.AzureAssignedIdentity](s.api) {
		if refersToIt(c) {
			return ""
		}
	}
	for _, o := range allStates[corev1.ConfigMap](s.api) {
		if strings.Contains(strings.ToLower(fmt.Sprint(o.Data)), folded) {
			return ""
		}
	}
	s.attachExternally(m.ID, id)
	return fmt.Sprintf("%s is attached to %s externally", lastSegment(id), lastSegment(m.ID))
}

func setMachineState(s *sequence, r *rand.Rand) string {
	m, state := s.anyMachine(r), pick(r, "Deleting", "Updating", "Failed")
	requireNoError(s.t, s.arm.SetProvisioningState(m.ID, state))
	s.schedule(randomDuration(r, time.Second, 5*time.Minute), func() {
		if _, there := s.arm.Machine(m.ID); there {
			requireNoError(s.t, s.arm.SetProvisioningState(m.ID, ""))
		}
	})
	return fmt.Sprintf("%s has provisioning state %s", lastSegment(m.ID), state)
}

func failAPIRequests(s *sequence, r *rand.Rand) string {
	var statuses []int
	for range 1 + r.IntN(10) {
		statuses = append(statuses, pick(r, 500, 503, 504, 429, 0))
	}
	s.api.failNextRequests(statuses...)
	return fmt.Sprintf("the next requests to the API server fail with %v (0: the connection is lost)", statuses)
}

func makeAPIUnavailable(s *sequence, r *rand.Rand) string {
	d := randomDuration(r, time.Second, 4*time.Minute)
	s.api.makeUnavailable()
	s.schedule(d, func() {
		s.api.makeAvailable()
		s.logf("   the API server is available again")
	})
	return fmt.Sprintf("the API server is unavailable for %s", d)
}

func expireWatches(s *sequence, _ *rand.Rand) string {
	s.api.expireWatches()
	return "the API server closes all watches, and their resource versions have expired"
}

func delayWatch(s *sequence, r *rand.Rand) string {
	resource, d := pick(r, "pods", "nodes", "azureidentities", "azureidentitybindings", "azureassignedidentities", "namespaces"), randomDuration(r, time.Second, 20*time.Second)
	s.api.delayWatches(resource, d)
	s.maxWatchDelay += d
	return fmt.Sprintf("watches of %s are delayed by %s", resource, d)
}

// crashLeader kills the leader, either now or at one of its next writes. In the second case it chooses at random
// whether that write still takes effect.
func crashLeader(s *sequence, r *rand.Rand) string {
	p := s.leader
	s.restartDelay = randomDuration(r, 0, pick(r, time.Second, time.Minute, 4*time.Minute))
	if p == nil {
		return ""
	}
	n, applied := r.IntN(6), r.IntN(2) == 0
	if n == 0 {
		s.handleCrash(p)
		return fmt.Sprintf("%s is killed; the next starts after %s", p.conn.name, s.restartDelay)
	}
	p.crashAt(n, applied, func() { s.crashes <- p })
	return fmt.Sprintf("%s will be killed at its write %d from now, applied: %t; the next starts after %s", p.conn.name, n, applied, s.restartDelay)
}

// changeLeader starts another leader while the previous one is stepping down.
func changeLeader(s *sequence, _ *rand.Rand) string {
	if s.leader == nil {
		return ""
	}
	s.leader.stop()
	s.leader = nil
	s.startLeader()
	return "the leader loses the lease and steps down"
}
