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

	"github.com/podidentity/podidentity/e2e/cluster"
)

func TestUninstallLeavesTheNodesAsTheyWere(t *testing.T) {
	must(t, world.InstallChart(t.Context(), "--set", "nmi.uninstall=true"))
	for _, node := range world.Nodes() {
		now, err := stateOf(t.Context(), node)
		must(t, err)
		was := before[node]
		for _, part := range []struct{ what, was, now string }{
			{"rules", was.rules, now.rules}, {"links", was.links, now.links}, {"addresses", was.addresses, now.addresses}, {"sysctls", was.sysctls, now.sysctls},
		} {
			if part.what == "rules" {
				// The network plugin's own rules for pods come and go; ours carry our name.
				if strings.Contains(strings.ToLower(part.now), "podidentity") || strings.Contains(part.now, "169.254") {
					t.Errorf("%s: rules are left:\n%s", node, part.now)
				}
				continue
			}
			if removed := strings.ReplaceAll(part.now, "cni0", ""); strings.Contains(removed, "podidentity") || strings.Contains(removed, "169.254.25.79") {
				t.Errorf("%s: %s are left:\n%s", node, part.what, part.now)
			}
		}
		if was.sysctls != withoutCNI(now.sysctls) {
			t.Errorf("%s: sysctls were\n%s\nand are\n%s", node, was.sysctls, now.sysctls)
		}
	}
	must(t, world.InstallChart(t.Context()))
	for _, node := range world.Nodes() {
		must(t, nmiReady(t.Context(), node))
	}
}

// withoutCNI leaves out what belongs to the bridge of the network plugin, which comes with the first pod.
func withoutCNI(s string) string {
	var kept strings.Builder
	for line := range strings.Lines(s) {
		if !strings.Contains(line, "cni0") {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

func TestLogAndMetricsSayWhatThePodIsTold(t *testing.T) {
	s, id := newSpace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("good", "app", "node1")
	s.pod("bad", "none", "node1")
	refusals := metric(t, "node1", "podidentity_nmi_decisions_total", `reason="no_matching_binding"`)
	token := s.ask("good", vault)
	s.mustHaveTokenOf(token, id, vault)
	s.mustBeRefused(s.ask("bad", vault), 400, "no_matching_binding")
	if now := metric(t, "node1", "podidentity_nmi_decisions_total", `reason="no_matching_binding"`); now != refusals+1 {
		t.Errorf("the refusals went from %v to %v", refusals, now)
	}
	if n := metric(t, "node1", "aadpodidentity_nmi_operations_duration_seconds_count", `operation_type="token"`, `status_code="200"`); n == 0 {
		t.Error("no request is in the predecessor's histogram")
	}
	eventually(t, 10*time.Second, func() error {
		logs, err := world.Kubectl(t.Context(), "logs", "-n", cluster.ChartNamespace, nmiPod(t, "node1"), "--tail", "200")
		if err != nil {
			return err
		}
		if strings.Contains(logs, token.token()) || strings.Contains(logs, "eyJ") {
			t.Fatal("a token is in the log")
		}
		if strings.Contains(logs, id.ClientID) {
			t.Fatal("a whole client ID is in the log")
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

// lonelyNMI is an NMI run by hand on a cluster that has no definitions of our resources.
type lonelyNMI struct {
	readiness, log string
	exit           error
	rulesAfterExit string
	afterUninstall nodeState
}

const waitingForCRDs = "waiting for the custom resource definitions"

func runWithoutCRDs(ctx context.Context) (l lonelyNMI, err error) {
	const node = "node1"
	// Bounded, should this program be killed meanwhile.
	cmd, err := world.InNodeCommand(ctx, node, "timeout", "60", nmiBinary, "--node="+node, "--kubeconfig="+world.Kubeconfig())
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
	// It looks for the definitions, and looks again.
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && strings.Count(l.log, waitingForCRDs) < 2; time.Sleep(200 * time.Millisecond) {
		text, err := os.ReadFile(file.Name())
		if err != nil {
			return l, err
		}
		l.log = string(text)
	}
	if l.readiness, err = world.InNode(ctx, node, "curl", "-s", "--max-time", "2", "http://127.0.0.1:8085/readyz"); err != nil {
		return l, fmt.Errorf("NMI did not live on without definitions: %w\n%s", err, l.log)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return l, err
	}
	l.exit = cmd.Wait()
	state, err := stateOf(ctx, node)
	if err != nil {
		return l, err
	}
	l.rulesAfterExit = state.rules
	for range 2 { // the second time there is nothing to do
		if _, err := world.InNode(ctx, node, nmiBinary, "uninstall"); err != nil {
			return l, err
		}
	}
	l.afterUninstall, err = stateOf(ctx, node)
	return l, err
}

func TestWithoutDefinitionsNMIWaitsAndSaysSoWithItsRulesInPlace(t *testing.T) {
	l := withoutCRDs
	if !strings.Contains(l.readiness, "the cluster does not have azureidentities.aadpodidentity.k8s.io") {
		t.Errorf("/readyz said %q", l.readiness)
	}
	if n := strings.Count(l.log, waitingForCRDs); n != 2 {
		t.Errorf("it said so %d times, not twice:\n%s", n, l.log)
	}
	if l.exit != nil {
		t.Errorf("on SIGTERM: %v", l.exit)
	}
	if !strings.Contains(l.rulesAfterExit, "DNAT --to-destination 169.254.25.79:2579") || !strings.Contains(l.rulesAfterExit, "-d 169.254.169.254/32") {
		t.Errorf("its rules did not stay:\n%s", l.rulesAfterExit)
	}
	if was := before["node1"]; withoutTables(l.afterUninstall) != withoutTables(was) {
		t.Errorf("after uninstall the node was not as before:\n%+v\nand\n%+v", was, l.afterUninstall)
	}
}

// withoutTables leaves out tables and built-in chains without rules: iptables makes them at first use, and has no way to
// remove them.
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

func TestWhatCannotWorkIsRefusedWithOneSentenceAndNothingChanged(t *testing.T) {
	nmi := nmiBinary
	kubelet := filepath.Join(t.TempDir(), "kubelet")
	must(t, os.WriteFile(kubelet, []byte("KUBELET_FLAGS=--network-plugin=kubenet"), 0o600))
	account := "--kubeconfig=" + world.Kubeconfig()
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
	was, err := stateOf(t.Context(), "node1")
	must(t, err)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			cmd, err := world.InNodeCommand(t.Context(), "node1", c.args[0], c.args[1:]...)
			must(t, err)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Run(); err == nil {
				t.Error("its exit status is 0")
			}
			var sentences []string
			for line := range strings.Lines(stderr.String()) {
				if !strings.HasPrefix(line, "{") { // the log
					sentences = append(sentences, line)
				}
			}
			if len(sentences) != 1 || !strings.Contains(sentences[0], c.want) {
				t.Errorf("it says %q; want one line about %q\n%s", sentences, c.want, stderr.String())
			}
			if now, err := stateOf(t.Context(), "node1"); err != nil || now != was {
				t.Errorf("the node was\n%+v\nand is\n%+v (%v)", was, now, err)
			}
		})
	}
}

func TestManifestsAreAcceptedAndRefusedByTheAPIServerAsByTheSchema(t *testing.T) {
	for _, kind := range []string{"accepted", "refused"} {
		files, err := filepath.Glob("crds/testdata/" + kind + "/*.yaml")
		must(t, err)
		if len(files) < 3 {
			t.Fatalf("%d files of manifests that are %s", len(files), kind)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			must(t, err)
			_, err = world.Kubectl(t.Context(), "apply", "--dry-run=server", "--validate=warn", "-f", file)
			if kind == "accepted" {
				if err != nil {
					t.Errorf("%s: %v", file, err)
				}
				continue
			}
			first, _, _ := strings.Cut(string(text), "\n")
			want := strings.TrimSpace(strings.TrimPrefix(first, "# want:"))
			if want == "" || want == first {
				t.Fatalf("%s does not say what is wanted", file)
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v; want %q", file, err, want)
			}
		}
	}
}
