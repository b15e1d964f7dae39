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

// inWorld runs a test in faked time, in a world with two namespaces and a scale set beneath two nodes, and looks in the
// end for harm that the test itself did not look for.
func inWorld(t *testing.T, test func(*testing.T, *scene)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		for _, name := range []string{"blue", "red"} {
			w.namespace(name)
		}
		s := &scene{world: w, t: t, set: w.scaleSet("Set-A", "n0", "n1")}
		w.machineWith("kubelet", s.set)
		test(t, s)
		for _, harm := range w.harmDone(time.Second) {
			t.Error(harm)
		}
	})
}

// scene is what most tests need.
type scene struct {
	*world
	t   *testing.T
	set string // the scale set beneath n0 and n1
}

// within waits until something holds, and fails the test if it does not in time.
func (s *scene) within(most time.Duration, what string, holds func() bool) {
	s.t.Helper()
	for end := time.Now().Add(most); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("%s: not within %s: %s; wrong is: %q", clock(time.Now()), most, what, s.wrongAtRest())
		}
	}
}

// throughout fails the test if something does not hold at any time from now on.
func (s *scene) throughout(d time.Duration, what string, holds func() bool) {
	s.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if !holds() {
			s.t.Fatalf("%s: does not hold: %s", clock(time.Now()), what)
		}
	}
}

// assigned waits until all that pods are to have is Assigned.
func (s *scene) assigned(most time.Duration, pods ...string) {
	s.t.Helper()
	for _, pod := range pods {
		s.within(most, pod+" has what it is to have", func() bool { return s.isAssigned(pod) })
	}
}

func (s *scene) isAssigned(pod string) bool {
	claimed, found := false, s.assignments(pod)
	for _, c := range s.objectsAt(time.Now()).claims {
		if c.pod != pod {
			continue
		}
		claimed = true
		if !slices.ContainsFunc(found, func(a *v1.AzureAssignedIdentity) bool { return ownerOf(a) != "" && c.isFor(a) && lets(a) }) {
			return false
		}
	}
	return claimed
}

// gone waits until a pod has no assignment left.
func (s *scene) gone(most time.Duration, pod string) {
	s.t.Helper()
	s.within(most, pod+" has no assignment any more", func() bool { return len(s.assignments(pod)) == 0 })
}

func (s *scene) deletePod(key string) {
	namespace, name := cut(key)
	if !drop[corev1.Pod](s.api, namespace, name, 0) {
		s.t.Fatalf("no pod %s", key)
	}
}

// on reports whether an identity is on a machine.
func (s *scene) on(machine, identity string) func() bool {
	return func() bool { return s.arm.Attached(machine, identity) }
}

func not(holds func() bool) func() bool { return func() bool { return !holds() } }

// quietly checks that nothing is left to do: all is as it is to be, and Azure is not asked to change anything.
func (s *scene) quietly(d time.Duration) {
	s.t.Helper()
	s.within(3*time.Second, "all is as it is to be", func() bool { return len(s.wrongAtRest()) == 0 })
	before := len(s.patches(""))
	time.Sleep(d)
	if after := s.patches(""); len(after) > before {
		s.t.Errorf("updates without a reason: %v", summaries(after[before:]))
	}
	for _, wrong := range s.wrongAtRest() {
		s.t.Error(wrong)
	}
}

func summaries(patches []azure.ARMRequest) (texts []string) {
	for _, p := range patches {
		texts = append(texts, clock(p.Time)+" "+short(p.Resource)+" +"+strings.Join(shorts(p.Add), ",")+" -"+strings.Join(shorts(p.Remove), ",")+" "+p.Code)
	}
	return texts
}

// accepted are the updates that ARM carried out.
func (s *scene) accepted(machine string) []azure.ARMRequest {
	return slices.DeleteFunc(s.patches(machine), func(r azure.ARMRequest) bool { return !r.Accepted })
}

// events returns the texts of the Events about an object.
func (s *scene) events(kind, key string) (texts []string) {
	for _, e := range all[corev1.Event](s.api) {
		if e.InvolvedObject.Kind == kind && e.InvolvedObject.Namespace+"/"+e.InvolvedObject.Name == key {
			texts = append(texts, e.Reason+": "+e.Message)
		}
	}
	return texts
}
