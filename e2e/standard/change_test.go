package standard

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// waitForTokenOf requests tokens until one is for the identity, like a client that retries. A response with a status
// other than 200 and 503 fails the test. NMI observes a change a moment after the API server has it, so a token for the
// previous identity is not an error.
func (a podClient) waitForTokenOf(id azure.Identity, query ...string) {
	a.s.t.Helper()
	eventually(a.s.t, updateTimeout, func() error {
		got := a.ask(query...)
		if got.status != 200 && got.status != 503 {
			a.s.t.Fatalf("a pod that waits for its identity receives %d %s", got.status, got.raw)
		}
		return got.isOf(a.s.testEnvironment, id)
	})
}

// waitForOnlyAssignment waits until the identity is assigned to the pod and the pod has no other assignment. It returns
// the assignment.
func (s *testNamespace) waitForOnlyAssignment(pod, identity string, id azure.Identity) (a v1.AzureAssignedIdentity) {
	s.t.Helper()
	a = s.waitUntilAssigned(pod, identity, id)
	eventually(s.t, reactionTimeout, func() error {
		if have := s.assignments(pod); len(have) != 1 {
			return fmt.Errorf("pod %s has %s", pod, describe(have))
		}
		return nil
	})
	return a
}

func editedResourceID(t *testing.T, l *testEnvironment) {
	s, before, after := l.newNamespace(t), l.newIdentity(t), l.newIdentity(t)
	s.bind("app", "app", managed(before))
	s.startPod("p", "app", "node1")
	p := s.clientIn("p")
	p.waitForTokenOf(before)
	first := s.waitForOnlyAssignment("p", "app", before)

	respelled := managed(before)
	respelled.ResourceID = strings.ToLower(respelled.ResourceID)
	s.edit("app", respelled)
	eventually(t, reactionTimeout, func() error {
		if a := s.waitForOnlyAssignment("p", "app", before); a.Name != first.Name || a.Spec.AzureIdentityRef.Spec.ResourceID != respelled.ResourceID {
			return fmt.Errorf("the same resource ID in other letter case must change the assignment and not replace it: %s", describe(s.assignments("p")))
		}
		return nil
	})
	p.ask(fresh).mustBeOf(t, l, before)

	edited := time.Now()
	s.edit("app", managed(after))
	p.waitForTokenOf(after)
	l.mustBeDetachedAfterDelay(t, "node1", before, edited)
	if a := s.waitForOnlyAssignment("p", "app", after); a.Name == first.Name {
		t.Errorf("the new identity has the same assignment %s as the old one", a.Name)
	}
	p.ask(fresh).mustBeOf(t, l, after)
	if updates := l.updates(t, before); len(updates) != 2 {
		t.Errorf("want one update to attach and one to detach the identity; got %+v", updates)
	}
}

func editedClientID(t *testing.T, l *testEnvironment) {
	s, id, elsewhere := l.newNamespace(t), l.newIdentity(t), l.newIdentity(t)
	wrong := managed(id)
	wrong.ClientID = elsewhere.ClientID
	s.bind("app", "app", wrong)
	s.startPod("p", "app", "node1")
	assigned := s.waitForOnlyAssignment("p", "app", id)
	p := s.clientIn("p")
	answers := make(chan answer, 1)
	go func() { answers <- p.ask() }()
	select {
	case a := <-answers:
		t.Errorf("IMDS may not know the client ID yet, so the request must wait; got %d %s", a.status, a.raw)
		answers <- a
	case <-time.After(2 * time.Second):
	}
	s.edit("app", managed(id))
	(<-answers).mustBeOf(t, l, id)
	eventually(t, reactionTimeout, func() error {
		if a := s.waitForOnlyAssignment("p", "app", id); a.Name != assigned.Name || a.Spec.AzureIdentityRef.Spec.ClientID != id.ClientID {
			return fmt.Errorf("the assignment does not have the new client ID: %s", describe(s.assignments("p")))
		}
		return nil
	})
	if updates := l.updates(t, id); len(updates) != 1 {
		t.Errorf("another client ID needs no update of the machine; got %+v", updates)
	}
	s.edit("app", wrong)
	p.http.Timeout = 2 * time.Second
	eventually(t, reactionTimeout, func() error {
		if a := p.ask(); a.status == 200 {
			return fmt.Errorf("the pod still gets a token for the previous client ID: %s", a.raw)
		}
		return nil
	})
}

func deletedBinding(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.newIdentity(t)
	s.bind("app", "app", managed(id))
	s.startPod("p", "app", "node1")
	p := s.clientIn("p")
	p.waitForTokenOf(id)
	deleted := time.Now()
	must(t, l.kube.Delete(t.Context(), &v1.AzureIdentityBinding{ObjectMeta: s.meta("app")}))
	eventually(t, reactionTimeout, func() error {
		if a := p.ask(); a.status == 200 {
			return fmt.Errorf("the pod still gets a token: %s", a.raw)
		}
		return nil
	})
	p.ask().mustBeRefused(t, 400, "no_matching_binding")
	if !l.attached(t, "node1", id) {
		t.Error("the identity was detached before the detach delay had passed")
	}
	l.mustBeDetachedAfterDelay(t, "node1", id, deleted)
	s.waitUntilReleased("p")
}

func changedLabel(t *testing.T, l *testEnvironment) {
	s, before, after := l.newNamespace(t), l.newIdentity(t), l.newIdentity(t)
	s.bind("before", "before", managed(before))
	s.bind("after", "after", managed(after))
	s.startPod("p", "before", "node1")
	p := s.clientIn("p")
	p.waitForTokenOf(before)
	deleted := time.Now()
	label := client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, v1.BindingLabel, s.label("after")))
	must(t, l.kube.Patch(t.Context(), &corev1.Pod{ObjectMeta: s.meta("p")}, label))
	p.waitForTokenOf(after)
	l.mustBeDetachedAfterDelay(t, "node1", before, deleted)
	s.waitForOnlyAssignment("p", "after", after)
	p.ask(fresh).mustBeOf(t, l, after)
}
