package standard

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// uninstall follows the steps in the chart's notes while a pod uses an identity.
func uninstall(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.newIdentity(t)
	s.bind("app", "app", managed(id))
	s.startPod("p", "app", "node1")
	p := s.clientIn("p")
	p.waitForTokenOf(id)

	must(t, l.cloud.Set(t.Context(), map[string]string{"arm.delay": "1s"}))
	repo, err := cluster.RepoDir()
	must(t, err)
	helm(t, l, "upgrade", "podidentity", filepath.Join(repo, "deploy", "podidentity"), "--reset-then-reuse-values", "--set", "nmi.uninstall=true")
	for _, what := range []string{"daemonset/podidentity-nmi", "deployment/" + micName} {
		_, err := l.Kubectl(t.Context(), "rollout", "status", "-n", cluster.ChartNamespace, what, "--timeout=90s")
		must(t, err)
	}
	var left v1.AzureAssignedIdentityList
	must(t, l.kube.List(t.Context(), &left))
	if ledgers := l.ledgers(t); len(left.Items)+len(ledgers) > 0 {
		t.Errorf("after nmi.uninstall=true these are left: %s and the ledgers %s", describe(left.Items), asJSON(ledgers))
	}
	var want []string
	for _, id := range append(l.foreign, l.immutable) {
		want = append(want, azure.FoldID(id.ResourceID))
	}
	slices.Sort(want)
	machines, err := l.cloud.Machines(t.Context())
	must(t, err)
	for _, m := range machines {
		if l.vms && slices.Contains(m.Nodes, "node2") { // no pod on node2 used the immutable identity
			want = slices.DeleteFunc(slices.Clone(want), func(key string) bool { return key == azure.FoldID(l.immutable.ResourceID) })
		}
		if !slices.Equal(m.Identities, want) || m.SystemAssigned == nil {
			t.Errorf("%s has the identities %v; want %v and the system-assigned one", m.ID, m.Identities, want)
		}
	}
	if a := p.ask("client_id=" + id.ClientID); a.status != 400 || a.body["reason"] != "" {
		t.Errorf("want the answer of the fake IMDS, which has no such identity; got %d %s", a.status, a.raw)
	}

	helm(t, l, "uninstall", "podidentity", "--wait")
	for _, name := range []string{s.name, cluster.ChartNamespace} {
		must(t, l.kube.Delete(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}))
	}
	eventually(t, updateTimeout, func() error { // this includes the namespaces of all other tests
		out, err := l.Kubectl(t.Context(), "get", "namespaces")
		if err == nil && (strings.Contains(out, "Terminating") || strings.Contains(out, "test-")) {
			err = fmt.Errorf("namespaces of the tests are left, or are being deleted:\n%s", out)
		}
		return err
	})
}

func helm(t *testing.T, l *testEnvironment, args ...string) {
	t.Helper()
	cmd, err := l.HelmCommand(t.Context(), append(args, "-n", cluster.ChartNamespace)...)
	must(t, err)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}
