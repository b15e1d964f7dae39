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

func TestAnExternallyDetachedIdentityIsAttachedAgain(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app := s.addBoundIdentity("blue", "app")
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p")
		for range 5 {
			time.Sleep(17 * time.Minute)
			s.detachExternally(s.set, app)
			s.eventually(3*time.Minute+10*time.Second, "the identity is attached again", s.attached(s.set, app))
			s.waitAssigned(3*time.Second, "blue/p")
		}
		s.expectStable(10 * time.Minute)
	})
}

func TestAMachineThatHangsDelaysNoOther(t *testing.T) {
	for _, operation := range []string{azure.OpGet, azure.OpPatch, azure.OpPoll} {
		t.Run(operation, func(t *testing.T) {
			runScenario(t, func(t *testing.T, s *scenario) {
				s.arm.Change(func(a *azure.ARMSettings) { a.Delay = time.Second })
				s.addBoundIdentity("blue", "app")
				var pods []string
				for i := range 40 {
					name := fmt.Sprintf("vm%d", i)
					s.addVirtualMachine(name)
					pods = append(pods, "blue/"+name)
				}
				requireNoError(s.t, s.arm.SetFault(azure.ARMFault{Resource: s.set, Operation: operation, Hang: true}))
				s.start()
				time.Sleep(time.Second)
				s.addPod("blue/hung", "n0", "app")
				time.Sleep(10 * time.Second)
				for _, pod := range pods {
					_, node := splitKey(pod)
					s.addPod(pod, node, "app")
				}
				s.waitAssigned(8*time.Second, pods...)
				if s.isAssigned("blue/hung") {
					t.Error("the pod on the machine that hangs is Assigned")
				}
				time.Sleep(10 * time.Minute)
				s.arm.ClearFaults("")
				s.waitAssigned(2*time.Minute, "blue/hung")
				s.expectStable(10 * time.Minute)
			})
		})
	}
}

func TestAThrottledSubscriptionGetsNoRequestUntilRetryAfterAndOthersDo(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		s.addBoundIdentity("blue", "app")
		const other = "/subscriptions/5ab5c21f-0000-4000-8000-000000000002/resourceGroups/MC_Group/providers/Microsoft.Compute/virtualMachines/far"
		requireNoError(s.t, s.arm.AddMachine(azure.Machine{ID: other}))
		s.addNode("far", "azure://"+other)
		s.addVirtualMachine("near")
		requireNoError(s.t, s.arm.SetFault(azure.ARMFault{Resource: subscription, Status: http.StatusTooManyRequests, RetryAfter: 240, Count: 1}))
		s.start()
		s.addPod("blue/p", "n0", "app")
		time.Sleep(5 * time.Second)
		s.addPod("blue/near", "near", "app")
		s.addPod("blue/far", "far", "app")
		s.waitAssigned(3*time.Second, "blue/far")
		time.Sleep(225 * time.Second)
		for _, r := range s.arm.Log(0)[1:] {
			if r.Resource != azure.FoldID(other) {
				t.Errorf("%s: %s %s was sent to a throttled subscription", formatTime(r.Time), r.Operation, lastSegment(r.Resource))
			}
		}
		s.waitAssigned(90*time.Second, "blue/p", "blue/near")
		s.expectStable(10 * time.Minute)
	})
}

func TestAMachineThatIsBeingDeletedIsNotUpdated(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		s.addBoundIdentity("blue", "app")
		requireNoError(s.t, s.arm.SetProvisioningState(s.set, "Deleting"))
		s.start()
		s.addPod("blue/p", "n0", "app")
		time.Sleep(time.Hour)
		if n := len(s.patchRequests("")); n > 0 {
			t.Errorf("MIC sent %d updates for a machine that is being deleted", n)
		}
		if found := s.assignmentsOf("blue/p"); len(found) != 1 || found[0].Status.Status != v1.AssignmentCreated || found[0].Status.Message == "" {
			t.Errorf("want one assignment in state Created with a message; got %+v", found)
		}
		requireNoError(s.t, s.arm.SetProvisioningState(s.set, ""))
		s.waitAssigned(10*time.Minute, "blue/p")
	})
}

func TestAnUpdateIsPlannedAgainAfterAConflict(t *testing.T) {
	for _, status := range []int{http.StatusConflict, http.StatusPreconditionFailed} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			runScenario(t, func(t *testing.T, s *scenario) {
				s.addBoundIdentity("blue", "app")
				requireNoError(s.t, s.arm.SetFault(azure.ARMFault{Operation: azure.OpPatch, Status: status, Count: 2}))
				s.start()
				s.addPod("blue/p", "n0", "app")
				s.waitAssigned(30*time.Second, "blue/p")
				gets := 0
				for _, r := range s.arm.Log(0) {
					if r.Operation == azure.OpGet {
						gets++
					}
				}
				if gets < 3 {
					t.Errorf("MIC read the machine %d times for three updates; want at least 3", gets)
				}
				s.expectStable(10 * time.Minute)
			})
		})
	}
}

func TestMICChangesNothingWhileTheAPIServerIsUnavailable(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app, gone := s.addBoundIdentity("blue", "app"), s.addBoundIdentity("blue", "gone")
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.addPod("blue/q", "n0", "gone")
		s.waitAssigned(2*time.Second, "blue/p", "blue/q")
		s.deletePod("blue/q")
		time.Sleep(time.Minute)
		s.api.makeUnavailable()
		before := len(s.patchRequests(""))
		s.consistently(20*time.Minute, "nothing is detached", func() bool { return s.attached(s.set, app)() && s.attached(s.set, gone)() })
		if after := s.patchRequests(""); len(after) > before {
			t.Errorf("MIC sent updates although it could not write the ledger: %v", patchSummaries(after[before:]))
		}
		s.api.makeAvailable()
		s.addPod("blue/r", "n1", "app")
		s.waitAssigned(time.Minute, "blue/r")
		s.eventually(2*time.Minute, "the unused identity is detached", not(s.attached(s.set, gone)))
		s.expectStable(10 * time.Minute)
	})
}

func TestAnIdentityBoundWhileTheWatchWasDisconnectedStaysAttached(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app := s.addBoundIdentity("blue", "app")
		p := s.start()
		s.addPod("blue/p", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p")
		// MIC learns that the binding is deleted. Then all its watches are closed, and it can reopen all but the watch of
		// bindings. So MIC does not learn that the binding is created again.
		deleteObject[v1.AzureIdentityBinding](s.api, "blue", "app-app")
		time.Sleep(time.Minute)
		p.conn.hook(func(r request) error {
			if r.description == "watch azureidentitybindings" || r.description == "list azureidentitybindings" {
				return errConnectionRefused
			}
			return nil
		}, nil)
		s.api.expireWatches()
		time.Sleep(10 * time.Second)
		s.addBinding("blue/app", "app")
		s.consistently(20*time.Minute, "the identity is attached", s.attached(s.set, app))
	})
}

func TestANewLeaderWaitsForTheUpdateOfAKilledLeader(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		s.arm.Change(func(a *azure.ARMSettings) { a.Delay = time.Minute })
		s.addBoundIdentity("blue", "app")
		first := s.start()
		s.addPod("blue/p", "n0", "app")
		time.Sleep(20 * time.Second)
		first.kill()
		s.start()
		s.consistently(40*time.Second, "the pod is not Assigned", func() bool { return !s.isAssigned("blue/p") })
		s.waitAssigned(15*time.Second, "blue/p")
		s.expectStable(10 * time.Minute)
		if n := len(s.patchRequests("")); n != 1 {
			t.Errorf("MIC sent %d updates, want 1: %v", n, patchSummaries(s.patchRequests("")))
		}
	})
}

// A paused leader does not know that it has lost the lease. The first leader is paused, either before it creates the
// ledger or before it updates the machine. It goes on when a second leader has worked for ten seconds. ARM must accept
// one update in total.
func TestAPausedFormerLeaderRepeatsNoUpdate(t *testing.T) {
	for _, at := range []string{"create configmaps mic", "PATCH"} {
		for _, takes := range []time.Duration{0, time.Minute} {
			t.Run(fmt.Sprintf("paused before %s, updates take %s", at, takes), func(t *testing.T) {
				runScenario(t, func(t *testing.T, s *scenario) {
					s.arm.Change(func(a *azure.ARMSettings) { a.Delay = takes })
					s.addBoundIdentity("blue", "app")
					first := s.start()
					paused, awake := make(chan struct{}), make(chan struct{})
					stopped := false
					first.conn.hook(func(r request) error {
						if !stopped && len(r.description) >= len(at) && r.description[:len(at)] == at {
							stopped = true
							close(paused)
						}
						if stopped {
							<-awake
						}
						return nil
					}, nil)
					s.addPod("blue/p", "n0", "app")
					<-paused
					time.Sleep(20 * time.Second)
					s.start()
					time.Sleep(10 * time.Second)
					close(awake)
					time.Sleep(5 * time.Second)
					first.stepDown()
					s.waitAssigned(3*time.Minute, "blue/p")
					s.expectStable(10 * time.Minute)
					if accepted := s.acceptedPatches(""); len(accepted) != 1 {
						t.Errorf("ARM accepted %d updates, want 1: %v", len(accepted), patchSummaries(accepted))
					}
				})
			})
		}
	}
}

func TestAssignmentsOfAADPodIdentityAreTakenOverWithoutInterruption(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app, stale := s.addBoundIdentity("blue", "app"), s.addBoundIdentity("blue", "stale")
		requireNoError(s.t, s.arm.Attach(s.set, app))
		requireNoError(s.t, s.arm.Attach(s.set, stale))
		for pod, id := range map[string]string{"p": app, "gone": stale} {
			_, err := createObject(s.api, &v1.AzureAssignedIdentity{
				ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: pod + "-red-" + lastSegment(id), Finalizers: []string{v1.AssignedIdentityFinalizer},
					Labels: map[string]string{v1.NodeNameLabel: "n0"}},
				Spec: v1.AzureAssignedIdentitySpec{Pod: pod, PodNamespace: "red", NodeName: "n0",
					AzureIdentityRef: (&v1.AzureIdentity{ObjectMeta: metav1.ObjectMeta{Namespace: "blue", Name: lastSegment(id)}, Spec: v1.AzureIdentitySpec{ResourceID: id, ClientID: clientID(lastSegment(id))}}).Copy(),
					AzureBindingRef:  (&v1.AzureIdentityBinding{ObjectMeta: metav1.ObjectMeta{Namespace: "blue", Name: "b"}}).Copy()},
				Status: v1.AzureAssignedIdentityStatus{Status: v1.AssignmentAssigned},
			})
			requireNoError(s.t, err)
		}
		s.addPod("red/p", "n0", "app")
		s.start()
		s.consistently(10*time.Minute, "the pod can use its identity", func() bool {
			for _, a := range s.assignmentsOf("red/p") {
				if allowsTokens(a) {
					return s.arm.Attached(s.set, app)
				}
			}
			return false
		})
		if found := s.assignmentsOf("red/p"); len(found) != 1 || ownerPodUID(found[0]) == "" {
			t.Errorf("the pod has %d assignments, the first owned by the pod with UID %q; want one that a pod owns", len(found), ownerPodUID(found[0]))
		}
		if s.arm.Attached(s.set, stale) {
			t.Error("the identity that AAD Pod Identity attached for a deleted pod is still attached")
		}
		s.expectStable(10 * time.Minute)
		s.deletePod("red/p")
		s.eventually(detachTimeout, "the identity is detached", not(s.attached(s.set, app)))
		s.expectStable(10 * time.Minute)
	})
}

func TestAnUpdateWithALostResponseIsCheckedAndNotRepeated(t *testing.T) {
	for name, fault := range map[string]azure.ARMFault{
		"connection dropped": {Drop: true}, "hung": {Hang: true}, "bad gateway": {Status: http.StatusBadGateway},
	} {
		for _, takes := range []time.Duration{0, 40 * time.Second} {
			t.Run(fmt.Sprintf("%s, update takes %s", name, takes), func(t *testing.T) {
				runScenario(t, func(t *testing.T, s *scenario) {
					s.arm.Change(func(a *azure.ARMSettings) { a.Delay = takes })
					s.addBoundIdentity("blue", "app")
					fault.Operation, fault.Count, fault.Apply = azure.OpPatch, 1, true
					requireNoError(s.t, s.arm.SetFault(fault))
					s.start()
					s.addPod("blue/p", "n0", "app")
					s.waitAssigned(3*time.Minute, "blue/p")
					if n := len(s.patchRequests("")); n != 1 {
						t.Errorf("MIC sent %d updates, want 1: %v", n, patchSummaries(s.patchRequests("")))
					}
					s.expectStable(10 * time.Minute)
				})
			})
		}
	}
}

func TestNothingIsAttachedThatTheLedgerDoesNotRecord(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		s.addBoundIdentity("blue", "app")
		p := s.start()
		p.conn.hook(func(r request) error {
			if r.isWrite && r.description == "create configmaps mic" {
				return errors.New("no")
			}
			return nil
		}, nil)
		s.addPod("blue/p", "n0", "app")
		time.Sleep(20 * time.Minute)
		if n := len(s.patchRequests("")); n > 0 {
			t.Errorf("MIC sent %d updates although it could not create the ledger; want none", n)
		}
		p.conn.hook(nil, nil)
		s.waitAssigned(90*time.Second, "blue/p")
		s.expectStable(10 * time.Minute)
	})
}

func TestAnUpdateWhoseStatusCannotBeReadIsNotTakenForFinished(t *testing.T) {
	for _, operation := range []string{azure.OpPoll, azure.OpGet} {
		for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusConflict, http.StatusPreconditionFailed, http.StatusInternalServerError} {
			for n := range 4 {
				early, deletePod := n&1 == 1, n&2 == 2
				t.Run(fmt.Sprintf("%s fails with %d, early %t, pod is deleted during the update %t", operation, status, early, deletePod), func(t *testing.T) {
					runScenario(t, func(t *testing.T, s *scenario) {
						s.arm.Change(func(a *azure.ARMSettings) { a.Delay, a.Early = 30*time.Second, early })
						app := s.addBoundIdentity("blue", "app")
						s.start()
						s.addPod("blue/p", "n0", "app")
						time.Sleep(5 * time.Second)
						requireNoError(s.t, s.arm.SetFault(azure.ARMFault{Operation: operation, Status: status, Count: 3}))
						if deletePod {
							s.deletePod("blue/p")
							s.eventually(10*time.Minute, "nothing is left behind", func() bool { return len(s.convergenceErrors()) == 0 })
							s.expectStable(10 * time.Minute)
							return
						}
						s.consistently(24*time.Second, "the pod is not Assigned", func() bool { return !s.isAssigned("blue/p") })
						s.waitAssigned(5*time.Minute, "blue/p")
						s.deletePod("blue/p")
						s.eventually(detachTimeout+5*time.Minute, "the identity is detached", not(s.attached(s.set, app)))
						s.eventually(time.Minute, "MIC has converged", func() bool { return len(s.convergenceErrors()) == 0 })
						s.expectStable(10 * time.Minute)
						if n := len(s.acceptedPatches("")); n != 2 {
							t.Errorf("ARM accepted %d updates, want one to attach and one to detach: %v", n, patchSummaries(s.acceptedPatches("")))
						}
					})
				})
			}
		}
	}
}
