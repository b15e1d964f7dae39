package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	corev1 "k8s.io/api/core/v1"
	crclient "sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// verifications returns how NMI found the pod, for each token request of the pod in the log of NMI on the node.
func verifications(s *testNamespace, node, pod string) []string {
	s.t.Helper()
	var found []string
	for _, line := range s.lines(node) {
		if line.Pod == pod && line.Verified != "" {
			found = append(found, line.Verified)
		}
	}
	return found
}

// mustBeVerified waits until the log has a token request of the pod, and checks how NMI found the pod in each of its
// requests.
func mustBeVerified(s *testNamespace, node, pod, by string) {
	s.t.Helper()
	eventually(s.t, 30*time.Second, func() error {
		found := verifications(s, node, pod)
		if len(found) == 0 {
			return fmt.Errorf("the log has no request of pod %s", pod)
		}
		for _, v := range found {
			if v != by {
				s.t.Errorf("pod %s was verified by %s; want %s", pod, v, by)
			}
		}
		return nil
	})
}

func TestPodsAreKnownByTheirCgroup(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.apply(s.podYAML("p", "app", "node1", "pause") + strings.Replace(s.podYAML("init", "app", "node1", "pause"), "containers:",
		fmt.Sprintf("initContainers: [{name: first, image: %q, imagePullPolicy: Never, args: [token, --exit, --resource, %q]}]\n  containers:", cluster.TestImage, vault), 1))
	s.waitForPods()
	must(t, fakeAzure.ResetLog(t.Context()))

	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	mapped := s.curl("p", "-H", "Metadata: true", "http://[::ffff:169.254.169.254]/metadata/identity/oauth2/token?api-version=2018-02-01&resource="+vault)
	s.mustHaveTokenOf(mapped, id, vault)
	out, err := testCluster.Kubectl(t.Context(), "exec", "-n", s.name, "p", "--", "/podclient", "token", "--exit", "--resource", vault)
	must(t, err)
	s.mustHaveTokenOf(outcomeIn(t, out), id, vault)
	mustBeVerified(s, "node1", "p", "cgroup")

	out, err = podOutput(t.Context(), s.name, "init", corev1.PodLogOptions{Container: "first"})
	must(t, err)
	s.mustHaveTokenOf(outcomeIn(t, out), id, vault)
	mustBeVerified(s, "node1", "init", "cgroup")
	checkNoPodReachedIMDS(t)
}

// outcomeIn returns the answer in the output of podclient.
func outcomeIn(t *testing.T, output string) answer {
	t.Helper()
	var got outcome
	must(t, json.Unmarshal([]byte(output), &got))
	a := answer{status: got.Status, raw: got.Body + got.Error, body: map[string]string{}}
	_ = json.Unmarshal([]byte(got.Body), &a.body)
	return a
}

func TestAPodWithARedirectingSidecarGetsItsOwnToken(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	must(t, fakeAzure.ResetLog(t.Context()))
	line, rest := firstLine(t, program(s, "p", "proxy"))
	if line != "ready" {
		t.Fatalf("the proxy printed %q", line)
	}
	_, err := testCluster.InPod(t.Context(), s.name, "p", "iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-m", "owner", "!", "--uid-owner", "1337", "-j", "REDIRECT", "--to-ports", "15001")
	must(t, err)
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	if line, err := rest.ReadString('\n'); err != nil || !strings.HasPrefix(line, "proxied to") {
		t.Errorf("the proxy printed %q, %v: the request did not go through it", line, err)
	}
	mustBeVerified(s, "node1", "p", "cgroup")
	checkNoPodReachedIMDS(t)
}

func TestOtherPacketsToTheMetadataAddressFailAtOnce(t *testing.T) {
	s := newNamespace(t)
	s.pod("p", "none", "node1")
	must(t, fakeAzure.ResetLog(t.Context()))
	if out, err := program(s, "p", "raw").CombinedOutput(); err != nil {
		t.Errorf("raw sockets: %v\n%s", err, out)
	}
	for _, attempt := range [][]string{
		{"curl", "-s", "-S", "--max-time", "20", "http://169.254.169.254:8080/"},
		{"bash", "-c", "echo x > /dev/udp/169.254.169.254/80"},
		{"ping", "-c", "1", "-W", "20", "169.254.169.254"},
	} {
		start := time.Now()
		cmd, err := testCluster.InPodCommand(t.Context(), s.name, "p", attempt[0], attempt[1:]...)
		must(t, err)
		out, err := cmd.CombinedOutput()
		if took := time.Since(start); err == nil || took > 10*time.Second {
			t.Errorf("%v: %v after %s; want a failure at once\n%s", attempt, err, took, out)
		}
	}
	checkNoPodReachedIMDS(t)
}

// attachedPrograms returns how many programs are attached to the cgroup of all pods of a node.
func attachedPrograms(t *testing.T, node string) (total int) {
	t.Helper()
	path, err := cluster.PodsCgroup(node)
	must(t, err)
	cgroup, err := os.Open(path)
	must(t, err)
	defer cgroup.Close()
	for _, hook := range []ebpf.AttachType{
		ebpf.AttachCGroupInetSockCreate, ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
		ebpf.AttachCGroupSockOps, ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupInetEgress,
	} {
		found, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: hook})
		must(t, err)
		total += len(found.Programs)
	}
	return total
}

// pinned returns the folders in the bpffs of the node in which NMI pins maps and eBPF links. The processes of NMI's pod
// have the bpffs mounted.
func pinned(t *testing.T, node string) []string {
	t.Helper()
	pids, err := testCluster.PodPIDs(t.Context(), cluster.ChartNamespace, nmiPod(t, node))
	must(t, err)
	for _, pid := range pids {
		root := fmt.Sprintf("/proc/%d/root", pid)
		if _, err := os.Stat(root + "/nmi"); err != nil {
			continue // the sandbox, or ended
		}
		found, err := filepath.Glob(root + "/node/bpf/podidentity*")
		must(t, err)
		return found
	}
	t.Fatalf("NMI's pod on %s has no process with the program nmi", node)
	return nil
}

// TestUninstallRemovesThePrograms also checks that a socket that was connected before the installation is cut off.
func TestUninstallRemovesThePrograms(t *testing.T) {
	s := newNamespace(t)
	s.pod("p", "none", "node1")
	if attachedPrograms(t, "node1") != 7 || len(pinned(t, "node1")) == 0 {
		t.Errorf("%d programs are attached, and %q is pinned; want 7 programs and a folder", attachedPrograms(t, "node1"), pinned(t, "node1"))
	}
	must(t, testCluster.InstallChart(t.Context(), "--set", "nmi.uninstall=true"))
	for _, node := range testCluster.Nodes() {
		if n, pins := attachedPrograms(t, node), pinned(t, node); n != 0 || len(pins) != 0 {
			t.Errorf("%s: after uninstall %d programs are attached, and %q is pinned", node, n, pins)
		}
	}
	held := program(s, "p", "hold")
	in, err := held.StdinPipe()
	must(t, err)
	status, rest := firstLine(t, held)
	if status != "200 OK" {
		t.Errorf("before the installation IMDS returned %q; want 200", status)
	}
	must(t, testCluster.InstallChart(t.Context()))
	must(t, fakeAzure.ResetLog(t.Context()))
	fmt.Fprintln(in)
	if out := readAll(t, rest); !strings.Contains(out, "i/o timeout") && !strings.Contains(out, "reset") {
		t.Errorf("a socket that was connected before the installation: %q; want no response", out)
	}
	checkNoPodReachedIMDS(t)
}

func readAll(t *testing.T, r *bufio.Reader) string {
	t.Helper()
	out, err := io.ReadAll(r)
	must(t, err)
	return string(out)
}

// hostPod returns the manifest of a pod in the host network that requests a token when it starts.
func hostPod(s *testNamespace, name, label, node string, id azure.Identity) string {
	return strings.Replace(s.podYAML(name, label, node, "token", "--resource", vault, "--query", "client_id="+id.ClientID), "spec:\n", "spec:\n  hostNetwork: true\n", 1)
}

// hostPodAnswer returns the response to the request of a pod in the host network.
func hostPodAnswer(s *testNamespace, name string) answer {
	s.t.Helper()
	var out string
	eventually(s.t, 90*time.Second, func() (err error) {
		if out, err = podOutput(s.t.Context(), s.name, name, corev1.PodLogOptions{}); err == nil && out == "" {
			err = fmt.Errorf("pod %s has not printed anything", name)
		}
		return err
	})
	return outcomeIn(s.t, out)
}

// The identities are attached to the VM, so a pod that reaches IMDS itself gets a token of the identity that it names,
// whether it is bound to it or not.
func TestPodsInTheHostNetworkAreCapturedAsConfigured(t *testing.T) {
	t.Cleanup(func() { must(t, testCluster.InstallChart(context.Background())) })
	for _, c := range []struct {
		value                                string
		labelledCaptured, unlabelledCaptured bool
	}{{"none", false, false}, {"bound", true, false}, {"all", true, true}} {
		t.Run(c.value, func(t *testing.T) {
			s, id, others := newNamespace(t), newIdentity(t), newIdentity(t)
			s.bind("app", "app", id)
			must(t, testCluster.InstallChart(t.Context(), "--set", "nmi.captureHostNetwork="+c.value))
			s.apply(hostPod(s, "own", "app", "node1", id) + hostPod(s, "foreign", "app", "node1", others) + hostPod(s, "unlabelled", "", "node1", others))
			s.mustHaveTokenOf(hostPodAnswer(s, "own"), id, vault)
			for pod, captured := range map[string]bool{"foreign": c.labelledCaptured, "unlabelled": c.unlabelledCaptured} {
				got := hostPodAnswer(s, pod)
				if captured == (got.status == 200) {
					t.Errorf("pod %s got %d %s; want a response of NMI: %t", pod, got.status, got.raw, captured)
				}
			}
			if c.labelledCaptured {
				mustBeVerified(s, "node1", "own", "cgroup")
			} else if found := verifications(s, "node1", "own"); len(found) > 0 {
				t.Errorf("the log has requests of pod own, verified by %q; want none", found)
			}
		})
	}
}

var kills = flag.Int("kills", 3, "how often NMI is killed with each capture; make chaos sets it")

// killNMIRepeatedly kills NMI under load. The kubelet restarts a container at once only for the first time, so each third kill
// deletes the pod.
func killNMIRepeatedly(s *testNamespace, l *load, node string) {
	s.t.Helper()
	for i := range *kills {
		if i%3 < 2 {
			killNMI(s.t, node)
		} else {
			old := nmiPodOn(s.t, node)
			must(s.t, kube.Delete(s.t.Context(), old, crclient.GracePeriodSeconds(0)))
			eventually(s.t, time.Minute, func() error { return replaced(s.t.Context(), old) })
		}
		l.waitForTokens(s.t, 50, 90*time.Second)
	}
}

// replaced returns nil if another pod of NMI is ready on the node of the old one, whose processes may still run.
func replaced(ctx context.Context, old *corev1.Pod) error {
	var pods corev1.PodList
	if err := kube.List(ctx, &pods, crclient.InNamespace(old.Namespace), crclient.MatchingLabels{"app.kubernetes.io/component": "nmi"},
		crclient.MatchingFields{"spec.nodeName": old.Spec.NodeName}); err != nil {
		return err
	}
	for _, pod := range pods.Items {
		for _, c := range pod.Status.Conditions {
			if pod.UID != old.UID && c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
	}
	return fmt.Errorf("no new pod of NMI is ready on %s", old.Spec.NodeName)
}

func TestNoPodReachesIMDSWithOneCaptureWhenNMIIsKilledUnderLoad(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	t.Cleanup(func() { must(t, testCluster.InstallChart(context.Background())) })
	for _, capture := range []string{"iptables", "bpf"} {
		t.Run(capture, func(t *testing.T) {
			s.t = t
			must(t, testCluster.InstallChart(t.Context(), "--set", "nmi.capture="+capture))
			must(t, fakeAzure.ResetLog(t.Context()))
			l := startPodLoad(s, "p")
			l.waitForTokens(t, 50, 30*time.Second)
			killNMIRepeatedly(s, l, "node1")
			l.stop()
			t.Logf("NMI was killed %d times: %s", *kills, l)
			if l.statuses[0] == 0 {
				t.Error("no request failed while NMI was down: this test proves nothing")
			}
			checkNoPodReachedIMDS(t)
		})
	}
}

func TestPodsAreCapturedWherePacketsBypassNetfilter(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	restore, err := testCluster.BypassNetfilter(t.Context(), "node1")
	must(t, err)
	t.Cleanup(func() {
		must(t, restore(context.Background()))
		must(t, testCluster.InstallChart(context.Background()))
	})
	must(t, testCluster.InstallChart(t.Context(), "--set", "nmi.capture=iptables"))
	must(t, fakeAzure.ResetLog(t.Context()))
	s.ask("p", vault)
	if stats, err := fakeAzure.Stats(t.Context()); err != nil || stats.IMDS.ConnectionsFromPods == 0 {
		t.Errorf("with iptables alone %d connections of pods reached IMDS (%v): this test proves nothing", stats.IMDS.ConnectionsFromPods, err)
	}
	must(t, testCluster.InstallChart(t.Context(), "--set", "nmi.capture=bpf"))
	must(t, fakeAzure.ResetLog(t.Context()))
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	checkNoPodReachedIMDS(t)
}
