package mic

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

var (
	seedFlag      = flag.Uint64("seed", 0, "run the sequence with this seed and the sequences that failed once, and no other; 0: see -sequences")
	stepsFlag     = flag.String("steps", "", "run only the steps with these numbers of each sequence, such as 2,3,7; empty: run all steps")
	traceFlag     = flag.Bool("trace", false, "print for a failed sequence also the controller's writes, its requests to ARM and its log")
	sequencesFlag = flag.Int("sequences", 0, "how many random sequences to run; 0: the default, which is smaller with -race")
	freshFlag     = flag.Bool("fresh", false, "start at a seed derived from the current time, so that each run has new sequences")
)

// setUp creates the initial state: the behavior of Azure, machines, nodes, some objects, in some sequences assignments
// of AAD Pod Identity, and a leader.
func (s *sequence) setUp() {
	r := rand.New(rand.NewPCG(s.seed, 1<<32))
	s.arm.Change(func(a *azure.ARMSettings) {
		a.Delay = pick(r, 0, 0, 3*time.Second, 30*time.Second)
		a.RetryAfter = pick(r, 0, 1, 10)
		a.Naming = pick(r, azure.NamedInDetails, azure.NamedInText, azure.Unnamed)
		a.Casing = pick(r, azure.CasingAsSent, azure.CasingResourcegroups, azure.CasingLower, azure.CasingUpper, azure.CasingChanging)
		a.LateErrors, a.Early, a.NoETags, a.Limits = r.IntN(3) == 0, r.IntN(3) == 0, r.IntN(5) == 0, r.IntN(5) == 0
	})
	s.api.mu.Lock()
	s.api.faults.noWatchList, s.api.faults.bookmarks = r.IntN(4) == 0, r.IntN(4) == 0
	s.api.mu.Unlock()
	for _, name := range managedNames {
		if name != "ghost" {
			s.defineManagedIdentity(name)
		}
	}
	for _, name := range []string{"kubelet", "other"} {
		s.defineManagedIdentity(name)
		s.neverBound[azure.FoldID(identityID(name))] = true
	}
	s.refused[azure.FoldID(identityID("ghost"))] = true
	if r.IntN(3) == 0 {
		s.cfg.Immutable = []string{clientID("u0")}
		s.immutable[azure.FoldID(identityID("u0"))] = true
	}
	for _, name := range namespaces {
		s.addNamespace(name)
	}
	for name, providerID := range sorted(nodeProviders) {
		s.addMachine(machineOfProviderID(providerID))
		s.addNode(name, providerID)
	}
	for range 4 {
		createIdentity(s, r)
		createBinding(s, r)
	}
	for range r.IntN(5) {
		createPod(s, r)
	}
	if r.IntN(3) == 0 {
		s.addLegacyAssignments(r)
	}
	s.logf("   %s", s.describeState())
	s.startLeader()
}

// addLegacyAssignments creates what AAD Pod Identity leaves behind: assignments in the form of AAD Pod Identity, for
// existing pods and for a pod that does not exist. For each assignment of a managed identity that is not in state
// Created, it attaches the identity.
func (s *sequence) addLegacyAssignments(r *rand.Rand) {
	now := s.objectsAt(time.Now())
	for _, c := range append(slices.Clone(now.expected), expectedAssignment{pod: "red/gone", node: "n0", identity: "red/i0", machine: machineOfProviderID(nodeProviders["n0"]), resource: azure.FoldID(identityID("u1"))}) {
		state := pick(r, v1.AssignmentAssigned, v1.AssignmentAssigned, v1.AssignmentCreated, v1.AssignmentLegacy)
		if c.resource != "" && (c.machine == "" || !s.existing[c.resource]) {
			state = v1.AssignmentCreated
		}
		if s.addLegacyAssignment(c, state) && state != v1.AssignmentCreated && c.resource != "" {
			requireNoError(s.t, s.arm.Attach(c.machine, c.resource))
		}
	}
}

// addLegacyAssignment creates an assignment in the form of AAD Pod Identity. It returns false if the API server
// refuses, for example because an assignment of the same name exists.
func (s *sequence) addLegacyAssignment(c expectedAssignment, state v1.AssignmentState) bool {
	podNamespace, pod := splitKey(c.pod)
	namespace, name := splitKey(c.identity)
	_, err := createObject(s.api, &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: pod + "-" + podNamespace + "-" + name,
			Labels: map[string]string{v1.NodeNameLabel: c.node}, Finalizers: []string{v1.AssignedIdentityFinalizer}},
		Spec: v1.AzureAssignedIdentitySpec{Pod: pod, PodNamespace: podNamespace, NodeName: c.node,
			AzureIdentityRef: (&v1.AzureIdentity{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: v1.AzureIdentitySpec{Type: c.identityType, ResourceID: c.resource}}).Copy(),
			AzureBindingRef:  (&v1.AzureIdentityBinding{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}).Copy()},
		Status: v1.AzureAssignedIdentityStatus{Status: state},
	})
	if err == nil {
		s.logf("   AAD Pod Identity assigned %s (%s) to pod %s on %s: %q", c.identity, lastSegment(c.resource), c.pod, c.node, state)
	}
	return err == nil
}

func (s *sequence) describeState() string {
	text := fmt.Sprintf("%+v; immutable: %v", s.arm.Settings(), s.cfg.Immutable)
	for _, i := range listObjects[v1.AzureIdentity](s.api) {
		text += fmt.Sprintf("\n   identity %s: %s", key(i), describeSpec(i.Spec))
	}
	for _, b := range listObjects[v1.AzureIdentityBinding](s.api) {
		text += fmt.Sprintf("\n   binding %s: %s for %q", key(b), b.Spec.AzureIdentity, b.Spec.Selector)
	}
	for _, p := range listObjects[corev1.Pod](s.api) {
		text += fmt.Sprintf("\n   pod %s (%s) with %q on %q", key(p), p.UID, p.Labels[v1.BindingLabel], p.Spec.NodeName)
	}
	return text
}

// runSequence runs the given steps of the sequence with the seed.
func runSequence(t *testing.T, seed uint64, steps []int) (o outcome) {
	synctest.Test(t, func(t *testing.T) {
		s := newSequence(t, seed)
		defer s.close()
		if *traceFlag {
			s.traceRequests()
		}
		s.setUp()
		s.run(steps)
		o.errors = append(s.converge(), s.violations(s.maxWatchDelay)...)
		o.log = s.log
	})
	return o
}

func stepsOf(seed uint64) []int {
	if *stepsFlag != "" {
		var steps []int
		for text := range strings.SplitSeq(*stepsFlag, ",") {
			step, err := strconv.Atoi(text)
			if err != nil {
				panic(err)
			}
			steps = append(steps, step)
		}
		return steps
	}
	r := rand.New(rand.NewPCG(seed, 2<<32))
	steps := make([]int, 8+r.IntN(8))
	for i := range steps {
		steps[i] = i
	}
	return steps
}

// minimizeSteps tries to remove the steps one by one. It keeps a step removed if the sequence fails without the step,
// too. It returns the outcome of the shortest sequence that fails, and the steps of that sequence. The outcome is empty if
// no step was removed.
func minimizeSteps(t *testing.T, seed uint64, steps []int) (outcome, []int) {
	var shortest outcome
	for i := len(steps) - 1; i >= 0; i-- {
		fewer := slices.Delete(slices.Clone(steps), i, i+1)
		for range 2 {
			if o := runSequence(t, seed, fewer); len(o.errors) > 0 {
				steps, shortest = fewer, o
				break
			}
		}
	}
	return shortest, steps
}

// formerFailures are seeds of sequences that failed once.
var formerFailures = []uint64{
	1795334226108038248, 1795334226108038490, // an assignment remained although its pod no longer needed it
	1795334378719304021, 1795334588804852191, 1795334588804853193, // MIC took an update in progress for finished
	1795335930879708681,                      // an assignment of AAD Pod Identity named a node other than its pod's
	1795336505139002702,                      // MIC could not read the machine, and removed its update from the ledger
	1795338935932751759, 1795338935932752895, // Azure lost track of an update
}

func TestRandomSequencesDetachNothingInUseAndConverge(t *testing.T) {
	// Without -fresh the sequences are the same each time, so that the result depends only on the code. `make fuzz`
	// runs new ones.
	first, count := uint64(1), defaultSequences
	if *freshFlag {
		first = uint64(time.Now().UnixNano())
	}
	if *sequencesFlag > 0 {
		count = *sequencesFlag
	}
	if *seedFlag != 0 {
		first, count = *seedFlag, 1
	}
	t.Logf("the seeds of the random sequences start at %d; -seed repeats one of them", first)
	seeds := append(slices.Clone(formerFailures), make([]uint64, count)...)
	for i := range count {
		seeds[len(formerFailures)+i] = first + uint64(i)
	}
	var next, failures atomic.Int64
	var workers sync.WaitGroup
	for range 2 * runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for i := next.Add(1) - 1; int(i) < len(seeds) && failures.Load() < 5; i = next.Add(1) - 1 {
				seed := seeds[i]
				o := runSequence(t, seed, stepsOf(seed))
				if len(o.errors) == 0 {
					continue
				}
				failures.Add(1)
				shortest, steps := minimizeSteps(t, seed, stepsOf(seed))
				if len(shortest.errors) == 0 {
					shortest = o
				}
				t.Errorf("seed %d failed; steps %v:\n%s", seed, steps, shortest)
			}
		})
	}
	workers.Wait()
}
