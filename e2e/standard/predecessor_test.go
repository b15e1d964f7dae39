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

// thePredecessorsObjects changes over from AAD Pod Identity: for a pod that runs, and for one that ended while no MIC was
// there to see it.
func thePredecessorsObjects(t *testing.T, l *layout) {
	s, used, orphan := l.newSpace(t), l.newIdentity(t), l.newIdentity(t)
	l.scaleMIC(t, 0)
	s.bind("app", "app", managed(used))
	s.bind("old", "old", managed(orphan))
	for _, id := range []azure.Identity{used, orphan} {
		must(t, l.cloud.AttachTo(t.Context(), "node1", id.ResourceID))
	}
	s.start("p", "app", "node1")
	usedBefore, orphanBefore := s.asPredecessor("p", "app"), s.asPredecessor("gone", "old")
	v := s.in("p").vigil()
	v.good(20)
	l.scaleMIC(t, 2)
	t.Parallel()

	a := s.hasOnly("p", "app", used)
	if len(a.OwnerReferences) != 1 || a.OwnerReferences[0].Name != "p" {
		t.Errorf("the assignment is owned by %+v", a.OwnerReferences)
	}
	l.untilGone(t, usedBefore)
	v.good(20)
	v.end()
	if changes := l.changes(t, "node1", used); len(changes) != 1 {
		t.Errorf("an identity that was in use all the time saw %+v", changes)
	}
	told := s.end("p")
	l.mustGoAfterDelay(t, "node1", used, told)
	l.untilDetached(t, "node1", orphan)
	s.untilReleased("p")
	l.untilGone(t, orphanBefore)
}

// asPredecessor makes an AzureAssignedIdentity as AAD Pod Identity wrote them, for a pod on node1.
func (s *space) asPredecessor(pod, identity string) *v1.AzureAssignedIdentity {
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
	s.make(o)
	o.Status.Status = v1.AssignmentAssigned
	must(s.t, s.kube.Status().Update(s.t.Context(), o))
	return o
}

// vigil asks for tokens all the time, every other one a new one of the machine's metadata service.
type vigil struct {
	asking
	stop chan struct{}
	done sync.WaitGroup

	mu              sync.Mutex
	tokens, refused int
}

func (a asking) vigil() *vigil {
	v := &vigil{asking: a, stop: make(chan struct{})}
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
				v.s.t.Errorf("after %d tokens a pod that has its identity is told %d %s", v.tokens, got.status, got.raw)
			}
			v.mu.Unlock()
		}
	})
	v.s.t.Cleanup(v.end)
	return v
}

// good waits for n tokens from now on.
func (v *vigil) good(n int) {
	v.s.t.Helper()
	count := func() int {
		v.mu.Lock()
		defer v.mu.Unlock()
		return v.tokens
	}
	from := count()
	eventually(v.s.t, 20*time.Second, func() error {
		if got := count() - from; got < n {
			return fmt.Errorf("%d of %d tokens", got, n)
		}
		return nil
	})
}

func (v *vigil) end() {
	select {
	case <-v.stop:
	default:
		close(v.stop)
	}
	v.done.Wait()
}
