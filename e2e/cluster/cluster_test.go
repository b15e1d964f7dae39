package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

const twoPods = `
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: on-node1}
  spec: &spec
    nodeName: node1
    terminationGracePeriodSeconds: 1
    containers: [{name: client, image: local/e2e:1, imagePullPolicy: Never, args: [token]}]
- apiVersion: v1
  kind: Pod
  metadata: {name: on-node2}
  spec: {<<: *spec, nodeName: node2}
- apiVersion: v1
  kind: Pod
  metadata: {name: host}
  spec: {<<: *spec, hostNetwork: true}
`

func start(t *testing.T) *Cluster {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute) // Kubernetes may have to be built
	defer cancel()
	began := time.Now()
	c, err := Start(ctx, Options{LogDir: t.TempDir(), Wait: 20 * time.Minute, Progress: func(line string) { t.Log(line) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the cluster is up after %s", time.Since(began).Round(time.Millisecond))
	return c
}

func TestClusterRunsPodsOnTwoNodesAndLeavesNothing(t *testing.T) {
	before := hostFolders()
	c := start(t)
	defer c.Stop()

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := c.Apply(ctx, twoPods); err != nil {
		t.Fatal(err)
	}
	mustKubectl(t, ctx, c, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s")

	t.Run("each pod has its own network", func(t *testing.T) {
		for _, pod := range []string{"on-node1", "on-node2"} {
			ip := podIP(t, ctx, c, pod)
			out, err := c.InPod(ctx, "default", pod, "ip", "-brief", "-4", "address", "show", "dev", "eth0")
			if err != nil || !strings.Contains(out, ip+"/24") {
				t.Errorf("ip address show inside pod %s, which has the address %s: output %q, error %v", pod, ip, out, err)
			}
		}
	})
	t.Run("programs run only in existing pods and nodes", func(t *testing.T) {
		for pod, want := range map[string]string{"host": "hostNetwork", "absent": "not found"} {
			if _, err := c.InPod(ctx, "default", pod, "true"); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("running a program in pod %s: error %v, want one with %q", pod, err, want)
			}
		}
		if _, err := c.InNode(ctx, "node3", "true"); err == nil {
			t.Error("a program ran on a node that does not exist")
		}
	})
	t.Run("the fake IMDS sees the source addresses", func(t *testing.T) { checkSources(t, ctx, c) })
	t.Run("in-cluster clients reach the API server", func(t *testing.T) {
		out, err := c.InPod(ctx, "default", "on-node2", "curl", "-sk", "--max-time", "5", "https://"+serviceIP+"/version")
		if err != nil || !strings.Contains(out, kubernetesVersion) {
			t.Errorf("requesting the version of the API server in pod on-node2: response %q, error %v", out, err)
		}
	})
	t.Run("there is no route out", func(t *testing.T) {
		for _, node := range c.Nodes() {
			if out, err := c.InNode(ctx, node, "ip", "route", "get", "192.0.2.1"); err == nil {
				t.Errorf("%s has a default route: %s", node, out)
			}
		}
	})
	t.Run("a second cluster is refused", func(t *testing.T) {
		if _, err := Start(ctx, Options{}); !errors.Is(err, ErrRunning) {
			t.Error(err)
		}
	})
	t.Run("the API server can be stopped and started", func(t *testing.T) { checkAPIServerRestart(t, ctx, c) })
	t.Run("a restarted node runs its pods again", func(t *testing.T) { checkNodeRestart(t, ctx, c) })

	checkStop(t, c)
	if after := hostFolders(); after != before {
		t.Errorf("the cluster changed which folders exist on the host, before: %s; after: %s", before, after)
	}
}

// checkStop stops the cluster and checks that nothing of it is left.
func checkStop(t *testing.T, c *Cluster) {
	ids := recorded(t)
	checkLogNames(t, c.LogDir())
	began := time.Now()
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Logf("the cluster is down after %s", time.Since(began).Round(time.Millisecond))
	checkNothingLeft(t, ids)
}

// checkLogNames checks that logNames has the name of each log file of a cluster: only these are removed by a later start.
func checkLogNames(t *testing.T, dir string) {
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, f.Name())
	}
	if want := slices.Sorted(slices.Values(logNames())); !slices.Equal(got, want) {
		t.Errorf("the log files of the cluster are %v; logNames has %v", got, want)
	}
}

// checkAPIServerRestart stops and starts the API server, and checks with kubectl that it responds only while it runs.
func checkAPIServerRestart(t *testing.T, ctx context.Context, c *Cluster) {
	if err := c.StopAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Kubectl(ctx, "get", "nodes"); err == nil {
		t.Error("the API server responds after it was stopped")
	}
	if err := c.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	mustKubectl(t, ctx, c, "get", "nodes")
}

// checkNodeRestart restarts node2 and checks that the container of pod on-node2 then restarts once and is ready.
func checkNodeRestart(t *testing.T, ctx context.Context, c *Cluster) {
	if err := c.RestartNode(ctx, "node2"); err != nil {
		t.Fatal(err)
	}
	err := waitFor(ctx, "the pod on node2", time.Minute, nil, polled(func(ctx context.Context) error {
		out, err := c.Kubectl(ctx, "get", "pod", "on-node2", "-o", "jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}")
		if err == nil && out != "1 true" {
			err = fmt.Errorf("restarts and readiness of the container: %s, want 1 true", out)
		}
		return err
	}))
	if err != nil {
		t.Error(err)
	}
}

// checkSources checks the source addresses in the log of the fake Azure: a request of a pod has the pod's own address,
// but a request of a pod with hostNetwork has the address of the node.
func checkSources(t *testing.T, ctx context.Context, c *Cluster) {
	seen := map[string]string{}
	err := waitFor(ctx, "three requests at the fake Azure", 20*time.Second, nil, polled(func(ctx context.Context) error {
		entries, err := c.Azure().Log(ctx, 0)
		for _, e := range entries {
			if e.Kind == "request" && e.Class == "token" {
				seen[e.Source] = e.Node
			}
		}
		if err == nil && len(seen) < 3 {
			err = fmt.Errorf("nodes by source address of the requests: %v, want 3 addresses", seen)
		}
		return err
	}))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct{ source, node string }{
		{podIP(t, ctx, c, "on-node1"), "node1"}, {podIP(t, ctx, c, "on-node2"), "node2"}, {nodeSpecs[0].IP, "node1"},
	} {
		if seen[want.source] != want.node {
			t.Errorf("no request from the address %s was recognized as one of node %s; nodes by source address: %v", want.source, want.node, seen)
		}
	}
	logs := mustKubectl(t, ctx, c, "logs", "on-node1")
	var outcome struct {
		Status int
		Error  string
	}
	if err := json.Unmarshal([]byte(logs), &outcome); err != nil || outcome.Status != 200 {
		t.Errorf("the log of pod on-node1 is %s (%v), want a response with status 200", logs, err)
	}
}

func podIP(t *testing.T, ctx context.Context, c *Cluster, pod string) string {
	t.Helper()
	return mustKubectl(t, ctx, c, "get", "pod", pod, "--output", "jsonpath={.status.podIP}")
}

func mustKubectl(t *testing.T, ctx context.Context, c *Cluster, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// hostFolders returns the existing folders among those that a node or a control plane creates on a real host.
func hostFolders() string {
	var found []string
	for _, dir := range []string{"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/etc/cni", "/run/containerd",
		"/var/log/pods", "/var/log/containers", "/usr/libexec/kubernetes", "/run/kubernetes", "/opt/cni"} {
		if _, err := os.Stat(dir); err == nil {
			found = append(found, dir)
		}
	}
	return fmt.Sprint(found)
}
