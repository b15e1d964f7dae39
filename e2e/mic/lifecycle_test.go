package mic

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// detachTimeout is MIC's delay before it detaches an unused identity, plus 15 s for MIC and Azure to act.
const detachTimeout = 2*time.Minute + 15*time.Second

func TestAnIdentityIsAttachedForTheFirstPodAndDetachedAfterTheLast(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app := s.addBoundIdentity("blue", "app")
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p")
		s.addPod("blue/q", "n1", "app")
		s.waitAssigned(time.Second, "blue/q")
		if n := len(s.patchRequests("")); n != 1 {
			t.Errorf("MIC sent %d updates for two pods with one identity on one scale set; want 1: %v", n, patchSummaries(s.patchRequests("")))
		}
		s.deletePod("blue/p")
		s.waitUnassigned(3*time.Second, "blue/p")
		s.consistently(10*time.Minute, "the identity stays attached for the other pod", s.attached(s.set, app))
		s.deletePod("blue/q")
		s.consistently(110*time.Second, "the identity stays attached during the detach delay", s.attached(s.set, app))
		s.eventually(detachTimeout-110*time.Second, "the identity is detached", not(s.attached(s.set, app)))
		s.waitUnassigned(3*time.Second, "blue/q")
		s.expectStable(10 * time.Minute)
	})
}

func TestARollingUpdateCausesNoAzureUpdate(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		s.addBoundIdentity("blue", "app")
		s.start()
		s.addPod("blue/p0", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p0")
		before := len(s.patchRequests(""))
		for i := range 10 {
			s.deletePod(fmt.Sprintf("blue/p%d", i))
			time.Sleep(30 * time.Second)
			s.addPod(fmt.Sprintf("blue/p%d", i+1), fmt.Sprintf("n%d", i%2), "app")
			s.waitAssigned(time.Second, fmt.Sprintf("blue/p%d", i+1))
		}
		if after := s.patchRequests(""); len(after) > before {
			t.Errorf("MIC sent updates during a rolling update; want none: %v", patchSummaries(after[before:]))
		}
	})
}

func TestACompletedPodNeedsNoIdentity(t *testing.T) {
	for _, phase := range []corev1.PodPhase{corev1.PodSucceeded, corev1.PodFailed} {
		t.Run(string(phase), func(t *testing.T) {
			runScenario(t, func(t *testing.T, s *scenario) {
				job := s.addBoundIdentity("blue", "job")
				s.start()
				s.addPod("blue/p", "n0", "job")
				s.waitAssigned(2*time.Second, "blue/p")
				editObject(s.api, "blue", "p", func(p *corev1.Pod) { p.Status.Phase = phase })
				s.eventually(detachTimeout, "the identity is detached", not(s.attached(s.set, job)))
				s.waitUnassigned(3*time.Second, "blue/p")
				s.expectStable(10 * time.Minute)
			})
		})
	}
}

func TestAPodThatIsBeingDeletedKeepsItsIdentityWhileItRuns(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app := s.addBoundIdentity("blue", "app")
		s.api.podStop = 10 * time.Minute
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p")
		deleteObject[corev1.Pod](s.api, "blue", "p")
		s.consistently(10*time.Minute-time.Second, "the identity is attached and Assigned", func() bool { return s.attached(s.set, app)() && s.isAssigned("blue/p") })
		s.eventually(detachTimeout, "the identity is detached", not(s.attached(s.set, app)))
		s.expectStable(10 * time.Minute)
	})
}

func TestPodsOfTheSameNameInTwoNamespacesAreTwoPods(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app := s.addBoundIdentity("blue", "app")
		s.start()
		s.addPod("blue/web-0", "n0", "app")
		s.addPod("red/web-0", "n1", "app")
		s.waitAssigned(2*time.Second, "blue/web-0", "red/web-0")
		s.deletePod("blue/web-0")
		s.consistently(20*time.Minute, "the other pod keeps the identity", func() bool { return s.attached(s.set, app)() && s.isAssigned("red/web-0") })
		s.waitUnassigned(0, "blue/web-0")
		s.expectStable(10 * time.Minute)
	})
}

func TestAPodThatMovesGetsItsIdentityOnTheNewMachineBeforeTheOldOneLosesIt(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app, machine := s.addBoundIdentity("blue", "app"), s.addVirtualMachine("vm")
		s.start()
		s.addPod("blue/web-0", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/web-0")
		s.deletePod("blue/web-0")
		s.addPod("blue/web-0", "vm", "app")
		s.waitAssigned(3*time.Second, "blue/web-0")
		if !s.arm.Attached(machine, app) || !s.arm.Attached(s.set, app) {
			t.Error("the identity must be attached to the scale set, which the pod left, and to the virtual machine, which it moved to")
		}
		s.eventually(detachTimeout, "the identity is detached from the first machine", not(s.attached(s.set, app)))
		s.expectStable(10 * time.Minute)
	})
}

func TestAnExternallyAttachedIdentityIsNeverDetached(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app := s.addBoundIdentity("blue", "app")
		s.attachExternally(s.set, app)
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p")
		s.deletePod("blue/p")
		s.waitUnassigned(3*time.Second, "blue/p")
		time.Sleep(time.Hour)
		if n := len(s.patchRequests("")); n > 0 {
			t.Errorf("MIC sent %d updates although the identity was attached externally; want none", n)
		}
		s.expectStable(time.Minute)
	})
}

func TestAnIdentityAttachedExternallyJustBeforeMICsUpdateIsNeverDetached(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app := s.addBoundIdentity("blue", "app")
		p := s.start()
		// The identity is attached externally after MIC has read the machine, and before MIC's update reaches ARM.
		done := false
		p.conn.hook(func(r request) error {
			if r.target == toARM && r.isWrite && !done {
				done = true
				s.attachExternally(s.set, app)
			}
			return nil
		}, nil)
		s.addPod("blue/p", "n0", "app")
		s.waitAssigned(30*time.Second, "blue/p")
		s.deletePod("blue/p")
		s.waitUnassigned(5*time.Minute, "blue/p")
		s.consistently(time.Hour, "the identity stays attached", s.attached(s.set, app))
		s.expectStable(time.Minute)
	})
}

func TestImmutableIdentitiesAndMICsOwnAreNeverDetached(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		protected, own := s.addBoundIdentity("blue", "protected"), s.addBoundIdentity("blue", "own")
		s.cfg.Immutable, s.ownIdentities = []string{strings.ToUpper(clientID("protected"))}, []string{clientID("own")}
		s.immutable[azure.FoldID(protected)], s.immutable[azure.FoldID(own)] = true, true
		s.start()
		s.addPod("blue/p", "n0", "protected")
		s.addPod("blue/q", "n0", "own")
		s.waitAssigned(2*time.Second, "blue/p", "blue/q")
		s.deletePod("blue/p")
		s.deletePod("blue/q")
		s.waitUnassigned(3*time.Second, "blue/p")
		s.waitUnassigned(3*time.Second, "blue/q")
		s.consistently(time.Hour, "both identities stay attached", func() bool { return s.attached(s.set, protected)() && s.attached(s.set, own)() })
		s.expectStable(time.Minute)
	})
}

func TestNothingIsDetachedBeforeTheCachesAreLoaded(t *testing.T) {
	for _, resource := range []string{"pods", "nodes", "azureidentities", "azureidentitybindings", "azureassignedidentities", "namespaces"} {
		t.Run(resource, func(t *testing.T) {
			runScenario(t, func(t *testing.T, s *scenario) {
				app, left := s.addBoundIdentity("blue", "app"), s.addBoundIdentity("blue", "left")
				first := s.start()
				s.addPod("blue/p", "n0", "app")
				s.addPod("blue/q", "n0", "left")
				s.waitAssigned(2*time.Second, "blue/p", "blue/q")
				first.kill()
				s.deletePod("blue/q")
				time.Sleep(time.Hour)
				second := s.start()
				second.conn.hook(func(r request) error {
					if strings.HasSuffix(r.description, " "+resource) {
						return pause(r.ctx, 20*time.Minute)
					}
					return nil
				}, nil)
				s.consistently(20*time.Minute, "nothing is detached", func() bool { return s.attached(s.set, app)() && s.attached(s.set, left)() })
				s.eventually(detachTimeout, "the unused identity is detached", not(s.attached(s.set, left)))
				s.expectStable(10 * time.Minute)
			})
		})
	}
}

func TestAssignmentsOfADeletedNodeAreDeleted(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app, machine := s.addBoundIdentity("blue", "app"), s.addVirtualMachine("vm")
		s.start()
		s.addPod("blue/p", "vm", "app")
		s.addPod("blue/q", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p", "blue/q")
		s.deleteMachine(machine)
		deleteObject[corev1.Node](s.api, "", "vm")
		s.waitUnassigned(5*time.Second, "blue/p")
		s.deletePod("blue/p")
		s.consistently(10*time.Minute, "the other pod keeps its identity", func() bool { return s.attached(s.set, app)() && s.isAssigned("blue/q") })
		s.expectStable(10 * time.Minute)
	})
}

func TestIdentitiesAreDetachedFromAScaleSetWithoutNodes(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app := s.addBoundIdentity("blue", "app")
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p")
		for _, node := range []string{"n0", "n1"} {
			deleteObject[corev1.Node](s.api, "", node)
		}
		s.deletePod("blue/p")
		s.waitUnassigned(5*time.Second, "blue/p")
		s.eventually(detachTimeout, "the identity is detached", not(s.attached(s.set, app)))
		s.expectStable(10 * time.Minute)
	})
}

func TestTheDeletionOfANamespaceDoesNotWaitForAzure(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		app := s.addBoundIdentity("blue", "app")
		s.addNamespace("green")
		s.start()
		s.addPod("green/p", "n0", "app")
		s.waitAssigned(2*time.Second, "green/p")
		requireNoError(s.t, s.arm.SetFault(azure.ARMFault{Hang: true}))
		deleteObject[corev1.Namespace](s.api, "", "green")
		s.eventually(20*time.Second, "the namespace is deleted", func() bool {
			_, there := getObject[corev1.Namespace](s.api, "", "green")
			return !there
		})
		s.arm.ClearFaults("")
		s.eventually(detachTimeout+time.Minute, "its identity is detached later", not(s.attached(s.set, app)))
		s.expectStable(10 * time.Minute)
	})
}

func TestADeletedAssignmentIsRecreated(t *testing.T) {
	for _, byForce := range []bool{false, true} {
		t.Run(fmt.Sprintf("without its finalizer: %t", byForce), func(t *testing.T) {
			runScenario(t, func(t *testing.T, s *scenario) {
				app := s.addBoundIdentity("blue", "app")
				s.start()
				s.addPod("blue/p", "n0", "app")
				s.waitAssigned(2*time.Second, "blue/p")
				first := s.assignmentsOf("blue/p")[0]
				if byForce {
					editObject(s.api, "blue", first.Name, func(a *v1.AzureAssignedIdentity) { a.Finalizers = nil })
				}
				deleteObject[v1.AzureAssignedIdentity](s.api, "blue", first.Name)
				s.eventually(40*time.Second, "another assignment exists and is Assigned", func() bool {
					found := s.assignmentsOf("blue/p")
					return len(found) == 1 && found[0].UID != first.UID && s.isAssigned("blue/p")
				})
				s.consistently(10*time.Minute, "the identity stays attached", s.attached(s.set, app))
				s.expectStable(10 * time.Minute)
				if n := len(s.patchRequests("")); n != 1 {
					t.Errorf("MIC sent %d updates; want 1", n)
				}
			})
		})
	}
}

func TestAnEditedAzureIdentityIsReplacedOnTheMachine(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		first, second := s.addBoundIdentity("blue", "app"), s.addManagedIdentity("second")
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p")
		editObject(s.api, "blue", "app", func(i *v1.AzureIdentity) { i.Spec.ResourceID, i.Spec.ClientID = second, clientID("second") })
		s.eventually(13*time.Second, "the new identity is attached", s.attached(s.set, second))
		s.waitAssigned(3*time.Second, "blue/p")
		s.eventually(detachTimeout, "the old identity is detached", not(s.attached(s.set, first)))
		s.expectStable(10 * time.Minute)

		editObject(s.api, "blue", "app", func(i *v1.AzureIdentity) {
			i.Annotations = map[string]string{"note": "irrelevant"}
			i.Spec.ResourceID = strings.ToLower(second) + "/"
		})
		s.expectStable(10 * time.Minute)
	})
}

func TestAnIdentityIsDetachedWhenItsBindingNoLongerApplies(t *testing.T) {
	changes := map[string]func(*scenario){
		"binding deleted":  func(s *scenario) { deleteObject[v1.AzureIdentityBinding](s.api, "blue", "app-app") },
		"identity deleted": func(s *scenario) { deleteObject[v1.AzureIdentity](s.api, "blue", "app") },
		"selector edited": func(s *scenario) {
			editObject(s.api, "blue", "app-app", func(b *v1.AzureIdentityBinding) { b.Spec.Selector = "other" })
		},
		"label changed": func(s *scenario) {
			editObject(s.api, "red", "p", func(p *corev1.Pod) { p.Labels[v1.BindingLabel] = "other" })
		},
		"label removed": func(s *scenario) { editObject(s.api, "red", "p", func(p *corev1.Pod) { p.Labels = nil }) },
		"restricted to its namespace": func(s *scenario) {
			editObject(s.api, "blue", "app", func(i *v1.AzureIdentity) {
				i.Annotations = map[string]string{v1.BehaviorAnnotation: v1.BehaviorNamespaced}
			})
		},
	}
	for name, change := range changes {
		t.Run(name, func(t *testing.T) {
			runScenario(t, func(t *testing.T, s *scenario) {
				app := s.addBoundIdentity("blue", "app")
				s.start()
				s.addPod("red/p", "n0", "app")
				s.waitAssigned(2*time.Second, "red/p")
				change(s)
				s.consistently(110*time.Second, "the identity stays attached during the detach delay", s.attached(s.set, app))
				s.eventually(detachTimeout-110*time.Second, "the identity is detached", not(s.attached(s.set, app)))
				s.waitUnassigned(3*time.Second, "red/p")
				s.expectStable(10 * time.Minute)
			})
		})
	}
}
