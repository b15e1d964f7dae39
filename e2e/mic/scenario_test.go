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

// runScenario runs a test in faked time, in a world with two namespaces and a scale set beneath two nodes, and looks in the
// end for harm that the test itself did not look for.
func runScenario(t *testing.T, test func(*testing.T, *scenario)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newSimulation(t)
		defer w.close()
		for _, name := range []string{"blue", "red"} {
			w.addNamespace(name)
		}
		s := &scenario{simulation: w, t: t, set: w.addScaleSet("Set-A", "n0", "n1")}
		w.attachForeignIdentity("kubelet", s.set)
		test(t, s)
		for _, harm := range w.violations(time.Second) {
			t.Error(harm)
		}
	})
}

// scenario is what most tests need.
type scenario struct {
	*simulation
	t   *testing.T
	set string // the scale set beneath n0 and n1
}

// eventually waits until something holds, and fails the test if it does not in time.
func (s *scenario) eventually(most time.Duration, what string, holds func() bool) {
	s.t.Helper()
	for end := time.Now().Add(most); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("%s: not within %s: %s; wrong is: %q", formatTime(time.Now()), most, what, s.convergenceErrors())
		}
	}
}

// consistently fails the test if something does not hold at any time from now on.
func (s *scenario) consistently(d time.Duration, what string, holds func() bool) {
	s.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if !holds() {
			s.t.Fatalf("%s: does not hold: %s", formatTime(time.Now()), what)
		}
	}
}

// waitAssigned waits until all that pods are to have is Assigned.
func (s *scenario) waitAssigned(most time.Duration, pods ...string) {
	s.t.Helper()
	for _, pod := range pods {
		s.eventually(most, pod+" has what it is to have", func() bool { return s.isAssigned(pod) })
	}
}

func (s *scenario) isAssigned(pod string) bool {
	claimed, found := false, s.assignmentsOf(pod)
	for _, c := range s.objectsAt(time.Now()).expected {
		if c.pod != pod {
			continue
		}
		claimed = true
		if !slices.ContainsFunc(found, func(a *v1.AzureAssignedIdentity) bool { return ownerPodUID(a) != "" && c.matches(a) && allowsTokens(a) }) {
			return false
		}
	}
	return claimed
}

// waitUnassigned waits until a pod has no assignment left.
func (s *scenario) waitUnassigned(most time.Duration, pod string) {
	s.t.Helper()
	s.eventually(most, pod+" has no assignment any more", func() bool { return len(s.assignmentsOf(pod)) == 0 })
}

func (s *scenario) deletePod(key string) {
	namespace, name := splitKey(key)
	if !deleteObject[corev1.Pod](s.api, namespace, name, 0) {
		s.t.Fatalf("no pod %s", key)
	}
}

// attached reports whether an identity is on a machine.
func (s *scenario) attached(machine, identity string) func() bool {
	return func() bool { return s.arm.Attached(machine, identity) }
}

func not(holds func() bool) func() bool { return func() bool { return !holds() } }

// expectStable checks that nothing is left to do: all is as it is to be, and Azure is not asked to change anything.
func (s *scenario) expectStable(d time.Duration) {
	s.t.Helper()
	s.eventually(3*time.Second, "all is as it is to be", func() bool { return len(s.convergenceErrors()) == 0 })
	before := len(s.patchRequests(""))
	time.Sleep(d)
	if after := s.patchRequests(""); len(after) > before {
		s.t.Errorf("updates without a reason: %v", patchSummaries(after[before:]))
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

// acceptedPatches are the updates that ARM carried out.
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
