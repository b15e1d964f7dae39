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

// life is everything that MIC does for pods, from the take-over from the predecessor on: two pods get identities, one of
// which they share; an identity is edited; identities lose their last pods; one pod stays.
func (s *story) life() {
	set := s.scaleSet("Set-A", "n0", "n1")
	s.machineWith("kubelet", set)
	shared, first, second, old := s.managedIdentity("shared"), s.managedIdentity("first"), s.managedIdentity("second"), s.managedIdentity("old")
	s.namespace("blue")
	s.namespace("red")
	for key, id := range map[string]string{"blue/shared": shared, "blue/own": first, "red/old": old} {
		s.identity(key, id)
	}
	s.bind("blue/shared", "app")
	s.bind("blue/own", "own")
	s.bind("red/old", "old")
	s.must(s.arm.Attach(set, old))
	s.pod("red/old", "n0", "old")
	s.legacy(claim{pod: "red/old", node: "n0", identity: "red/old", resource: old, machine: azure.FoldID(set)}, v1.AssignmentAssigned)
	s.lead()
	s.wait(5 * time.Second)
	s.pod("blue/p", "n0", "app")
	s.pod("red/p", "n1", "app")
	s.pod("blue/q", "n1", "own")
	s.wait(25 * time.Second)
	edit(s.api, "blue", "own", func(i *v1.AzureIdentity) { i.Spec.ResourceID = second })
	s.wait(65 * time.Second)
	drop[corev1.Pod](s.api, "blue", "q")
	drop[corev1.Pod](s.api, "red", "old")
	drop[corev1.Pod](s.api, "blue", "p")
	s.wait(6 * time.Minute)
}

// machineWith gives a machine an identity that is somebody else's.
func (w *world) machineWith(name, machine string) {
	id := azure.FoldID(w.managedIdentity(name))
	w.neverBound[id] = true
	w.attachedByOthers(machine, id)
}

// lifeWithDeath lives through it, with the first controller killed at one of its writes (0: never), and says what was
// wrong, what the first controller wrote and whether it died.
func lifeWithDeath(t *testing.T, delay time.Duration, write int, applied bool) (wrong, writes []string, died bool) {
	synctest.Test(t, func(t *testing.T) {
		s := newStory(t, 1)
		defer s.close()
		s.restart = time.Second
		s.arm.Change(func(a *azure.ARMSettings) { a.Delay = delay })
		var mu sync.Mutex
		s.trace = func(process string) func(request, string) {
			return func(r request, _ string) {
				if r.write && process == "mic-1" {
					mu.Lock()
					defer mu.Unlock()
					writes = append(writes, r.what)
				}
			}
		}
		s.onStart = func(p *process) {
			if write > 0 && !died {
				died = true
				p.crashAt(write, applied, func() { s.crashes <- p })
			}
		}
		s.life()
		wrong = append(s.rest(), s.harmDone(s.watchNeeds)...)
		died = len(s.processes) > 1
	})
	return wrong, writes, died
}

func TestAControllerKilledAtAnyWriteIsFollowedByTheSameEnd(t *testing.T) {
	for _, delay := range []time.Duration{0, 30 * time.Second} {
		wrong, writes, _ := lifeWithDeath(t, delay, 0, false)
		if len(wrong) > 0 {
			t.Fatalf("updates take %s: without a crash:\n%s", delay, strings.Join(wrong, "\n"))
		}
		if n := len(slices.DeleteFunc(slices.Clone(writes), func(w string) bool { return !strings.HasPrefix(w, "PATCH") })); n < 3 {
			t.Fatalf("only %d updates among the writes %q", n, writes)
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
					wrong, _, died := lifeWithDeath(t, delay, i+1, applied)
					if len(wrong) > 0 {
						t.Error(strings.Join(wrong, "\n"))
					}
					if !died {
						t.Error("it was not killed: there were fewer writes than the first time")
					}
				})
			}
		}
	}
}
