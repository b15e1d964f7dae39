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

// delay is the grace time of an identity that nobody uses, and some more for MIC and Azure to act.
const delay = 2*time.Minute + 15*time.Second

func TestAnIdentityIsAttachedForItsFirstPodAndDetachedSomeTimeAfterItsLast(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app := s.give("blue", "app")
		s.start()
		s.pod("blue/p", "n0", "app")
		s.assigned(2*time.Second, "blue/p")
		s.pod("blue/q", "n1", "app")
		s.assigned(time.Second, "blue/q")
		if n := len(s.patches("")); n != 1 {
			t.Errorf("%d updates for two pods with one identity on one scale set: %v", n, summaries(s.patches("")))
		}
		s.deletePod("blue/p")
		s.gone(3*time.Second, "blue/p")
		s.throughout(10*time.Minute, "the identity stays for the other pod", s.on(s.set, app))
		s.deletePod("blue/q")
		s.throughout(110*time.Second, "the identity stays for a while", s.on(s.set, app))
		s.within(delay-110*time.Second, "it is detached", not(s.on(s.set, app)))
		s.gone(3*time.Second, "blue/q")
		s.quietly(10 * time.Minute)
	})
}

func TestARollingUpdateCostsAzureNothing(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		s.give("blue", "app")
		s.start()
		s.pod("blue/p0", "n0", "app")
		s.assigned(2*time.Second, "blue/p0")
		before := len(s.patches(""))
		for i := range 10 {
			s.deletePod(fmt.Sprintf("blue/p%d", i))
			time.Sleep(30 * time.Second)
			s.pod(fmt.Sprintf("blue/p%d", i+1), fmt.Sprintf("n%d", i%2), "app")
			s.assigned(time.Second, fmt.Sprintf("blue/p%d", i+1))
		}
		if after := s.patches(""); len(after) > before {
			t.Errorf("updates: %v", summaries(after[before:]))
		}
	})
}

func TestAPodThatHasCompletedNeedsNothing(t *testing.T) {
	for _, phase := range []corev1.PodPhase{corev1.PodSucceeded, corev1.PodFailed} {
		t.Run(string(phase), func(t *testing.T) {
			inWorld(t, func(t *testing.T, s *scene) {
				job := s.give("blue", "job")
				s.start()
				s.pod("blue/p", "n0", "job")
				s.assigned(2*time.Second, "blue/p")
				edit(s.api, "blue", "p", func(p *corev1.Pod) { p.Status.Phase = phase })
				s.within(delay, "its identity is detached", not(s.on(s.set, job)))
				s.gone(3*time.Second, "blue/p")
				s.quietly(10 * time.Minute)
			})
		})
	}
}

func TestAPodThatIsBeingDeletedKeepsItsIdentityWhileItRuns(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app := s.give("blue", "app")
		s.api.podStop = 10 * time.Minute
		s.start()
		s.pod("blue/p", "n0", "app")
		s.assigned(2*time.Second, "blue/p")
		drop[corev1.Pod](s.api, "blue", "p")
		s.throughout(10*time.Minute-time.Second, "it is attached and Assigned", func() bool { return s.on(s.set, app)() && s.isAssigned("blue/p") })
		s.within(delay, "it is detached", not(s.on(s.set, app)))
		s.quietly(10 * time.Minute)
	})
}

func TestPodsOfTheSameNameInTwoNamespacesAreTwoPods(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app := s.give("blue", "app")
		s.start()
		s.pod("blue/web-0", "n0", "app")
		s.pod("red/web-0", "n1", "app")
		s.assigned(2*time.Second, "blue/web-0", "red/web-0")
		s.deletePod("blue/web-0")
		s.throughout(20*time.Minute, "the other one keeps it", func() bool { return s.on(s.set, app)() && s.isAssigned("red/web-0") })
		s.gone(0, "blue/web-0")
		s.quietly(10 * time.Minute)
	})
}

func TestAPodThatMovesIsGivenItsIdentityThereBeforeItIsTakenHere(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app, machine := s.give("blue", "app"), s.virtualMachine("vm")
		s.start()
		s.pod("blue/web-0", "n0", "app")
		s.assigned(2*time.Second, "blue/web-0")
		s.deletePod("blue/web-0")
		s.pod("blue/web-0", "vm", "app")
		s.assigned(3*time.Second, "blue/web-0")
		if !s.arm.Attached(machine, app) || !s.arm.Attached(s.set, app) {
			t.Error("it is not on both machines")
		}
		s.within(delay, "it is off the first machine", not(s.on(s.set, app)))
		s.quietly(10 * time.Minute)
	})
}

func TestWhatSomebodyElseAttachedStaysWhoeverUsesIt(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app := s.give("blue", "app")
		s.attachedByOthers(s.set, app)
		s.start()
		s.pod("blue/p", "n0", "app")
		s.assigned(2*time.Second, "blue/p")
		s.deletePod("blue/p")
		s.gone(3*time.Second, "blue/p")
		time.Sleep(time.Hour)
		if n := len(s.patches("")); n > 0 {
			t.Errorf("%d updates", n)
		}
		s.quietly(time.Minute)
	})
}

func TestWhatSomebodyAttachesWhileMICIsAboutToIsTheirs(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app := s.give("blue", "app")
		p := s.start()
		// The last moment: MIC has looked at the machine, and its update is on its way.
		done := false
		p.line.hook(func(r request) error {
			if r.to == toARM && r.write && !done {
				done = true
				s.attachedByOthers(s.set, app)
			}
			return nil
		}, nil)
		s.pod("blue/p", "n0", "app")
		s.assigned(30*time.Second, "blue/p")
		s.deletePod("blue/p")
		s.gone(5*time.Minute, "blue/p")
		s.throughout(time.Hour, "it stays", s.on(s.set, app))
		s.quietly(time.Minute)
	})
}

func TestImmutableIdentitiesAndMICsOwnAreNeverDetached(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		spared, own := s.give("blue", "spared"), s.give("blue", "own")
		s.cfg.Immutable, s.world.own = []string{strings.ToUpper(clientID("spared"))}, []string{clientID("own")}
		s.immutable[azure.FoldID(spared)], s.immutable[azure.FoldID(own)] = true, true
		s.start()
		s.pod("blue/p", "n0", "spared")
		s.pod("blue/q", "n0", "own")
		s.assigned(2*time.Second, "blue/p", "blue/q")
		s.deletePod("blue/p")
		s.deletePod("blue/q")
		s.gone(3*time.Second, "blue/p")
		s.gone(3*time.Second, "blue/q")
		s.throughout(time.Hour, "both stay", func() bool { return s.on(s.set, spared)() && s.on(s.set, own)() })
		s.quietly(time.Minute)
	})
}

func TestNothingIsDetachedBeforeEverythingHasBeenLoaded(t *testing.T) {
	for _, resource := range []string{"pods", "nodes", "azureidentities", "azureidentitybindings", "azureassignedidentities", "namespaces"} {
		t.Run(resource, func(t *testing.T) {
			inWorld(t, func(t *testing.T, s *scene) {
				app, left := s.give("blue", "app"), s.give("blue", "left")
				first := s.start()
				s.pod("blue/p", "n0", "app")
				s.pod("blue/q", "n0", "left")
				s.assigned(2*time.Second, "blue/p", "blue/q")
				first.kill()
				s.deletePod("blue/q")
				time.Sleep(time.Hour)
				second := s.start()
				second.line.hook(func(r request) error {
					if strings.HasSuffix(r.what, " "+resource) {
						return pause(r.ctx, 20*time.Minute)
					}
					return nil
				}, nil)
				s.throughout(20*time.Minute, "nothing is detached", func() bool { return s.on(s.set, app)() && s.on(s.set, left)() })
				s.within(delay, "what nobody uses is detached", not(s.on(s.set, left)))
				s.quietly(10 * time.Minute)
			})
		})
	}
}

func TestANodeThatIsGoneTakesItsAssignmentsWithIt(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app, machine := s.give("blue", "app"), s.virtualMachine("vm")
		s.start()
		s.pod("blue/p", "vm", "app")
		s.pod("blue/q", "n0", "app")
		s.assigned(2*time.Second, "blue/p", "blue/q")
		s.machineDeleted(machine)
		drop[corev1.Node](s.api, "", "vm")
		s.gone(5*time.Second, "blue/p")
		s.deletePod("blue/p")
		s.throughout(10*time.Minute, "the other one keeps its identity", func() bool { return s.on(s.set, app)() && s.isAssigned("blue/q") })
		s.quietly(10 * time.Minute)
	})
}

func TestAScaleSetWithoutNodesIsFreedOfWhatMICAttached(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app := s.give("blue", "app")
		s.start()
		s.pod("blue/p", "n0", "app")
		s.assigned(2*time.Second, "blue/p")
		for _, node := range []string{"n0", "n1"} {
			drop[corev1.Node](s.api, "", node)
		}
		s.deletePod("blue/p")
		s.gone(5*time.Second, "blue/p")
		s.within(delay, "it is detached", not(s.on(s.set, app)))
		s.quietly(10 * time.Minute)
	})
}

func TestANamespaceThatIsDeletedIsNotHeldUpByAzure(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		app := s.give("blue", "app")
		s.namespace("green")
		s.start()
		s.pod("green/p", "n0", "app")
		s.assigned(2*time.Second, "green/p")
		s.must(s.arm.SetFault(azure.ARMFault{Hang: true}))
		drop[corev1.Namespace](s.api, "", "green")
		s.within(20*time.Second, "the namespace is gone", func() bool {
			_, there := get[corev1.Namespace](s.api, "", "green")
			return !there
		})
		s.arm.ClearFaults("")
		s.within(delay+time.Minute, "what it used is detached all the same", not(s.on(s.set, app)))
		s.quietly(10 * time.Minute)
	})
}

func TestAnAssignmentThatSomebodyDeletesComesBack(t *testing.T) {
	for _, byForce := range []bool{false, true} {
		t.Run(fmt.Sprintf("without its finalizer: %t", byForce), func(t *testing.T) {
			inWorld(t, func(t *testing.T, s *scene) {
				app := s.give("blue", "app")
				s.start()
				s.pod("blue/p", "n0", "app")
				s.assigned(2*time.Second, "blue/p")
				first := s.assignments("blue/p")[0]
				if byForce {
					edit(s.api, "blue", first.Name, func(a *v1.AzureAssignedIdentity) { a.Finalizers = nil })
				}
				drop[v1.AzureAssignedIdentity](s.api, "blue", first.Name)
				s.within(40*time.Second, "there is another one, Assigned", func() bool {
					found := s.assignments("blue/p")
					return len(found) == 1 && found[0].UID != first.UID && s.isAssigned("blue/p")
				})
				s.throughout(10*time.Minute, "the identity is never off the machine", s.on(s.set, app))
				s.quietly(10 * time.Minute)
				if n := len(s.patches("")); n != 1 {
					t.Errorf("%d updates", n)
				}
			})
		})
	}
}

func TestAnEditedIdentityIsExchanged(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		first, second := s.give("blue", "app"), s.managedIdentity("second")
		s.start()
		s.pod("blue/p", "n0", "app")
		s.assigned(2*time.Second, "blue/p")
		edit(s.api, "blue", "app", func(i *v1.AzureIdentity) { i.Spec.ResourceID, i.Spec.ClientID = second, clientID("second") })
		s.within(13*time.Second, "the new one is attached", s.on(s.set, second))
		s.assigned(3*time.Second, "blue/p")
		s.within(delay, "the old one is detached", not(s.on(s.set, first)))
		s.quietly(10 * time.Minute)

		edit(s.api, "blue", "app", func(i *v1.AzureIdentity) {
			i.Annotations = map[string]string{"note": "nothing that matters"}
			i.Spec.ResourceID = strings.ToLower(second) + "/"
		})
		s.quietly(10 * time.Minute)
	})
}

func TestABindingThatIsDeletedTakesTheIdentityAway(t *testing.T) {
	changes := map[string]func(*scene){
		"binding deleted":  func(s *scene) { drop[v1.AzureIdentityBinding](s.api, "blue", "app-app") },
		"identity deleted": func(s *scene) { drop[v1.AzureIdentity](s.api, "blue", "app") },
		"selector edited": func(s *scene) {
			edit(s.api, "blue", "app-app", func(b *v1.AzureIdentityBinding) { b.Spec.Selector = "other" })
		},
		"label changed": func(s *scene) {
			edit(s.api, "red", "p", func(p *corev1.Pod) { p.Labels[v1.BindingLabel] = "other" })
		},
		"label removed": func(s *scene) { edit(s.api, "red", "p", func(p *corev1.Pod) { p.Labels = nil }) },
		"kept to its namespace": func(s *scene) {
			edit(s.api, "blue", "app", func(i *v1.AzureIdentity) {
				i.Annotations = map[string]string{v1.BehaviorAnnotation: v1.BehaviorNamespaced}
			})
		},
	}
	for name, change := range changes {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, s *scene) {
				app := s.give("blue", "app")
				s.start()
				s.pod("red/p", "n0", "app")
				s.assigned(2*time.Second, "red/p")
				change(s)
				s.throughout(110*time.Second, "it stays for a while", s.on(s.set, app))
				s.within(delay-110*time.Second, "it is detached", not(s.on(s.set, app)))
				s.gone(3*time.Second, "red/p")
				s.quietly(10 * time.Minute)
			})
		})
	}
}
