package mic

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// runScenario runs a test with a fake clock in a simulation that has the namespaces blue and red, and a scale set with
// the nodes n0 and n1. After the test it fails the test for each of the simulation's violations.
func runScenario(t *testing.T, test func(*testing.T, *scenario)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		sim := newSimulation(t)
		defer sim.close()
		for _, name := range []string{"blue", "red"} {
			sim.addNamespace(name)
		}
		s := &scenario{simulation: sim, t: t, set: sim.addScaleSet("Set-A", "n0", "n1")}
		sim.attachForeignIdentity("kubelet", s.set)
		test(t, s)
		for _, violation := range sim.violations(time.Second) {
			t.Error(violation)
		}
	})
}

// scenario is the test environment of most tests.
type scenario struct {
	*simulation
	t   *testing.T
	set string // the scale set of n0 and n1
}

// eventually waits until a condition holds, and fails the test if it does not hold within timeout.
func (s *scenario) eventually(timeout time.Duration, what string, holds func() bool) {
	s.t.Helper()
	for end := time.Now().Add(timeout); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("%s: this did not happen within %s: %s; convergence errors: %q", formatTime(time.Now()), timeout, what, s.convergenceErrors())
		}
	}
}

// consistently checks a condition every 200 ms during d. It fails the test as soon as the condition does not hold.
func (s *scenario) consistently(d time.Duration, what string, holds func() bool) {
	s.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if !holds() {
			s.t.Fatalf("%s: this condition does not hold: %s", formatTime(time.Now()), what)
		}
	}
}

// waitAssigned waits until all expected assignments of the pods are Assigned.
func (s *scenario) waitAssigned(timeout time.Duration, pods ...string) {
	s.t.Helper()
	for _, pod := range pods {
		s.eventually(timeout, pod+" has its assignments", func() bool { return s.isAssigned(pod) })
	}
}

func (s *scenario) isAssigned(pod string) bool {
	expected, found := false, s.assignmentsOf(pod)
	for _, c := range s.objectsAt(time.Now()).expected {
		if c.pod != pod {
			continue
		}
		expected = true
		if !slices.ContainsFunc(found, func(a *v1.AzureAssignedIdentity) bool { return ownerPodUID(a) != "" && c.matches(a) && allowsTokens(a) }) {
			return false
		}
	}
	return expected
}

// waitUnassigned waits until a pod has no assignment.
func (s *scenario) waitUnassigned(timeout time.Duration, pod string) {
	s.t.Helper()
	s.eventually(timeout, pod+" has no assignment", func() bool { return len(s.assignmentsOf(pod)) == 0 })
}

func (s *scenario) deletePod(key string) {
	namespace, name := splitKey(key)
	if !deleteObject[corev1.Pod](s.api, namespace, name, 0) {
		s.t.Fatalf("pod %s cannot be deleted: it does not exist", key)
	}
}

// attached returns a function that reports whether the identity is attached to the machine.
func (s *scenario) attached(machine, identity string) func() bool {
	return func() bool { return s.arm.Attached(machine, identity) }
}

func not(holds func() bool) func() bool { return func() bool { return !holds() } }

// expectStable checks that MIC converges within three seconds, that it then sends no update to Azure during d, and that
// it is still converged after d.
func (s *scenario) expectStable(d time.Duration) {
	s.t.Helper()
	s.eventually(3*time.Second, "MIC has converged", func() bool { return len(s.convergenceErrors()) == 0 })
	before := len(s.patchRequests(""))
	time.Sleep(d)
	if after := s.patchRequests(""); len(after) > before {
		s.t.Errorf("MIC sent updates although it had converged: %v", patchSummaries(after[before:]))
	}
	for _, wrong := range s.convergenceErrors() {
		s.t.Error(wrong)
	}
}

func patchSummaries(patches []azure.ARMRequest) (texts []string) {
	for _, p := range patches {
		texts = append(texts, formatTime(p.Time)+" "+lastSegment(p.Resource)+" +"+strings.Join(lastSegments(p.Add), ",")+" -"+strings.Join(lastSegments(p.Remove), ",")+" "+p.Code)
	}
	return texts
}

// acceptedPatches returns the updates that ARM accepted for a machine; "" stands for all machines.
func (s *scenario) acceptedPatches(machine string) []azure.ARMRequest {
	return slices.DeleteFunc(s.patchRequests(machine), func(r azure.ARMRequest) bool { return !r.Accepted })
}

// events returns the texts of the Events about an object.
func (s *scenario) events(kind, key string) (texts []string) {
	for _, e := range listObjects[corev1.Event](s.api) {
		if e.InvolvedObject.Kind == kind && e.InvolvedObject.Namespace+"/"+e.InvolvedObject.Name == key {
			texts = append(texts, e.Reason+": "+e.Message)
		}
	}
	return texts
}
