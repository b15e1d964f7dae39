package standard

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

func detachedByHand(t *testing.T, l *layout) {
	s, id := l.newSpace(t), l.newIdentity(t)
	s.bind("app", "app", managed(id))
	s.start("p", "app", "node1")
	p := s.in("p")
	p.untilOf(id)
	s.untilAssigned("p", "app", id)
	must(t, l.cloud.DetachFrom(t.Context(), "node1", id.ResourceID))
	detached := time.Now()
	eventually(t, inTime, func() error {
		if !l.attached(t, "node1", id) {
			return fmt.Errorf("the identity is not attached again")
		}
		return nil
	})
	t.Logf("attached again after %.1f s", time.Since(detached).Seconds())
	s.untilAssigned("p", "app", id)
	p.ask(fresh).mustBeOf(t, l, id)
	told := s.end("p")
	l.mustGoAfterDelay(t, "node1", id, told)
}

func attachedByHand(t *testing.T, l *layout) {
	s, id := l.newSpace(t), l.foreign[0]
	s.bind("app", "app", managed(id))
	s.start("p", "app", "node1")
	s.in("p").ask().mustBeOf(t, l, id)
	s.end("p")
	s.untilReleased("p")
	if patches := l.patches(t, id); len(patches) != 0 {
		t.Errorf("ARM was asked to attach or detach what was there: %+v", patches)
	}
}

func immutableIdentity(t *testing.T, l *layout) {
	s, id := l.newSpace(t), l.stays
	s.bind("app", "app", managed(id))
	s.start("p", "app", "node1")
	s.in("p").untilOf(id)
	s.end("p")
	s.untilReleased("p")
	eventually(t, inTime, func() error {
		if l.inLedgers(t, id) {
			return fmt.Errorf("MIC still has in mind to detach it")
		}
		return nil
	})
	if !l.attached(t, "node1", id) {
		t.Errorf("what happened to it: %+v", l.changes(t, "node1", id))
	}
}

// ledgers are where MIC writes down what it attached.
func (l *layout) ledgers(t *testing.T) []corev1.ConfigMap {
	t.Helper()
	var all corev1.ConfigMapList
	must(t, l.kube.List(t.Context(), &all, client.InNamespace(cluster.ChartNamespace), client.HasLabels{"podidentity.io/ledger"}))
	return all.Items
}

func (l *layout) inLedgers(t *testing.T, id azure.Identity) bool {
	t.Helper()
	return slices.ContainsFunc(l.ledgers(t), func(c corev1.ConfigMap) bool {
		return strings.Contains(c.Data["attached"], azure.FoldID(id.ResourceID))
	})
}

// howARMWasAsked looks back over all that the tests before made MIC do.
func howARMWasAsked(t *testing.T, l *layout) {
	log, err := l.cloud.ARMLog(t.Context(), 0)
	must(t, err)
	var patches int
	for _, r := range log {
		if r.Operation != azure.OpPatch {
			continue
		}
		patches++
		if r.Overlap {
			t.Errorf("while another update of the machine was under way: %+v", r)
		}
		if !strings.Contains(r.Type, "SystemAssigned") {
			t.Errorf("an update would have taken the machine its own identity: %+v", r)
		}
		if r.IfMatch == "" {
			t.Errorf("an update that does not say on the ground of what: %+v", r)
		}
	}
	changes, err := l.cloud.ARMChanges(t.Context(), 0)
	must(t, err)
	for _, c := range changes {
		for _, id := range append(l.foreign, l.stays) {
			if !c.Attached && c.Identity == azure.FoldID(id.ResourceID) {
				t.Errorf("MIC detached %s: %+v", id.ResourceID, c)
			}
		}
	}
	stats, err := l.cloud.Stats(t.Context())
	must(t, err)
	if stats.IMDS.RequestsFromPods != 0 || stats.IMDS.ConnectionsFromPods != 0 {
		t.Errorf("%d requests and %d connections of pods reached the metadata service", stats.IMDS.RequestsFromPods, stats.IMDS.ConnectionsFromPods)
	}
	t.Logf("ARM was sent %d requests, of which %d PATCHes", len(log), patches)
}
