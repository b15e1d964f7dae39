package mic

import (
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

func TestWhatSomebodyDetachesByHandIsAttachedAgainSoon(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app := s.give("blue", "app")
		s.start()
		s.pod("blue/p", "n0", "app")
		s.assigned(2*time.Second, "blue/p")
		for range 5 {
			time.Sleep(17 * time.Minute)
			s.detachedByOthers(s.set, app)
			s.within(3*time.Minute+10*time.Second, "it is attached again", s.on(s.set, app))
			s.assigned(3*time.Second, "blue/p")
		}
		s.quietly(10 * time.Minute)
	})
}

func TestAMachineThatHangsHoldsUpNoOther(t *testing.T) {
	for _, operation := range []string{azure.OpGet, azure.OpPatch, azure.OpPoll} {
		t.Run(operation, func(t *testing.T) {
			inWorld(t, func(t *testing.T, s *scene) {
				s.arm.Change(func(a *azure.ARMSettings) { a.Delay = time.Second })
				s.give("blue", "app")
				var pods []string
				for i := range 40 {
					name := fmt.Sprintf("vm%d", i)
					s.virtualMachine(name)
					pods = append(pods, "blue/"+name)
				}
				s.must(s.arm.SetFault(azure.ARMFault{Resource: s.set, Operation: operation, Hang: true}))
				s.start()
				time.Sleep(time.Second)
				s.pod("blue/hung", "n0", "app")
				time.Sleep(10 * time.Second)
				for _, pod := range pods {
					_, node := cut(pod)
					s.pod(pod, node, "app")
				}
				s.assigned(8*time.Second, pods...)
				if s.isAssigned("blue/hung") {
					t.Error("the pod on the machine that hangs is Assigned")
				}
				time.Sleep(10 * time.Minute)
				s.arm.ClearFaults("")
				s.assigned(2*time.Minute, "blue/hung")
				s.quietly(10 * time.Minute)
			})
		})
	}
}

func TestASubscriptionThatAzureThrottlesIsLeftAloneAsLongAsToldAndNoOtherIs(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		s.give("blue", "app")
		const other = "/subscriptions/5ab5c21f-0000-4000-8000-000000000002/resourceGroups/MC_Group/providers/Microsoft.Compute/virtualMachines/far"
		s.must(s.arm.AddMachine(azure.Machine{ID: other}))
		s.node("far", "azure://"+other)
		s.virtualMachine("near")
		s.must(s.arm.SetFault(azure.ARMFault{Resource: subscription, Status: http.StatusTooManyRequests, RetryAfter: 240, Count: 1}))
		s.start()
		s.pod("blue/p", "n0", "app")
		time.Sleep(5 * time.Second)
		s.pod("blue/near", "near", "app")
		s.pod("blue/far", "far", "app")
		s.assigned(3*time.Second, "blue/far")
		time.Sleep(225 * time.Second)
		for _, r := range s.arm.Log(0)[1:] {
			if r.Resource != azure.FoldID(other) {
				t.Errorf("%s: %s %s was asked of a subscription that is to be left alone", clock(r.Time), r.Operation, short(r.Resource))
			}
		}
		s.assigned(90*time.Second, "blue/p", "blue/near")
		s.quietly(10 * time.Minute)
	})
}

func TestAMachineThatIsBeingDeletedIsLeftAlone(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		s.give("blue", "app")
		s.must(s.arm.SetProvisioningState(s.set, "Deleting"))
		s.start()
		s.pod("blue/p", "n0", "app")
		time.Sleep(time.Hour)
		if n := len(s.patches("")); n > 0 {
			t.Errorf("%d updates", n)
		}
		if found := s.assignments("blue/p"); len(found) != 1 || found[0].Status.Status != v1.AssignmentCreated || found[0].Status.Message == "" {
			t.Errorf("assignments: %+v", found)
		}
		s.must(s.arm.SetProvisioningState(s.set, ""))
		s.assigned(10*time.Minute, "blue/p")
	})
}

func TestAConflictIsPlannedAnew(t *testing.T) {
	for _, status := range []int{http.StatusConflict, http.StatusPreconditionFailed} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			inWorld(t, func(t *testing.T, s *scene) {
				s.give("blue", "app")
				s.must(s.arm.SetFault(azure.ARMFault{Operation: azure.OpPatch, Status: status, Count: 2}))
				s.start()
				s.pod("blue/p", "n0", "app")
				s.assigned(30*time.Second, "blue/p")
				gets := 0
				for _, r := range s.arm.Log(0) {
					if r.Operation == azure.OpGet {
						gets++
					}
				}
				if gets < 3 {
					t.Errorf("the machine was read %d times for three updates", gets)
				}
				s.quietly(10 * time.Minute)
			})
		})
	}
}

func TestWhileTheAPIServerIsAwayMICWaits(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app, gone := s.give("blue", "app"), s.give("blue", "gone")
		s.start()
		s.pod("blue/p", "n0", "app")
		s.pod("blue/q", "n0", "gone")
		s.assigned(2*time.Second, "blue/p", "blue/q")
		s.deletePod("blue/q")
		time.Sleep(time.Minute)
		s.api.goAway()
		before := len(s.patches(""))
		s.throughout(20*time.Minute, "nothing is detached", func() bool { return s.on(s.set, app)() && s.on(s.set, gone)() })
		if after := s.patches(""); len(after) > before {
			t.Errorf("updates while nothing can be written down: %v", summaries(after[before:]))
		}
		s.api.comeBack()
		s.pod("blue/r", "n1", "app")
		s.assigned(time.Minute, "blue/r")
		s.within(2*time.Minute, "what nobody uses is detached", not(s.on(s.set, gone)))
		s.quietly(10 * time.Minute)
	})
}

func TestAPodThatCameWhileTheWatchWasBlindKeepsItsIdentity(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app := s.give("blue", "app")
		p := s.start()
		s.pod("blue/p", "n0", "app")
		s.assigned(2*time.Second, "blue/p")
		// Everything works but the watch of bindings, which is told nothing for half an hour.
		drop[v1.AzureIdentityBinding](s.api, "blue", "app-app")
		time.Sleep(time.Minute)
		p.line.hook(func(r request) error {
			if r.what == "watch azureidentitybindings" || r.what == "list azureidentitybindings" {
				return errRefused
			}
			return nil
		}, nil)
		s.api.forget()
		time.Sleep(10 * time.Second)
		s.bind("blue/app", "app")
		s.throughout(20*time.Minute, "it is attached", s.on(s.set, app))
	})
}

func TestALeaderKilledDuringALongUpdateIsFollowedByOneThatWaitsForItsEnd(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		s.arm.Change(func(a *azure.ARMSettings) { a.Delay = time.Minute })
		s.give("blue", "app")
		first := s.start()
		s.pod("blue/p", "n0", "app")
		time.Sleep(20 * time.Second)
		first.kill()
		s.start()
		s.throughout(40*time.Second, "it is not Assigned yet", func() bool { return !s.isAssigned("blue/p") })
		s.assigned(15*time.Second, "blue/p")
		s.quietly(10 * time.Minute)
		if n := len(s.patches("")); n != 1 {
			t.Errorf("%d updates: %v", n, summaries(s.patches("")))
		}
	})
}

// A leader that is paused does not know that it is one no more. Wherever it stops, what it was about to do is done once.
func TestALeaderThatWakesUpAfterAnotherHasTakenOverDoesNothingTwice(t *testing.T) {
	for _, at := range []string{"create configmaps mic", "PATCH"} {
		for _, takes := range []time.Duration{0, time.Minute} {
			t.Run(fmt.Sprintf("paused before %s, updates take %s", at, takes), func(t *testing.T) {
				inWorld(t, func(t *testing.T, s *scene) {
					s.arm.Change(func(a *azure.ARMSettings) { a.Delay = takes })
					s.give("blue", "app")
					first := s.start()
					paused, awake := make(chan struct{}), make(chan struct{})
					stopped := false
					first.line.hook(func(r request) error {
						if !stopped && len(r.what) >= len(at) && r.what[:len(at)] == at {
							stopped = true
							close(paused)
						}
						if stopped {
							<-awake
						}
						return nil
					}, nil)
					s.pod("blue/p", "n0", "app")
					<-paused
					time.Sleep(20 * time.Second)
					s.start()
					time.Sleep(10 * time.Second)
					close(awake)
					time.Sleep(5 * time.Second)
					first.leave()
					s.assigned(3*time.Minute, "blue/p")
					s.quietly(10 * time.Minute)
					if accepted := s.accepted(""); len(accepted) != 1 {
						t.Errorf("%d updates were carried out: %v", len(accepted), summaries(accepted))
					}
				})
			})
		}
	}
}

func TestWhatThePredecessorLeftIsTakenOverWithoutAGap(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app, stale := s.give("blue", "app"), s.give("blue", "stale")
		s.must(s.arm.Attach(s.set, app))
		s.must(s.arm.Attach(s.set, stale))
		for pod, id := range map[string]string{"p": app, "gone": stale} {
			_, err := put(s.api, &v1.AzureAssignedIdentity{
				ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: pod + "-red-" + short(id), Finalizers: []string{v1.AssignedIdentityFinalizer},
					Labels: map[string]string{v1.NodeNameLabel: "n0"}},
				Spec: v1.AzureAssignedIdentitySpec{Pod: pod, PodNamespace: "red", NodeName: "n0",
					AzureIdentityRef: (&v1.AzureIdentity{ObjectMeta: metav1.ObjectMeta{Namespace: "blue", Name: short(id)}, Spec: v1.AzureIdentitySpec{ResourceID: id, ClientID: clientID(short(id))}}).Copy(),
					AzureBindingRef:  (&v1.AzureIdentityBinding{ObjectMeta: metav1.ObjectMeta{Namespace: "blue", Name: "b"}}).Copy()},
				Status: v1.AzureAssignedIdentityStatus{Status: v1.AssignmentAssigned},
			})
			s.must(err)
		}
		s.pod("red/p", "n0", "app")
		s.start()
		s.throughout(10*time.Minute, "the pod may use its identity", func() bool {
			for _, a := range s.assignments("red/p") {
				if lets(a) {
					return s.arm.Attached(s.set, app)
				}
			}
			return false
		})
		if found := s.assignments("red/p"); len(found) != 1 || ownerOf(found[0]) == "" {
			t.Errorf("%d assignments, the first owned by %q", len(found), ownerOf(found[0]))
		}
		if s.arm.Attached(s.set, stale) {
			t.Error("what the predecessor attached for a pod that is gone is still there")
		}
		s.quietly(10 * time.Minute)
		s.deletePod("red/p")
		s.within(delay, "it is detached", not(s.on(s.set, app)))
		s.quietly(10 * time.Minute)
	})
}

func TestALostAnswerIsLookedUpAndNotRepeated(t *testing.T) {
	for name, fault := range map[string]azure.ARMFault{
		"connection cut": {Drop: true}, "hung": {Hang: true}, "bad gateway": {Status: http.StatusBadGateway},
	} {
		for _, takes := range []time.Duration{0, 40 * time.Second} {
			t.Run(fmt.Sprintf("%s, update takes %s", name, takes), func(t *testing.T) {
				inWorld(t, func(t *testing.T, s *scene) {
					s.arm.Change(func(a *azure.ARMSettings) { a.Delay = takes })
					s.give("blue", "app")
					fault.Operation, fault.Count, fault.Apply = azure.OpPatch, 1, true
					s.must(s.arm.SetFault(fault))
					s.start()
					s.pod("blue/p", "n0", "app")
					s.assigned(3*time.Minute, "blue/p")
					if n := len(s.patches("")); n != 1 {
						t.Errorf("%d updates: %v", n, summaries(s.patches("")))
					}
					s.quietly(10 * time.Minute)
				})
			})
		}
	}
}

func TestWhatCannotBeWrittenDownIsNotDone(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		s.give("blue", "app")
		p := s.start()
		p.line.hook(func(r request) error {
			if r.write && r.what == "create configmaps mic" {
				return errors.New("no")
			}
			return nil
		}, nil)
		s.pod("blue/p", "n0", "app")
		time.Sleep(20 * time.Minute)
		if n := len(s.patches("")); n > 0 {
			t.Errorf("%d updates of which nothing is written down", n)
		}
		p.line.hook(nil, nil)
		s.assigned(90*time.Second, "blue/p")
		s.quietly(10 * time.Minute)
	})
}

func TestAnUpdateThatCannotBeFollowedForAWhileIsNotTakenForEnded(t *testing.T) {
	for _, operation := range []string{azure.OpPoll, azure.OpGet} {
		for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusConflict, http.StatusPreconditionFailed, http.StatusInternalServerError} {
			for n := range 4 {
				early, leaves := n&1 == 1, n&2 == 2
				t.Run(fmt.Sprintf("%s answered %d, early %t, pod leaves meanwhile %t", operation, status, early, leaves), func(t *testing.T) {
					inWorld(t, func(t *testing.T, s *scene) {
						s.arm.Change(func(a *azure.ARMSettings) { a.Delay, a.Early = 30*time.Second, early })
						app := s.give("blue", "app")
						s.start()
						s.pod("blue/p", "n0", "app")
						time.Sleep(5 * time.Second)
						s.must(s.arm.SetFault(azure.ARMFault{Operation: operation, Status: status, Count: 3}))
						if leaves {
							s.deletePod("blue/p")
							s.within(10*time.Minute, "nothing is left", func() bool { return len(s.wrongAtRest()) == 0 })
							s.quietly(10 * time.Minute)
							return
						}
						s.throughout(24*time.Second, "it is not Assigned yet", func() bool { return !s.isAssigned("blue/p") })
						s.assigned(5*time.Minute, "blue/p")
						s.deletePod("blue/p")
						s.within(delay+5*time.Minute, "it is detached", not(s.on(s.set, app)))
						s.within(time.Minute, "all is as it is to be", func() bool { return len(s.wrongAtRest()) == 0 })
						s.quietly(10 * time.Minute)
						if n := len(s.accepted("")); n != 2 {
							t.Errorf("%d updates: %v", n, summaries(s.accepted("")))
						}
					})
				})
			}
		}
	}
}
