package mic

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

func TestOneBadIdentityHarmsOnlyItself(t *testing.T) {
	const good = 12
	for _, late := range []bool{false, true} {
		for _, naming := range []azure.Naming{azure.NamedInDetails, azure.NamedInText, azure.Unnamed} {
			for _, bad := range []azure.IdentityFault{{Denied: true}, {Missing: true}} {
				t.Run(fmt.Sprintf("denied %t, missing %t, told at the end %t, named in %s", bad.Denied, bad.Missing, late, naming), func(t *testing.T) {
					inWorld(t, func(t *testing.T, s *scene) {
						s.arm.Change(func(a *azure.ARMSettings) { a.Naming, a.LateErrors = naming, late })
						s.give("blue", "bad")
						fault := bad
						fault.Identity = identityID("bad")
						s.must(s.arm.SetIdentityFault(fault))
						s.bad[azure.FoldID(fault.Identity)] = true
						var pods []string
						for i := range good {
							name := fmt.Sprintf("g%d", i)
							s.give("blue", name)
							pods = append(pods, "blue/"+name)
						}
						s.start()
						time.Sleep(time.Second)
						s.pod("blue/bad", "n0", "bad")
						for i, pod := range pods {
							s.pod(pod, fmt.Sprintf("n%d", i%2), fmt.Sprintf("g%d", i))
						}
						s.assigned(5*time.Second, pods...)
						s.refused("blue/bad", "blue/bad-bad")
						s.sparesAzure(t)
						s.quietlyExceptFor(fault.Identity)
					})
				})
			}
		}
	}
}

// refused checks that whoever has to mend something is told what: in the assignment, by an Event on the pod and by one
// on the binding.
func (s *scene) refused(pod, binding string) {
	s.t.Helper()
	s.within(5*time.Second, "the assignment says what is in the way", func() bool {
		found := s.assignments(pod)
		return len(found) == 1 && found[0].Status.Status == v1.AssignmentCreated && found[0].Status.Message != ""
	})
	for kind, key := range map[string]string{"Pod": pod, "AzureIdentityBinding": binding} {
		s.within(5*time.Second, "an Event on "+kind+" "+key, func() bool {
			return slices.ContainsFunc(s.events(kind, key), func(text string) bool { return strings.Contains(text, "userAssignedIdentities/") })
		})
	}
}

// sparesAzure checks that an identity which Azure refuses is tried less and less often.
func (s *scene) sparesAzure(t *testing.T) {
	before := len(s.patches(""))
	time.Sleep(time.Hour)
	if n := len(s.patches("")) - before; n < 3 || n > 12 {
		t.Errorf("%d updates in an hour for one identity that Azure refuses; want 3 to 12", n)
	}
	events := all[corev1.Event](s.api)
	if len(events) > 6 {
		t.Errorf("%d Events about it", len(events))
	}
}

// quietlyExceptFor checks that all is as it is to be, but for attempts with what Azure refuses.
func (s *scene) quietlyExceptFor(identity string) {
	s.t.Helper()
	for _, wrong := range s.wrongAtRest() {
		s.t.Error(wrong)
	}
	before := len(s.patches(""))
	time.Sleep(30 * time.Minute)
	for _, p := range s.patches("")[before:] {
		if len(p.Remove) > 0 || len(p.Add) != 1 || p.Add[0] != azure.FoldID(identity) {
			s.t.Errorf("an update without a reason: %v", summaries([]azure.ARMRequest{p}))
		}
	}
}

func TestAnIdentityThatIsMendedIsAttachedSoonAfterItsObjectIsEdited(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		s.identity("blue/app", identityID("typo"))
		s.bind("blue/app", "app")
		s.start()
		s.pod("blue/p", "n0", "app")
		s.within(5*time.Second, "it is refused", func() bool {
			found := s.assignments("blue/p")
			return len(found) == 1 && found[0].Status.Message != ""
		})
		time.Sleep(time.Hour)
		right := s.managedIdentity("right")
		edit(s.api, "blue", "app", func(i *v1.AzureIdentity) { i.Spec.ResourceID = right })
		s.assigned(5*time.Second, "blue/p")
		s.quietly(30 * time.Minute)
	})
}

func TestAnIdentityThatIsCreatedLaterIsAttachedWithinAQuarterOfAnHour(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		s.identity("blue/app", identityID("late"))
		s.bind("blue/app", "app")
		s.start()
		s.pod("blue/p", "n0", "app")
		time.Sleep(2 * time.Hour)
		s.managedIdentity("late")
		s.assigned(20*time.Minute, "blue/p")
		s.quietly(30 * time.Minute)
	})
}

func TestMoreIdentitiesThanAzureTakesAtOnceGoInSeveralUpdates(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		s.cfg.Workers = 32
		var pods []string
		for i := range 320 {
			name := fmt.Sprintf("i%d", i)
			s.identity("blue/"+name, s.managedIdentity(name))
			s.bind("blue/"+name, "all")
		}
		s.start()
		time.Sleep(time.Second)
		s.pod("blue/p", "n0", "all")
		pods = append(pods, "blue/p")
		s.assigned(40*time.Second, pods...)
		if n := len(s.patches("")); n != 3 {
			t.Errorf("%d updates: %v", n, len(summaries(s.patches(""))))
		}
		s.deletePod("blue/p")
		s.gone(delay+time.Minute, "blue/p")
		s.quietly(10 * time.Minute)
	})
}

func TestABurstOfPodsIsAtMostTwoUpdates(t *testing.T) {
	for _, takes := range []time.Duration{0, 50 * time.Second} {
		t.Run(fmt.Sprintf("each takes %s", takes), func(t *testing.T) {
			inWorld(t, func(t *testing.T, s *scene) {
				s.arm.Change(func(a *azure.ARMSettings) { a.Delay = takes })
				s.cfg.Workers = 32
				for i := range 20 {
					s.give("blue", fmt.Sprintf("i%d", i))
				}
				s.start()
				time.Sleep(time.Second)
				var pods []string
				for i := range 200 {
					pods = append(pods, fmt.Sprintf("blue/p%d", i))
					s.pod(pods[i], fmt.Sprintf("n%d", i%2), fmt.Sprintf("i%d", i/10))
					time.Sleep(15 * time.Millisecond)
				}
				s.assigned(3*time.Minute, pods...)
				if n := len(s.patches("")); n > 2 {
					t.Errorf("%d updates: %v", n, summaries(s.patches("")))
				}
			})
		})
	}
}

func TestIdentitiesThatNeedNoMachineAreAssignedWithoutAzure(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		for _, kind := range []v1.IdentityType{v1.ServicePrincipal, v1.ServicePrincipalCertificate, v1.Federated} {
			name := fmt.Sprintf("type%d", kind)
			s.identity("blue/"+name, identityID(name))
			edit(s.api, "blue", name, func(i *v1.AzureIdentity) {
				i.Spec = v1.AzureIdentitySpec{Type: kind, TenantID: "contoso.example", ClientID: clientID(name), ClientPassword: corev1.SecretReference{Name: "s", Namespace: "blue"}}
			})
			s.bind("blue/"+name, "app")
		}
		s.node("elsewhere", "kind://docker/kind/elsewhere")
		s.start()
		s.pod("blue/p", "n0", "app")
		s.pod("blue/q", "elsewhere", "app")
		s.assigned(2*time.Second, "blue/p", "blue/q")
		if n := len(s.assignments("blue/p")); n != 3 {
			t.Errorf("%d assignments", n)
		}
		s.deletePod("blue/p")
		s.gone(3*time.Second, "blue/p")
		s.quietly(time.Hour)
		if log := s.arm.Log(0); len(log) > 0 {
			t.Errorf("ARM was asked %d times", len(log))
		}
	})
}

func TestNodesThatAreOnNothingOfAzuresHarmOnlyTheirOwnPods(t *testing.T) {
	for _, providerID := range []string{"", "kind://docker/kind/x", "azure:///subscriptions/nonsense", "aws:///eu-central-1a/i-0123"} {
		t.Run(providerID, func(t *testing.T) {
			inWorld(t, func(t *testing.T, s *scene) {
				s.give("blue", "app")
				s.node("odd", providerID)
				s.start()
				s.pod("blue/p", "odd", "app")
				s.pod("blue/q", "n0", "app")
				s.assigned(2*time.Second, "blue/q")
				s.within(5*time.Second, "the assignment says what is in the way", func() bool {
					found := s.assignments("blue/p")
					return len(found) == 1 && found[0].Status.Status == v1.AssignmentCreated && strings.Contains(found[0].Status.Message, "odd")
				})
				s.within(5*time.Second, "an Event says so too", func() bool { return len(s.events("Pod", "blue/p")) == 1 })
				edit(s.api, "", "odd", func(n *corev1.Node) { n.Spec.ProviderID = "azure://" + s.set + "/virtualMachines/7" })
				s.assigned(3*time.Second, "blue/p")
				s.quietly(10 * time.Minute)
			})
		})
	}
}

func TestAnIdentityThatCannotWorkIsToldAndLeftOut(t *testing.T) {
	inWorld(t, func(t *testing.T, s *scene) {
		s.give("blue", "app")
		s.identity("blue/odd", "/subscriptions/x/resourceGroups/y")
		s.bind("blue/odd", "app")
		s.bind("blue/nothing", "app")
		s.start()
		s.pod("blue/p", "n0", "app")
		s.assigned(2*time.Second, "blue/p")
		if n := len(s.assignments("blue/p")); n != 1 {
			t.Errorf("%d assignments", n)
		}
		for _, binding := range []string{"blue/odd-app", "blue/nothing-app"} {
			s.within(5*time.Second, "an Event on "+binding, func() bool { return len(s.events("AzureIdentityBinding", binding)) == 1 })
		}
		before := len(all[corev1.Event](s.api))
		s.quietly(3 * time.Hour)
		if after := len(all[corev1.Event](s.api)); after > before {
			t.Errorf("%d more Events while nothing changed", after-before)
		}
	})
}
