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

func manuallyDetached(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.newIdentity(t)
	s.bind("app", "app", managed(id))
	s.startPod("p", "app", "node1")
	p := s.clientIn("p")
	p.waitForTokenOf(id)
	s.waitUntilAssigned("p", "app", id)
	must(t, l.cloud.DetachFrom(t.Context(), "node1", id.ResourceID))
	detached := time.Now()
	eventually(t, updateTimeout, func() error {
		if !l.attached(t, "node1", id) {
			return fmt.Errorf("MIC has not attached the manually detached identity again")
		}
		return nil
	})
	t.Logf("attached again after %.1f s", time.Since(detached).Seconds())
	s.waitUntilAssigned("p", "app", id)
	p.ask(fresh).mustBeOf(t, l, id)
	deleted := s.deletePod("p")
	l.mustBeDetachedAfterDelay(t, "node1", id, deleted)
}

func manuallyAttached(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.foreign[0]
	s.bind("app", "app", managed(id))
	s.startPod("p", "app", "node1")
	s.clientIn("p").ask().mustBeOf(t, l, id)
	s.deletePod("p")
	s.waitUntilReleased("p")
	if patches := l.patches(t, id); len(patches) != 0 {
		t.Errorf("MIC sent a PATCH for an identity that was attached manually: %+v", patches)
	}
}

func immutableIdentity(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.immutable
	s.bind("app", "app", managed(id))
	s.startPod("p", "app", "node1")
	s.clientIn("p").waitForTokenOf(id)
	s.deletePod("p")
	s.waitUntilReleased("p")
	eventually(t, updateTimeout, func() error {
		if l.inLedgers(t, id) {
			return fmt.Errorf("the identity is still in MIC's ledger")
		}
		return nil
	})
	if !l.attached(t, "node1", id) {
		t.Errorf("the immutable identity was detached: %+v", l.changes(t, "node1", id))
	}
}

// ledgers are the ConfigMaps in which MIC records what it attached.
func (l *testEnvironment) ledgers(t *testing.T) []corev1.ConfigMap {
	t.Helper()
	var all corev1.ConfigMapList
	must(t, l.kube.List(t.Context(), &all, client.InNamespace(cluster.ChartNamespace), client.HasLabels{"podidentity.io/ledger"}))
	return all.Items
}

func (l *testEnvironment) inLedgers(t *testing.T, id azure.Identity) bool {
	t.Helper()
	return slices.ContainsFunc(l.ledgers(t), func(c corev1.ConfigMap) bool {
		return strings.Contains(c.Data["attached"], azure.FoldID(id.ResourceID))
	})
}

// requestsToARM checks all requests to ARM and all changes of machines since the start of the cluster, and that no
// request of a pod reached IMDS.
func requestsToARM(t *testing.T, l *testEnvironment) {
	log, err := l.cloud.ARMLog(t.Context(), 0)
	must(t, err)
	var patches int
	for _, r := range log {
		if r.Operation != azure.OpPatch {
			continue
		}
		patches++
		if r.Overlap {
			t.Errorf("a PATCH was sent during another update of the machine: %+v", r)
		}
		if !strings.Contains(r.Type, "SystemAssigned") {
			t.Errorf("a PATCH would have removed the machine's system-assigned identity: %+v", r)
		}
		if r.IfMatch == "" {
			t.Errorf("a PATCH has no If-Match header: %+v", r)
		}
	}
	changes, err := l.cloud.ARMChanges(t.Context(), 0)
	must(t, err)
	for _, c := range changes {
		for _, id := range append(l.foreign, l.immutable) {
			if !c.Attached && c.Identity == azure.FoldID(id.ResourceID) {
				t.Errorf("MIC detached %s: %+v", id.ResourceID, c)
			}
		}
	}
	stats, err := l.cloud.Stats(t.Context())
	must(t, err)
	if stats.IMDS.RequestsFromPods != 0 || stats.IMDS.ConnectionsFromPods != 0 {
		t.Errorf("%d requests and %d connections of pods reached IMDS", stats.IMDS.RequestsFromPods, stats.IMDS.ConnectionsFromPods)
	}
	t.Logf("ARM received %d requests; %d of them are PATCH requests", len(log), patches)
}
