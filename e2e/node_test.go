package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	crclient "sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"
)

func TestUninstallRestoresTheNodes(t *testing.T) {
	must(t, testCluster.InstallChart(t.Context(), "--set", "nmi.uninstall=true"))
	for _, node := range testCluster.Nodes() {
		now, err := readNodeState(t.Context(), node)
		must(t, err)
		was := initialState[node]
		for _, part := range []struct{ what, was, now string }{
			{"rules", was.rules, now.rules}, {"links", was.links, now.links}, {"addresses", was.addresses, now.addresses}, {"sysctls", was.sysctls, now.sysctls},
		} {
			if part.what == "rules" {
				// The two sets of rules can differ, because the network plugin adds and removes its own rules for pods.
				// Therefore the test searches for rules of NMI. Each contains podidentity, or the address of IMDS or NMI.
				if strings.Contains(strings.ToLower(part.now), "podidentity") || strings.Contains(part.now, "169.254") {
					t.Errorf("%s: uninstall left rules:\n%s", node, part.now)
				}
				continue
			}
			if removed := strings.ReplaceAll(part.now, "cni0", ""); strings.Contains(removed, "podidentity") || strings.Contains(removed, "169.254.25.79") {
				t.Errorf("%s: uninstall left %s:\n%s", node, part.what, part.now)
			}
		}
		if was.sysctls != withoutCNI(now.sysctls) {
			t.Errorf("%s: sysctls were\n%s\nand are\n%s", node, was.sysctls, now.sysctls)
		}
	}
	must(t, testCluster.InstallChart(t.Context()))
	for _, node := range testCluster.Nodes() {
		must(t, nmiReady(t.Context(), node))
	}
}

// withoutCNI removes the lines about the network plugin's bridge, which the plugin creates with the first pod.
func withoutCNI(s string) string {
	var kept strings.Builder
	for line := range strings.Lines(s) {
		if !strings.Contains(line, "cni0") {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

func TestLogAndMetricsAgreeWithTheAnswer(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("good", "app", "node1")
	s.pod("bad", "none", "node1")
	refusals := metric(t, "node1", "podidentity_nmi_decisions_total", `reason="no_matching_binding"`)
	token := s.ask("good", vault)
	s.mustHaveTokenOf(token, id, vault)
	s.mustBeRefused(s.ask("bad", vault), 400, "no_matching_binding")
	if now := metric(t, "node1", "podidentity_nmi_decisions_total", `reason="no_matching_binding"`); now != refusals+1 {
		t.Errorf("the number of refusals went from %v to %v", refusals, now)
	}
	if n := metric(t, "node1", "aadpodidentity_nmi_operations_duration_seconds_count", `operation_type="token"`, `status_code="200"`); n == 0 {
		t.Error("the histogram aadpodidentity_nmi_operations_duration_seconds has counted no token request")
	}
	eventually(t, 30*time.Second, func() error {
		logs := nmiLog(t, "node1")
		if strings.Contains(logs, token.token()) || strings.Contains(logs, "eyJ") {
			t.Fatal("NMI's log contains a token")
		}
		if strings.Contains(logs, id.ClientID) {
			t.Fatal("NMI's log contains a whole client ID")
		}
		for _, want := range []string{
			`"reason":"allowed"`, `"reason":"no_matching_binding"`, `"pod_namespace":"` + s.name + `"`, `"pod":"good"`, `"pod":"bad"`, `"identity":"` + s.name + `/app"`, `"request_id":"`, `"duration_ms":`,
		} {
			if !strings.Contains(logs, want) {
				return fmt.Errorf("the log lacks %s:\n%s", want, logs)
			}
		}
		return nil
	})
}

func buildNMI(ctx context.Context) (string, error) {
	file := filepath.Join(scratch, "nmi")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", file, "./cmd/nmi")
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building NMI: %w\n%s", err, out)
	}
	return file, nil
}

// withoutCRDsResult is the result of running NMI on a cluster without the custom resource definitions.
type withoutCRDsResult struct {
	readiness, log string
	exit           error
	rulesAfterExit string
	afterUninstall nodeState
}

const waitingForCRDs = "waiting for the custom resource definitions"

func runWithoutCRDs(ctx context.Context) (l withoutCRDsResult, err error) {
	const node = "node1"
	// The time limit ends NMI even if the test process is killed.
	cmd, err := testCluster.InNodeCommand(ctx, node, "timeout", "60", nmiBinary, "--node="+node, "--kubeconfig="+testCluster.Kubeconfig())
	if err != nil {
		return l, err
	}
	file, err := os.Create(filepath.Join(scratch, "nmi.log"))
	if err != nil {
		return l, err
	}
	defer file.Close()
	cmd.Stderr = file
	if err := cmd.Start(); err != nil {
		return l, err
	}
	// Wait until NMI has logged twice that it waits for the custom resource definitions.
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && strings.Count(l.log, waitingForCRDs) < 2; time.Sleep(200 * time.Millisecond) {
		text, err := os.ReadFile(file.Name())
		if err != nil {
			return l, err
		}
		l.log = string(text)
	}
	if l.readiness, err = testCluster.InNode(ctx, node, "curl", "-s", "--max-time", "2", "http://127.0.0.1:8085/readyz"); err != nil {
		return l, fmt.Errorf("NMI does not answer /readyz while the custom resource definitions are missing: %w\n%s", err, l.log)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return l, err
	}
	l.exit = cmd.Wait()
	state, err := readNodeState(ctx, node)
	if err != nil {
		return l, err
	}
	l.rulesAfterExit = state.rules
	for range 2 { // the second time, nothing is left to remove
		if _, err := testCluster.InNode(ctx, node, nmiBinary, "uninstall"); err != nil {
			return l, err
		}
	}
	l.afterUninstall, err = readNodeState(ctx, node)
	return l, err
}

func TestWithoutDefinitionsNMIWaitsWithItsRulesInPlace(t *testing.T) {
	l := withoutCRDs
	if !strings.Contains(l.readiness, "the cluster does not have azureidentities.aadpodidentity.k8s.io") {
		t.Errorf("/readyz answered %q; want the name of a missing custom resource definition", l.readiness)
	}
	if n := strings.Count(l.log, waitingForCRDs); n != 2 {
		t.Errorf("NMI logged %d times that it waits; want twice:\n%s", n, l.log)
	}
	if l.exit != nil {
		t.Errorf("NMI ended with an error after SIGTERM: %v", l.exit)
	}
	if !strings.Contains(l.rulesAfterExit, "DNAT --to-destination 169.254.25.79:2579") || !strings.Contains(l.rulesAfterExit, "-d 169.254.169.254/32") {
		t.Errorf("the rules are gone after NMI has ended:\n%s", l.rulesAfterExit)
	}
	if was := initialState["node1"]; withoutTables(l.afterUninstall) != withoutTables(was) {
		t.Errorf("uninstall did not restore the node: it was\n%+v\nand is\n%+v", was, l.afterUninstall)
	}
}

// withoutTables removes the lines of tables and of chains with the policy ACCEPT from the rules: iptables creates
// tables and their built-in chains at first use and cannot remove them.
func withoutTables(s nodeState) nodeState {
	var kept strings.Builder
	for line := range strings.Lines(s.rules) {
		if strings.HasPrefix(line, "-A") || strings.HasPrefix(line, ":") && !strings.Contains(line, "ACCEPT") {
			kept.WriteString(line)
		}
	}
	s.rules = kept.String()
	return s
}

func TestNMIRefusesToStartWithOneErrorAndChangesNothing(t *testing.T) {
	nmi := nmiBinary
	kubelet := filepath.Join(t.TempDir(), "kubelet")
	must(t, os.WriteFile(kubelet, []byte("KUBELET_FLAGS=--network-plugin=kubenet"), 0o600))
	account := "--kubeconfig=" + testCluster.Kubeconfig()
	cases := []struct {
		name string
		args []string
		want string
	}{
		{"unknown flag", []string{nmi, "--nope"}, "unknown flag: --nope"},
		{"value out of range", []string{nmi, "--node=node1", "--pod-lookup-timeout=1h"}, "--pod-lookup-timeout 1h0m0s is out of range"},
		{"no such node", []string{nmi, "--node=nowhere", account}, "no node of this name"},
		{"kubenet", []string{nmi, "--node=node1", account, "--kubelet-config=" + kubelet}, "--allow-network-plugin-kubenet"},
		{"no NET_ADMIN", []string{"setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", nmi, "--node=node1", account}, "NET_ADMIN"},
		{"no iptables", []string{"unshare", "--mount", "sh", "-c", "mount -t tmpfs x /usr/sbin && mount -t tmpfs x /sbin && PATH=/nowhere exec " + nmi + " --node=node1 " + account}, "iptables"},
		{"probe port in use", []string{nmi, "--node=node1", account, "--prometheus-port=9191"}, "--http-probe-port"},
		{"port in use", []string{nmi, "--node=node1", account, "--http-probe-port=8185", "--prometheus-port=9191"}, "--nmi-port"},
		{"no such back end", []string{nmi, "--node=node1", "--iptables-backend=ebtables"}, "--iptables-backend"},
		{"unknown mode", []string{nmi, "--node=node1", "--operation-mode=both"}, "--operation-mode"},
	}
	was, err := readNodeState(t.Context(), "node1")
	must(t, err)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			cmd, err := testCluster.InNodeCommand(t.Context(), "node1", c.args[0], c.args[1:]...)
			must(t, err)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Run(); err == nil {
				t.Error("NMI ended with exit status 0; want an error")
			}
			var messages []string
			for line := range strings.Lines(stderr.String()) {
				if !strings.HasPrefix(line, "{") { // not a line of the log
					messages = append(messages, line)
				}
			}
			if len(messages) != 1 || !strings.Contains(messages[0], c.want) {
				t.Errorf("NMI wrote the messages %q; want one line that contains %q; everything that it wrote:\n%s", messages, c.want, stderr.String())
			}
			if now, err := readNodeState(t.Context(), "node1"); err != nil || now != was {
				t.Errorf("the node was\n%+v\nand is\n%+v (%v)", was, now, err)
			}
		})
	}
}

func TestTheAPIServerAcceptsAndRefusesTheManifestsLikeTheSchema(t *testing.T) {
	independent(t)
	for _, kind := range []string{"accepted", "refused"} {
		files, err := filepath.Glob("crds/testdata/" + kind + "/*.yaml")
		must(t, err)
		if len(files) < 3 {
			t.Fatalf("only %d manifests are in e2e/crds/testdata/%s; want at least 3", len(files), kind)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			must(t, err)
			object := &unstructured.Unstructured{}
			must(t, yaml.Unmarshal(text, &object.Object))
			if object.GetNamespace() == "" {
				object.SetNamespace("default")
			}
			err = kube.Create(t.Context(), object, crclient.DryRunAll)
			if kind == "accepted" {
				if err != nil {
					t.Errorf("the API server refused %s: %v", file, err)
				}
				continue
			}
			first, _, _ := strings.Cut(string(text), "\n")
			want := strings.TrimSpace(strings.TrimPrefix(first, "# want:"))
			if want == "" || want == first {
				t.Fatalf("%s does not begin with the expected error (# want: …)", file)
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("creating %s: got the error %v; want one that contains %q", file, err, want)
			}
		}
	}
}
