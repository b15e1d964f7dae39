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

func refusedIdentities(t *testing.T, l *testEnvironment) {
	s, good, denied, misspelled := l.newNamespace(t), l.newIdentity(t), l.newIdentity(t), l.newIdentity(t)
	must(t, l.cloud.SetIdentityFault(t.Context(), azure.IdentityFault{Identity: denied.ResourceID, Denied: true}))
	wrong := managed(misspelled)
	wrong.ResourceID += "-typo" // such an identity does not exist
	s.bind("good", "app", managed(good))
	s.bind("denied", "app", managed(denied))
	s.bind("misspelled", "app", wrong)
	s.startPod("p", "app", "node1")
	p := s.clientIn("p")
	of := func(id azure.Identity) string { return "client_id=" + id.ClientID }
	p.waitForTokenOf(good, of(good))

	for _, bad := range []struct {
		name, resource string
		id             azure.Identity
		advice         string
	}{
		{"denied", denied.ResourceID, denied, "grant MIC's identity the role Managed Identity Operator"},
		{"misspelled", wrong.ResourceID, misspelled, "check that the managed identity exists"},
	} {
		p.checkRefusal(t, bad.name, bad.resource, bad.advice, of(bad.id))
	}

	// The test repairs both refused identities. Pod q must get a new identity without a wait for MIC's retries of the
	// repaired identities.
	must(t, l.cloud.SetIdentityFault(t.Context(), azure.IdentityFault{Identity: denied.ResourceID}))
	s.edit("misspelled", managed(misspelled))
	repaired, late := time.Now(), l.newIdentity(t)
	s.bind("late", "late", managed(late))
	s.startPod("q", "late", "node1")
	s.clientIn("q").waitForTokenOf(late)
	p.waitForTokenOf(misspelled, of(misspelled))
	// With virtual machines, the test edits the AzureIdentity, which makes MIC retry immediately. With one scale set,
	// the test waits until MIC retries without an edit.
	if l.vms {
		touch := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"repaired":"yes"}}}`))
		must(t, l.kube.Patch(t.Context(), &v1.AzureIdentity{ObjectMeta: s.meta("denied")}, touch))
	}
	p.waitForTokenOf(denied, of(denied))
	t.Logf("the denied identity is assigned %.0f s after MIC got the right to assign it", time.Since(repaired).Seconds())
	p.ask(of(good), fresh).mustBeOf(t, l, good)
	eventually(t, reactionTimeout, func() error {
		have := s.assignments("p")
		if len(have) != 3 || slices.ContainsFunc(have, func(a v1.AzureAssignedIdentity) bool {
			return a.Status.Status != v1.AssignmentAssigned || a.Status.Message != ""
		}) {
			return fmt.Errorf("the pod has %s", describe(have))
		}
		return nil
	})
}

// checkRefusal checks that the assignment, the Events and the answer of NMI report the refusal of an identity.
func (p podClient) checkRefusal(t *testing.T, name, resource, advice, query string) {
	t.Helper()
	s := p.s
	eventually(t, updateTimeout, func() error { return s.checkWaiting("p", name, resource, advice) })
	eventually(t, reactionTimeout, func() error {
		for kind, object := range map[string]string{"Pod": "p", "AzureIdentityBinding": name} {
			if events := s.events(kind, object); !strings.Contains(events, advice) || !containsFold(events, resource) {
				return fmt.Errorf("the Events of %s %s are %q", kind, object, events)
			}
		}
		return nil
	})
	a := p.ask(query)
	a.mustBeRefused(t, 503, "assignment_failed")
	if !strings.Contains(a.raw, s.name+"/"+name) || !strings.Contains(a.raw, advice) || a.header.Get("Retry-After") != "5" {
		t.Errorf("the response does not name the AzureIdentity, the remedy %q or Retry-After 5: %v %s", advice, a.header, a.raw)
	}
	if a.took > 20*time.Second { // NMI waits 25 s for an assignment that MIC is still working on
		t.Errorf("NMI answered after %s; want an answer without a wait for the assignment", a.took)
	}
}

// checkWaiting returns nil if the pod has an assignment in state Created whose message explains the refusal.
func (s *testNamespace) checkWaiting(pod, identity, resource, advice string) error {
	have := s.assignments(pod)
	if !slices.ContainsFunc(have, func(a v1.AzureAssignedIdentity) bool {
		return a.Spec.AzureIdentityRef.Metadata.Name == identity && a.Status.Status == v1.AssignmentCreated &&
			strings.Contains(a.Status.Message, advice) && containsFold(a.Status.Message, resource)
	}) {
		return fmt.Errorf("want an assignment of %s in state Created with the message %q; got %s", identity, advice, describe(have))
	}
	return nil
}

func containsFold(text, part string) bool {
	return strings.Contains(strings.ToLower(text), strings.ToLower(part))
}

func unresponsiveMachine(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.newIdentity(t)
	silent, err := l.cloud.Machine(t.Context(), "node2")
	must(t, err)
	must(t, l.cloud.SetARMFault(t.Context(), azure.ARMFault{Resource: silent.ID, Hang: true}))
	t.Cleanup(func() { _ = l.cloud.ClearARMFaults(context.Background(), silent.ID) }) // other tests use that machine
	s.bind("app", "app", managed(id))
	s.startPod("waits", "app", "node2")
	s.startPod("goes-on", "app", "node1")
	s.clientIn("goes-on").waitForTokenOf(id)
	if have := s.assignments("waits"); len(have) != 1 || have[0].Status.Status == v1.AssignmentAssigned {
		t.Errorf("ARM does not answer for the machine, but the pod has %s", describe(have))
	}
	must(t, l.cloud.ClearARMFaults(t.Context(), silent.ID))
	s.clientIn("waits").waitForTokenOf(id)
}
