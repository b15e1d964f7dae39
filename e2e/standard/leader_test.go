package standard

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

func leaderChangesDuringUpdate(t *testing.T, l *testEnvironment) {
	l.waitUntilEmpty(t)
	must(t, l.cloud.SetDelay(t.Context(), "node1", time.Hour)) // the test ends the update itself
	defer func() { must(t, l.cloud.SetDelay(t.Context(), "node1", -1)) }()
	s, id, later := l.newNamespace(t), l.newIdentity(t), l.newIdentity(t)
	s.bind("app", "app", managed(id))
	s.startPod("p", "app", "node1")
	eventually(t, reactionTimeout, func() error {
		for _, ledger := range l.ledgers(t) {
			if strings.Contains(ledger.Data["update"], "token") {
				return nil
			}
		}
		return fmt.Errorf("no ledger of MIC records an update in progress; the PATCH requests so far: %+v", l.patches(t, id))
	})
	s.bind("later", "later", managed(later))
	s.startPod("q", "later", "node1")
	eventually(t, reactionTimeout, func() error {
		if have := s.assignments("q"); len(have) != 1 || have[0].Status.Status != v1.AssignmentCreated {
			return fmt.Errorf("MIC has not created the assignment of the second pod and written its status: %s", describe(have))
		}
		return nil
	})
	s.planChangesNothing(id, later)
	must(t, l.kube.Delete(t.Context(), &corev1.Pod{ObjectMeta: s.meta("q")}))

	first, holder := l.leader(t, "")
	killMIC(t, l, first)
	killed := time.Now()
	second, holder := l.leader(t, holder)
	t.Logf("%s became the leader %.1f s after the first leader was killed", second, time.Since(killed).Seconds())
	must(t, l.kube.Delete(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: cluster.ChartNamespace, Name: second}}))
	deleted := time.Now()
	third, _ := l.leader(t, holder)
	t.Logf("%s became the leader %.1f s after the pod of the second leader was deleted", third, time.Since(deleted).Seconds())

	patches := l.patches(t, id)
	if len(patches) != 1 || l.attached(t, "node1", id) {
		t.Fatalf("want one update that is still in progress after two changes of the leader; the PATCH requests: %+v", patches)
	}
	p := s.clientIn("p")
	var ended time.Time
	eventually(t, updateTimeout, func() error {
		a := p.ask()
		if ended.IsZero() { // the first request has waited for the update, which has not ended
			ended = time.Now()
			must(t, l.cloud.SetDelay(t.Context(), "node1", -1))
			must(t, l.cloud.EndOperations(t.Context(), "node1"))
		}
		if a.status != 200 && (a.status != 503 || a.body["reason"] != "assignment_pending" || a.header.Get("Retry-After") != "5") {
			t.Fatalf("a pod whose identity is being attached receives %d %v %s", a.status, a.header, a.raw)
		}
		return a.isOf(l, id)
	})
	t.Logf("the pod got its token %.1f s after the end of the update", time.Since(ended).Seconds())
	s.waitUntilAssigned("p", "app", id)
	if patches := l.patches(t, id); len(patches) != 1 || patches[0].Overlap {
		t.Errorf("the update was sent again: %+v", patches)
	}
}

// waitUntilEmpty waits until MIC has removed all assignments and ledger entries of the earlier tests.
func (l *testEnvironment) waitUntilEmpty(t *testing.T) {
	t.Helper()
	must(t, l.cloud.Set(t.Context(), map[string]string{"arm.delay": "0s"}))
	defer func() { must(t, l.cloud.Set(t.Context(), map[string]string{"arm.delay": armDelay.String()})) }()
	eventually(t, updateTimeout, func() error {
		var left v1.AzureAssignedIdentityList
		if err := l.kube.List(t.Context(), &left); err != nil || len(left.Items) > 0 {
			return fmt.Errorf("want no assignment; got %s (error: %v)", describe(left.Items), err)
		}
		if ledgers := l.ledgers(t); len(ledgers) > 0 {
			return fmt.Errorf("want no ledger; got %s", asJSON(ledgers))
		}
		return nil
	})
}

// killMIC sends SIGKILL to the MIC process in a pod. The kubelet restarts it.
func killMIC(t *testing.T, l *testEnvironment, pod string) {
	t.Helper()
	pids, err := l.PodPIDs(t.Context(), cluster.ChartNamespace, pod)
	must(t, err)
	for _, pid := range pids {
		exe, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
		if filepath.Base(exe) == "mic" {
			must(t, syscall.Kill(pid, syscall.SIGKILL))
			return
		}
	}
	t.Fatalf("none of the processes %v of pod %s is MIC", pids, pod)
}

// planChangesNothing runs `mic plan` in a pod of MIC, with the pod's arguments. It checks the output, and that the plan
// changed no object and no machine. When it is called, an update of node1's machine is in progress, which attaches the
// identity id for pod p. The next update will attach the other identity (the parameter later) for pod q.
func (s *testNamespace) planChangesNothing(id, later azure.Identity) {
	s.t.Helper()
	pods, err := s.micPods(s.t.Context())
	must(s.t, err)
	versions := func() string {
		var text strings.Builder
		for _, a := range s.assignments("") {
			fmt.Fprintln(&text, a.Name, a.ResourceVersion)
		}
		for _, l := range s.ledgers(s.t) {
			fmt.Fprintln(&text, l.Name, l.ResourceVersion)
		}
		return text.String()
	}
	before := versions()
	out, err := s.Kubectl(s.t.Context(), append([]string{"exec", "-n", cluster.ChartNamespace, "deployment/" + micName, "--", "/usr/bin/mic", "plan"},
		pods[0].Spec.Containers[0].Args...)...)
	must(s.t, err)
	s.t.Logf("mic plan:\n%s", out)
	m, err := s.cloud.Machine(s.t.Context(), "node1")
	must(s.t, err)
	for _, want := range []string{
		m.ID, "an update is under way", "attaching " + id.ResourceID, "pod " + s.name + "/p", "attach " + later.ResourceID, "pod " + s.name + "/q",
		"MIC did not attach it", "2 waiting to be Assigned",
	} {
		if !strings.Contains(out, want) {
			s.t.Errorf("the plan does not contain %q", want)
		}
	}
	patch := regexp.MustCompile("PATCH " + regexp.QuoteMeta(m.ID) + ".*").FindString(out)
	if !strings.Contains(patch, later.ResourceID) || strings.Contains(patch, id.ResourceID) {
		s.t.Errorf("the next update in the plan must attach the identity of pod q and not that of pod p; it is %s", patch)
	}
	if now := versions(); now != before {
		s.t.Errorf("after the plan the objects are\n%sbefore it they were\n%s", now, before)
	}
	if patches := s.patches(s.t, id); len(patches) != 1 {
		s.t.Errorf("after the plan, want one PATCH request, which MIC sent before the plan; got %+v", patches)
	}
}

func metricsOfMIC(t *testing.T, l *testEnvironment) {
	s := l.newNamespace(t)
	s.bind("app", "app", v1.AzureIdentitySpec{Type: v1.Federated, ClientID: "a9900000-0000-4000-8000-00000000ffff", TenantID: cluster.TenantID})
	s.startPod("p", "app", "node1")
	s.waitUntilAssigned("p", "app", azure.Identity{})
	s.deletePod("p")
	s.waitUntilReleased("p")
	leader, _ := l.leader(t, "")
	status, _, body, err := get(t.Context(), l.httpClient(t, cluster.ChartNamespace, leader), "http://127.0.0.1:8888/metrics")
	if err != nil || status != 200 {
		t.Fatalf("reading the metrics of MIC: status %d, error: %v", status, err)
	}
	kind := "vmss"
	if l.vms {
		kind = "vm"
	}
	for _, name := range []string{
		"aadpodidentity_mic_new_leader_election_count", "aadpodidentity_mic_cycle_count", "aadpodidentity_mic_cycle_duration_seconds_count",
		"aadpodidentity_assigned_identity_addition_count", "aadpodidentity_assigned_identity_deletion_count",
		`aadpodidentity_cloud_provider_operations_duration_seconds_count{operation_type="` + kind + `_get"}`,
		`podidentity_mic_arm_calls_total{operation="` + kind + `_get",outcome="ok"}`,
		"podidentity_mic_assignment_duration_seconds_count",
		`workqueue_adds_total{controller="pods",name="pods"`,
	} {
		if v, ok := sample(body, name); !ok || v <= 0 {
			t.Errorf("%s is %v (found: %t); want a value above 0", name, v, ok)
		}
	}
	for _, name := range []string{"podidentity_mic_identities_set_aside", `workqueue_depth{controller="machines",name="machines"`} {
		if v, ok := sample(body, name); !ok || v != 0 {
			t.Errorf("%s is %v (found: %t); want 0", name, v, ok)
		}
	}
}

// sample returns the value of the first line of metrics that has the prefix.
func sample(metrics, prefix string) (v float64, ok bool) {
	for line := range strings.Lines(metrics) {
		if strings.HasPrefix(line, prefix) {
			_, err := fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &v)
			return v, err == nil
		}
	}
	return 0, false
}
