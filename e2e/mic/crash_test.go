package mic

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// runWorkload starts MIC and gives it work of each kind. MIC takes over an assignment of AAD Pod Identity. Two pods
// share an identity, and a third pod has another one. An AzureIdentity is edited. All pods but one are deleted, so that
// MIC detaches identities.
func (s *sequence) runWorkload() {
	set := s.addScaleSet("Set-A", "n0", "n1")
	s.attachForeignIdentity("kubelet", set)
	shared, first, second, old := s.addManagedIdentity("shared"), s.addManagedIdentity("first"), s.addManagedIdentity("second"), s.addManagedIdentity("old")
	s.addNamespace("blue")
	s.addNamespace("red")
	for key, id := range map[string]string{"blue/shared": shared, "blue/own": first, "red/old": old} {
		s.addAzureIdentity(key, id)
	}
	s.addBinding("blue/shared", "app")
	s.addBinding("blue/own", "own")
	s.addBinding("red/old", "old")
	requireNoError(s.t, s.arm.Attach(set, old))
	s.addPod("red/old", "n0", "old")
	s.addLegacyAssignment(expectedAssignment{pod: "red/old", node: "n0", identity: "red/old", resource: old, machine: azure.FoldID(set)}, v1.AssignmentAssigned)
	s.startLeader()
	s.wait(5 * time.Second)
	s.addPod("blue/p", "n0", "app")
	s.addPod("red/p", "n1", "app")
	s.addPod("blue/q", "n1", "own")
	s.wait(25 * time.Second)
	editObject(s.api, "blue", "own", func(i *v1.AzureIdentity) { i.Spec.ResourceID = second })
	s.wait(65 * time.Second)
	deleteObject[corev1.Pod](s.api, "blue", "q")
	deleteObject[corev1.Pod](s.api, "red", "old")
	deleteObject[corev1.Pod](s.api, "blue", "p")
	s.wait(6 * time.Minute)
}

// attachForeignIdentity creates a managed identity that no AzureIdentity references, and attaches it to a machine.
func (sim *simulation) attachForeignIdentity(name, machine string) {
	id := azure.FoldID(sim.addManagedIdentity(name))
	sim.neverBound[id] = true
	sim.attachExternally(machine, id)
}

// runWorkloadWithCrash runs the workload. An update takes delay in ARM. The parameter write counts from 1: the first
// controller is killed at its write of this number, or never if write is 0. That write takes effect only if applied is
// true. runWorkloadWithCrash returns the errors, the writes of the first controller and whether it was killed.
func runWorkloadWithCrash(t *testing.T, delay time.Duration, write int, applied bool) (wrong, writes []string, killed bool) {
	synctest.Test(t, func(t *testing.T) {
		s := newSequence(t, 1)
		defer s.close()
		s.restartDelay = time.Second
		s.arm.Change(func(a *azure.ARMSettings) { a.Delay = delay })
		var mu sync.Mutex
		s.newTrace = func(process string) func(request, string) {
			return func(r request, _ string) {
				if r.isWrite && process == "mic-1" {
					mu.Lock()
					defer mu.Unlock()
					writes = append(writes, r.description)
				}
			}
		}
		s.onStart = func(p *process) {
			if write > 0 && !killed {
				killed = true
				p.crashAt(write, applied, func() { s.crashes <- p })
			}
		}
		s.runWorkload()
		wrong = append(s.converge(), s.violations(s.maxWatchDelay)...)
		killed = len(s.processes) > 1
	})
	return wrong, writes, killed
}

func TestAControllerKilledAtAnyWriteConvergesToTheSameState(t *testing.T) {
	for _, delay := range []time.Duration{0, 30 * time.Second} {
		wrong, writes, _ := runWorkloadWithCrash(t, delay, 0, false)
		if len(wrong) > 0 {
			t.Fatalf("errors without a crash, when an update takes %s:\n%s", delay, strings.Join(wrong, "\n"))
		}
		if n := len(slices.DeleteFunc(slices.Clone(writes), func(w string) bool { return !strings.HasPrefix(w, "PATCH") })); n < 3 {
			t.Fatalf("the writes without a crash include %d updates of a machine; want at least 3: %q", n, writes)
		}
		for i, what := range writes {
			for _, applied := range []bool{false, true} {
				when := "before"
				if applied {
					when = "after"
				}
				name := fmt.Sprintf("updates take %s, killed %s write %d, %s", delay, when, i+1, what[strings.LastIndex(what[:len(what)-1], "/")+1:])
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					wrong, _, killed := runWorkloadWithCrash(t, delay, i+1, applied)
					if len(wrong) > 0 {
						t.Error(strings.Join(wrong, "\n"))
					}
					if !killed {
						t.Error("the first controller was not killed: it made fewer writes than in the run without a crash")
					}
				})
			}
		}
	}
}
