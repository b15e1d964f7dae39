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

// untilOf asks until a token of the identity comes, as a client does that is told to come again. NMI hears of a change a
// moment after the API server has it, so a token of what was before is no fault.
func (a asking) untilOf(id azure.Identity, query ...string) {
	a.s.t.Helper()
	eventually(a.s.t, inTime, func() error {
		got := a.ask(query...)
		if got.status != 200 && got.status != 503 {
			a.s.t.Fatalf("a pod that is to have its identity is told %d %s", got.status, got.raw)
		}
		return got.isOf(a.s.layout, id)
	})
}

// hasOnly waits until that is the only assignment of the pod.
func (s *space) hasOnly(pod, identity string, id azure.Identity) (a v1.AzureAssignedIdentity) {
	s.t.Helper()
	a = s.untilAssigned(pod, identity, id)
	eventually(s.t, 10*time.Second, func() error {
		if have := s.assignments(pod); len(have) != 1 {
			return fmt.Errorf("pod %s has %s", pod, brief(have))
		}
		return nil
	})
	return a
}

func editedResourceID(t *testing.T, l *layout) {
	s, before, after := l.newSpace(t), l.newIdentity(t), l.newIdentity(t)
	s.bind("app", "app", managed(before))
	s.start("p", "app", "node1")
	p := s.in("p")
	p.untilOf(before)
	first := s.hasOnly("p", "app", before)

	respelled := managed(before)
	respelled.ResourceID = strings.ToLower(respelled.ResourceID)
	s.edit("app", respelled)
	eventually(t, 10*time.Second, func() error {
		if a := s.hasOnly("p", "app", before); a.Name != first.Name || a.Spec.AzureIdentityRef.Spec.ResourceID != respelled.ResourceID {
			return fmt.Errorf("what is spelled otherwise is the same resource, and the assignment is to say so: %s", brief(s.assignments("p")))
		}
		return nil
	})
	p.ask(fresh).mustBeOf(t, l, before)

	edited := time.Now()
	s.edit("app", managed(after))
	p.untilOf(after)
	l.mustGoAfterDelay(t, "node1", before, edited)
	if a := s.hasOnly("p", "app", after); a.Name == first.Name {
		t.Errorf("another identity has the assignment %s of the one before", a.Name)
	}
	p.ask(fresh).mustBeOf(t, l, after)
	if updates := l.updates(t, before); len(updates) != 2 {
		t.Errorf("to attach and to detach took %+v", updates)
	}
}

func editedClientID(t *testing.T, l *layout) {
	s, id, elsewhere := l.newSpace(t), l.newIdentity(t), l.newIdentity(t)
	wrong := managed(id)
	wrong.ClientID = elsewhere.ClientID
	s.bind("app", "app", wrong)
	s.start("p", "app", "node1")
	assigned := s.hasOnly("p", "app", id)
	p := s.in("p")
	held := make(chan answer, 1)
	go func() { held <- p.ask() }()
	select {
	case a := <-held:
		t.Errorf("the machine's service does not know the client ID, perhaps not yet: %d %s", a.status, a.raw)
		held <- a
	case <-time.After(2 * time.Second):
	}
	s.edit("app", managed(id))
	(<-held).mustBeOf(t, l, id)
	eventually(t, 5*time.Second, func() error {
		if a := s.hasOnly("p", "app", id); a.Name != assigned.Name || a.Spec.AzureIdentityRef.Spec.ClientID != id.ClientID {
			return fmt.Errorf("the assignment does not say so: %s", brief(s.assignments("p")))
		}
		return nil
	})
	if updates := l.updates(t, id); len(updates) != 1 {
		t.Errorf("a client ID is nothing to ARM, which was asked for %+v", updates)
	}
	s.edit("app", wrong)
	hasty := p
	hasty.from.Timeout = 2 * time.Second
	eventually(t, 5*time.Second, func() error {
		if a := hasty.ask(); a.status == 200 {
			return fmt.Errorf("there is still a token of the client ID that was: %s", a.raw)
		}
		return nil
	})
}

func deletedBinding(t *testing.T, l *layout) {
	s, id := l.newSpace(t), l.newIdentity(t)
	s.bind("app", "app", managed(id))
	s.start("p", "app", "node1")
	p := s.in("p")
	p.untilOf(id)
	told := time.Now()
	must(t, l.kube.Delete(t.Context(), &v1.AzureIdentityBinding{ObjectMeta: s.meta("app")}))
	eventually(t, 5*time.Second, func() error {
		if a := p.ask(); a.status == 200 {
			return fmt.Errorf("there is still a token: %s", a.raw)
		}
		return nil
	})
	p.ask().mustBeRefused(t, 400, "no_matching_binding")
	if !l.attached(t, "node1", id) {
		t.Error("the identity was detached without a delay")
	}
	l.mustGoAfterDelay(t, "node1", id, told)
	s.untilReleased("p")
}

func changedLabel(t *testing.T, l *layout) {
	s, before, after := l.newSpace(t), l.newIdentity(t), l.newIdentity(t)
	s.bind("before", "before", managed(before))
	s.bind("after", "after", managed(after))
	s.start("p", "before", "node1")
	p := s.in("p")
	p.untilOf(before)
	told := time.Now()
	label := client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, v1.BindingLabel, s.label("after")))
	must(t, l.kube.Patch(t.Context(), &corev1.Pod{ObjectMeta: s.meta("p")}, label))
	p.untilOf(after)
	l.mustGoAfterDelay(t, "node1", before, told)
	s.hasOnly("p", "after", after)
	p.ask(fresh).mustBeOf(t, l, after)
}
