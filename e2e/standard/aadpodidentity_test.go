package standard

import (
	"fmt"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// takeOverFromAADPodIdentity checks that MIC takes over two assignments of AAD Pod Identity: one of a running pod, and
// one of a pod that does not exist, as if the pod had been deleted while no MIC ran.
func takeOverFromAADPodIdentity(t *testing.T, l *testEnvironment) {
	s, used, orphan := l.newNamespace(t), l.newIdentity(t), l.newIdentity(t)
	l.scaleMIC(t, 0)
	s.bind("app", "app", managed(used))
	s.bind("old", "old", managed(orphan))
	for _, id := range []azure.Identity{used, orphan} {
		must(t, l.cloud.AttachTo(t.Context(), "node1", id.ResourceID))
	}
	s.startPod("p", "app", "node1")
	usedBefore, orphanBefore := s.createAADPodIdentityAssignment("p", "app"), s.createAADPodIdentityAssignment("gone", "old")
	v := s.clientIn("p").startPolling()
	v.waitForTokens(20)
	l.scaleMIC(t, 2)
	t.Parallel()

	a := s.waitForOnlyAssignment("p", "app", used)
	if len(a.OwnerReferences) != 1 || a.OwnerReferences[0].Name != "p" {
		t.Errorf("the owners of the assignment are %+v", a.OwnerReferences)
	}
	l.waitUntilDeleted(t, usedBefore)
	v.waitForTokens(20)
	v.end()
	if changes := l.changes(t, "node1", used); len(changes) != 1 {
		t.Errorf("an identity that was in use all the time must not be changed after the test attached it; its changes: %+v", changes)
	}
	deleted := s.deletePod("p")
	l.mustBeDetachedAfterDelay(t, "node1", used, deleted)
	l.waitUntilDetached(t, "node1", orphan)
	s.waitUntilReleased("p")
	l.waitUntilDeleted(t, orphanBefore)
}

// createAADPodIdentityAssignment creates an AzureAssignedIdentity in the form of AAD Pod Identity, for a pod on node1.
func (s *testNamespace) createAADPodIdentityAssignment(pod, identity string) *v1.AzureAssignedIdentity {
	s.t.Helper()
	var i v1.AzureIdentity
	var b v1.AzureIdentityBinding
	must(s.t, s.kube.Get(s.t.Context(), client.ObjectKey{Namespace: s.name, Name: identity}, &i))
	must(s.t, s.kube.Get(s.t.Context(), client.ObjectKey{Namespace: s.name, Name: identity}, &b))
	o := &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: pod + "-" + s.name + "-" + identity,
			Labels: map[string]string{v1.NodeNameLabel: "node1"}, Finalizers: []string{v1.AssignedIdentityFinalizer},
		},
		Spec: v1.AzureAssignedIdentitySpec{AzureIdentityRef: i.Copy(), AzureBindingRef: b.Copy(), Pod: pod, PodNamespace: s.name, NodeName: "node1"},
	}
	s.create(o)
	o.Status.Status = v1.AssignmentAssigned
	must(s.t, s.kube.Status().Update(s.t.Context(), o))
	return o
}

// tokenPoller requests a token every 50 ms until end is called. Every other request asks NMI to bypass its cache, which
// NMI does at most once in ten seconds.
type tokenPoller struct {
	podClient
	stop chan struct{}
	done sync.WaitGroup

	mu              sync.Mutex
	tokens, refused int
}

func (a podClient) startPolling() *tokenPoller {
	v := &tokenPoller{podClient: a, stop: make(chan struct{})}
	v.done.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-v.stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
			var query []string
			if i%2 == 0 {
				query = []string{fresh}
			}
			got := v.ask(query...)
			if v.s.t.Context().Err() != nil {
				return
			}
			v.mu.Lock()
			if got.status == 200 {
				v.tokens++
			} else if v.refused++; v.refused == 1 {
				v.s.t.Errorf("after %d tokens, a pod that has its identity receives %d %s", v.tokens, got.status, got.raw)
			}
			v.mu.Unlock()
		}
	})
	v.s.t.Cleanup(v.end)
	return v
}

// waitForTokens waits for n more tokens.
func (v *tokenPoller) waitForTokens(n int) {
	v.s.t.Helper()
	count := func() int {
		v.mu.Lock()
		defer v.mu.Unlock()
		return v.tokens
	}
	from := count()
	eventually(v.s.t, reactionTimeout, func() error {
		if got := count() - from; got < n {
			return fmt.Errorf("the pod received %d of %d tokens", got, n)
		}
		return nil
	})
}

func (v *tokenPoller) end() {
	select {
	case <-v.stop:
	default:
		close(v.stop)
	}
	v.done.Wait()
}
