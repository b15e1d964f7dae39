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

func TestAnIdentityThatAzureRefusesAffectsNoOther(t *testing.T) {
	const good = 12
	for _, late := range []bool{false, true} {
		for _, naming := range []azure.Naming{azure.NamedInDetails, azure.NamedInText, azure.Unnamed} {
			for _, bad := range []azure.IdentityFault{{Denied: true}, {Missing: true}} {
				t.Run(fmt.Sprintf("denied %t, missing %t, reported at the end %t, named in %s", bad.Denied, bad.Missing, late, naming), func(t *testing.T) {
					runScenario(t, func(t *testing.T, s *scenario) {
						s.arm.Change(func(a *azure.ARMSettings) { a.Naming, a.LateErrors = naming, late })
						s.addBoundIdentity("blue", "bad")
						fault := bad
						fault.Identity = identityID("bad")
						requireNoError(s.t, s.arm.SetIdentityFault(fault))
						s.refused[azure.FoldID(fault.Identity)] = true
						var pods []string
						for i := range good {
							name := fmt.Sprintf("g%d", i)
							s.addBoundIdentity("blue", name)
							pods = append(pods, "blue/"+name)
						}
						s.start()
						time.Sleep(time.Second)
						s.addPod("blue/bad", "n0", "bad")
						for i, pod := range pods {
							s.addPod(pod, fmt.Sprintf("n%d", i%2), fmt.Sprintf("g%d", i))
						}
						s.waitAssigned(5*time.Second, pods...)
						s.expectRefusalReported("blue/bad", "blue/bad-bad")
						s.expectRareRetries(t)
						s.expectStableExcept(fault.Identity)
					})
				})
			}
		}
	}
}

// expectRefusalReported checks that MIC reports the refusal of an identity in the status of the assignment, in an Event
// on the pod and in an Event on the binding.
func (s *scenario) expectRefusalReported(pod, binding string) {
	s.t.Helper()
	s.eventually(5*time.Second, "the assignment has a message", func() bool {
		found := s.assignmentsOf(pod)
		return len(found) == 1 && found[0].Status.Status == v1.AssignmentCreated && found[0].Status.Message != ""
	})
	for kind, key := range map[string]string{"Pod": pod, "AzureIdentityBinding": binding} {
		s.eventually(5*time.Second, "an Event on "+kind+" "+key, func() bool {
			return slices.ContainsFunc(s.events(kind, key), func(text string) bool { return strings.Contains(text, "userAssignedIdentities/") })
		})
	}
}

// expectRareRetries checks that MIC backs off from an identity that Azure refuses.
func (s *scenario) expectRareRetries(t *testing.T) {
	before := len(s.patchRequests(""))
	time.Sleep(time.Hour)
	if n := len(s.patchRequests("")) - before; n < 3 || n > 12 {
		t.Errorf("%d updates in an hour for one identity that Azure refuses; want 3 to 12", n)
	}
	events := listObjects[corev1.Event](s.api)
	if len(events) > 6 {
		t.Errorf("%d Events after an hour; want at most 6", len(events))
	}
}

// expectStableExcept checks that MIC has converged and only retries the identity that Azure refuses.
func (s *scenario) expectStableExcept(identity string) {
	s.t.Helper()
	for _, wrong := range s.convergenceErrors() {
		s.t.Error(wrong)
	}
	before := len(s.patchRequests(""))
	time.Sleep(30 * time.Minute)
	for _, p := range s.patchRequests("")[before:] {
		if len(p.Remove) > 0 || len(p.Add) != 1 || p.Add[0] != azure.FoldID(identity) {
			s.t.Errorf("an update does more than retry the refused identity: %v", patchSummaries([]azure.ARMRequest{p}))
		}
	}
}

func TestACorrectedAzureIdentityIsAttachedSoonAfterTheEdit(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		s.addAzureIdentity("blue/app", identityID("typo"))
		s.addBinding("blue/app", "app")
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.eventually(5*time.Second, "the refusal is reported", func() bool {
			found := s.assignmentsOf("blue/p")
			return len(found) == 1 && found[0].Status.Message != ""
		})
		time.Sleep(time.Hour)
		corrected := s.addManagedIdentity("right")
		editObject(s.api, "blue", "app", func(i *v1.AzureIdentity) { i.Spec.ResourceID = corrected })
		s.waitAssigned(5*time.Second, "blue/p")
		s.expectStable(30 * time.Minute)
	})
}

func TestAnIdentityCreatedInAzureLaterIsAttachedWithinTwentyMinutes(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		s.addAzureIdentity("blue/app", identityID("late"))
		s.addBinding("blue/app", "app")
		s.start()
		s.addPod("blue/p", "n0", "app")
		time.Sleep(2 * time.Hour)
		s.addManagedIdentity("late")
		s.waitAssigned(20*time.Minute, "blue/p")
		s.expectStable(30 * time.Minute)
	})
}

func TestMoreIdentitiesThanAzureAcceptsInOneUpdateAreSplitIntoSeveral(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		s.cfg.Workers = 32
		var pods []string
		for i := range 320 {
			name := fmt.Sprintf("i%d", i)
			s.addAzureIdentity("blue/"+name, s.addManagedIdentity(name))
			s.addBinding("blue/"+name, "all")
		}
		s.start()
		time.Sleep(time.Second)
		s.addPod("blue/p", "n0", "all")
		pods = append(pods, "blue/p")
		s.waitAssigned(40*time.Second, pods...)
		if n := len(s.patchRequests("")); n != 3 {
			t.Errorf("MIC sent %d updates for 320 identities; want 3", n)
		}
		s.deletePod("blue/p")
		s.waitUnassigned(detachTimeout+time.Minute, "blue/p")
		s.expectStable(10 * time.Minute)
	})
}

func TestABurstOfPodsIsAtMostTwoUpdates(t *testing.T) {
	for _, takes := range []time.Duration{0, 50 * time.Second} {
		t.Run(fmt.Sprintf("an update takes %s", takes), func(t *testing.T) {
			runScenario(t, func(t *testing.T, s *scenario) {
				s.arm.Change(func(a *azure.ARMSettings) { a.Delay = takes })
				s.cfg.Workers = 32
				for i := range 20 {
					s.addBoundIdentity("blue", fmt.Sprintf("i%d", i))
				}
				s.start()
				time.Sleep(time.Second)
				var pods []string
				for i := range 200 {
					pods = append(pods, fmt.Sprintf("blue/p%d", i))
					s.addPod(pods[i], fmt.Sprintf("n%d", i%2), fmt.Sprintf("i%d", i/10))
					time.Sleep(15 * time.Millisecond)
				}
				s.waitAssigned(3*time.Minute, pods...)
				if n := len(s.patchRequests("")); n > 2 {
					t.Errorf("MIC sent %d updates for a burst of pods; want at most 2: %v", n, patchSummaries(s.patchRequests("")))
				}
			})
		})
	}
}

func TestIdentityTypesThatAreNotAttachedAreAssignedWithoutAzure(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		for _, kind := range []v1.IdentityType{v1.ServicePrincipal, v1.ServicePrincipalCertificate, v1.Federated} {
			name := fmt.Sprintf("type%d", kind)
			s.addAzureIdentity("blue/"+name, identityID(name))
			editObject(s.api, "blue", name, func(i *v1.AzureIdentity) {
				i.Spec = v1.AzureIdentitySpec{Type: kind, TenantID: "contoso.example", ClientID: clientID(name), ClientPassword: corev1.SecretReference{Name: "s", Namespace: "blue"}}
			})
			s.addBinding("blue/"+name, "app")
		}
		s.addNode("elsewhere", "kind://docker/kind/elsewhere")
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.addPod("blue/q", "elsewhere", "app")
		s.waitAssigned(2*time.Second, "blue/p", "blue/q")
		if n := len(s.assignmentsOf("blue/p")); n != 3 {
			t.Errorf("the pod has %d assignments; want 3", n)
		}
		s.deletePod("blue/p")
		s.waitUnassigned(3*time.Second, "blue/p")
		s.expectStable(time.Hour)
		if log := s.arm.Log(0); len(log) > 0 {
			t.Errorf("ARM got %d requests", len(log))
		}
	})
}

func TestNodesOutsideAzureAffectOnlyTheirOwnPods(t *testing.T) {
	for _, providerID := range []string{"", "kind://docker/kind/x", "azure:///subscriptions/nonsense", "aws:///eu-central-1a/i-0123"} {
		t.Run(providerID, func(t *testing.T) {
			runScenario(t, func(t *testing.T, s *scenario) {
				s.addBoundIdentity("blue", "app")
				s.addNode("odd", providerID)
				s.start()
				s.addPod("blue/p", "odd", "app")
				s.addPod("blue/q", "n0", "app")
				s.waitAssigned(2*time.Second, "blue/q")
				s.eventually(5*time.Second, "the assignment has a message", func() bool {
					found := s.assignmentsOf("blue/p")
					return len(found) == 1 && found[0].Status.Status == v1.AssignmentCreated && strings.Contains(found[0].Status.Message, "odd")
				})
				s.eventually(5*time.Second, "the pod has an Event", func() bool { return len(s.events("Pod", "blue/p")) == 1 })
				editObject(s.api, "", "odd", func(n *corev1.Node) { n.Spec.ProviderID = "azure://" + s.set + "/virtualMachines/7" })
				s.waitAssigned(3*time.Second, "blue/p")
				s.expectStable(10 * time.Minute)
			})
		})
	}
}

func TestAnInvalidAzureIdentityIsReportedAndSkipped(t *testing.T) {
	runScenario(t, func(t *testing.T, s *scenario) {
		s.addBoundIdentity("blue", "app")
		s.addAzureIdentity("blue/odd", "/subscriptions/x/resourceGroups/y")
		s.addBinding("blue/odd", "app")
		s.addBinding("blue/nothing", "app")
		s.start()
		s.addPod("blue/p", "n0", "app")
		s.waitAssigned(2*time.Second, "blue/p")
		if n := len(s.assignmentsOf("blue/p")); n != 1 {
			t.Errorf("the pod has %d assignments; want 1", n)
		}
		for _, binding := range []string{"blue/odd-app", "blue/nothing-app"} {
			s.eventually(5*time.Second, "an Event on "+binding, func() bool { return len(s.events("AzureIdentityBinding", binding)) == 1 })
		}
		before := len(listObjects[corev1.Event](s.api))
		s.expectStable(3 * time.Hour)
		if after := len(listObjects[corev1.Event](s.api)); after > before {
			t.Errorf("%d more Events while nothing changed", after-before)
		}
	})
}
