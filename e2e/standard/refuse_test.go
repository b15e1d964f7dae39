package standard

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

func refusedIdentities(t *testing.T, l *layout) {
	s, good, denied, misspelled := l.newSpace(t), l.newIdentity(t), l.newIdentity(t), l.newIdentity(t)
	must(t, l.cloud.SetIdentityFault(t.Context(), azure.IdentityFault{Identity: denied.ResourceID, Denied: true}))
	wrong := managed(misspelled)
	wrong.ResourceID += "-typo" // of which there is none
	s.bind("good", "app", managed(good))
	s.bind("denied", "app", managed(denied))
	s.bind("misspelled", "app", wrong)
	s.start("p", "app", "node1")
	p := s.in("p")
	of := func(id azure.Identity) string { return "client_id=" + id.ClientID }
	p.untilOf(good, of(good))

	for _, bad := range []struct {
		name, resource string
		id             azure.Identity
		advice         string
	}{
		{"denied", denied.ResourceID, denied, "grant MIC's identity the role Managed Identity Operator"},
		{"misspelled", wrong.ResourceID, misspelled, "see that the managed identity exists"},
	} {
		eventually(t, inTime, func() error { return s.waits("p", bad.name, bad.resource, bad.advice) })
		eventually(t, 10*time.Second, func() error {
			for kind, object := range map[string]string{"Pod": "p", "AzureIdentityBinding": bad.name} {
				if told := s.events(kind, object); !strings.Contains(told, bad.advice) || !containsFold(told, bad.resource) {
					return fmt.Errorf("Events of %s %s: %q", kind, object, told)
				}
			}
			return nil
		})
		a := p.ask(of(bad.id))
		a.mustBeRefused(t, 503, "assignment_failed")
		if !strings.Contains(a.raw, s.name+"/"+bad.name) || !strings.Contains(a.raw, bad.advice) || a.header.Get("Retry-After") != "5" {
			t.Errorf("the pod is told %v %s", a.header, a.raw)
		}
		if a.took > 10*time.Second {
			t.Errorf("the pod was told after %s", a.took)
		}
	}

	// Both are mended. One that comes while they are set aside is not held up either.
	must(t, l.cloud.SetIdentityFault(t.Context(), azure.IdentityFault{Identity: denied.ResourceID}))
	s.edit("misspelled", managed(misspelled))
	mended, late := time.Now(), l.newIdentity(t)
	s.bind("late", "late", managed(late))
	s.start("q", "late", "node1")
	s.in("q").untilOf(late)
	p.untilOf(misspelled, of(misspelled))
	if l.vms { // whoever does not want to wait until MIC tries again by itself
		touch := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"mended":"yes"}}}`))
		must(t, l.kube.Patch(t.Context(), &v1.AzureIdentity{ObjectMeta: s.meta("denied")}, touch))
	}
	p.untilOf(denied, of(denied))
	t.Logf("an identity that MIC may assign now is assigned %.0f s later", time.Since(mended).Seconds())
	p.ask(of(good), fresh).mustBeOf(t, l, good)
	eventually(t, 10*time.Second, func() error {
		have := s.assignments("p")
		if len(have) != 3 || slices.ContainsFunc(have, func(a v1.AzureAssignedIdentity) bool {
			return a.Status.Status != v1.AssignmentAssigned || a.Status.Message != ""
		}) {
			return fmt.Errorf("the pod has %s", brief(have))
		}
		return nil
	})
}

// waits reports whether the assignment is there, and says why it goes no further.
func (s *space) waits(pod, identity, resource, advice string) error {
	have := s.assignments(pod)
	if !slices.ContainsFunc(have, func(a v1.AzureAssignedIdentity) bool {
		return a.Spec.AzureIdentityRef.Metadata.Name == identity && a.Status.Status == v1.AssignmentCreated &&
			strings.Contains(a.Status.Message, advice) && containsFold(a.Status.Message, resource)
	}) {
		return fmt.Errorf("nothing says of %s that %q: %s", identity, advice, brief(have))
	}
	return nil
}

func containsFold(text, part string) bool {
	return strings.Contains(strings.ToLower(text), strings.ToLower(part))
}

func silentMachine(t *testing.T, l *layout) {
	s, id := l.newSpace(t), l.newIdentity(t)
	silent, err := l.cloud.Machine(t.Context(), "node2")
	must(t, err)
	must(t, l.cloud.SetARMFault(t.Context(), azure.ARMFault{Resource: silent.ID, Hang: true}))
	t.Cleanup(func() { _ = l.cloud.ClearARMFaults(context.Background(), silent.ID) }) // other tests use that machine
	s.bind("app", "app", managed(id))
	s.start("waits", "app", "node2")
	s.start("goes-on", "app", "node1")
	s.in("goes-on").untilOf(id)
	if have := s.assignments("waits"); len(have) != 1 || have[0].Status.Status == v1.AssignmentAssigned {
		t.Errorf("on a machine about which ARM does not answer the pod has %s", brief(have))
	}
	must(t, l.cloud.ClearARMFaults(t.Context(), silent.ID))
	s.in("waits").untilOf(id)
}
