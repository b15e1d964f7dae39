package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// The network namespaces of two simulated nodes are connected to the cluster's bridge: the node of NMI, and the node of
// the bare handler that NMI is compared with. Each node has a second namespace, which has the addresses of its pods.
// Only the node of NMI is connected to the fake IMDS and Entra ID.
const (
	nmiSubnet, bareSubnet = 1, 2
	apiService            = "10.10.0.1"
	entraHost             = "10.246.0.2"
)

// environment is NMI and the bare handler with all that they need.
type environment struct {
	cluster    *cluster.Cluster
	dir        string
	imdsNetns  string
	nmi, bare  *simulatedNode
	azure      *azure.Client
	podCgroup  string // of the first pod on NMI's node
	nmiLog     *os.File
	nmiProcess *child
	children   children
}

// simulatedNode is the namespace of a node and the namespace that has the addresses of its pods.
type simulatedNode struct {
	node, podsNetns string
	subnet          int
}

func (r *environment) newSimulatedNode(name string, subnet int) (*simulatedNode, error) {
	node, err := r.cluster.AddNetns("bench-" + name)
	if err != nil {
		return nil, err
	}
	pods, err := r.cluster.AddNetns("bench-" + name + "-pods")
	return &simulatedNode{node: node, podsNetns: pods, subnet: subnet}, err
}

// azureDir is where the fake Azure writes its CA certificate.
func (r *environment) azureDir() string { return filepath.Join(r.dir, "azure") }

func repo() string {
	dir, err := cluster.RepoDir()
	if err != nil {
		return ".."
	}
	return dir
}

func newEnvironment(ctx context.Context, c *cluster.Cluster) (*environment, error) {
	dir, err := cluster.Scratch("bench")
	if err != nil {
		return nil, err
	}
	r := &environment{cluster: c, dir: dir}
	if err := r.build(ctx); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *environment) build(ctx context.Context) (err error) {
	if r.nmi, err = r.newSimulatedNode("nmi", nmiSubnet); err != nil {
		return err
	}
	if r.bare, err = r.newSimulatedNode("bare", bareSubnet); err != nil {
		return err
	}
	if r.imdsNetns, err = r.cluster.AddNetns("bench-imds"); err != nil {
		return err
	}
	if err := errors.Join(r.nmi.wire(ctx), r.bare.wire(ctx), r.wireIMDS(ctx)); err != nil {
		return err
	}
	return r.startIMDS(ctx)
}

// close stops the processes that the environment started, and removes its folder. The cluster removes the namespaces
// when it stops.
func (r *environment) close() error {
	r.children.stop()
	if r.nmiLog != nil {
		r.nmiLog.Close()
	}
	return os.RemoveAll(r.dir)
}

// wire connects the namespace of a node with the control plane and with the namespace of the node's pods. The pods'
// default route leads to the node, and the node has no default route. So no packet leaves the host.
func (s *simulatedNode) wire(ctx context.Context) error {
	node, pods := s.node, s.podsNetns
	gateway := fmt.Sprintf("10.245.%d.1", s.subnet)
	commands := [][]string{
		// to the control plane
		{"-n", cluster.ControlPlaneNetns, "link", "add", "pb" + strconv.Itoa(s.subnet), "type", "veth", "peer", "name", "eth0", "netns", node},
		{"-n", cluster.ControlPlaneNetns, "link", "set", "pb" + strconv.Itoa(s.subnet), "master", cluster.ControlPlaneBridge, "up"},
		{"-n", node, "addr", "add", fmt.Sprintf("10.10.0.%d/24", 20+s.subnet), "dev", "eth0"}, {"-n", node, "link", "set", "eth0", "up"},
		{"-n", node, "route", "add", "10.96.0.0/16", "via", apiService},
		// to the pods
		{"-n", node, "link", "add", "pods", "type", "veth", "peer", "name", "eth0", "netns", pods},
		{"-n", node, "addr", "add", gateway + "/24", "dev", "pods"}, {"-n", node, "link", "set", "pods", "up"},
		{"-n", pods, "link", "set", "eth0", "up"},
	}
	for i := range podsOnANode {
		commands = append(commands, []string{"-n", pods, "addr", "add", podIP(s.subnet, i) + "/24", "dev", "eth0"})
	}
	commands = append(commands, []string{"-n", pods, "route", "add", "default", "via", gateway})
	return ip(ctx, commands...)
}

const podsOnANode = pods

// wireIMDS connects NMI's node with the namespace of the fake IMDS and the fake Entra ID, and adds the node's route to
// IMDS.
func (r *environment) wireIMDS(ctx context.Context) error {
	return ip(ctx,
		[]string{"-n", r.imdsNetns, "addr", "add", "169.254.169.254/32", "dev", "lo"},
		[]string{"-n", r.nmi.node, "link", "add", "imds", "type", "veth", "peer", "name", "eth0", "netns", r.imdsNetns},
		[]string{"-n", r.nmi.node, "addr", "add", "10.246.0.1/24", "dev", "imds"}, []string{"-n", r.nmi.node, "link", "set", "imds", "up"},
		[]string{"-n", r.imdsNetns, "addr", "add", entraHost + "/24", "dev", "eth0"}, []string{"-n", r.imdsNetns, "link", "set", "eth0", "up"},
		[]string{"-n", r.imdsNetns, "route", "add", "default", "via", "10.246.0.1"},
		[]string{"-n", r.nmi.node, "route", "add", "169.254.169.254/32", "via", entraHost},
	)
}

func ip(ctx context.Context, commands ...[]string) error {
	for _, args := range commands {
		if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

func inNetns(ctx context.Context, netns string, program string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=/run/netns/" + netns, "--", program}, args...)...)
}

func (r *environment) startIMDS(ctx context.Context) error {
	config := azure.Config{
		IMDSAddr: "169.254.169.254:80", EntraAddr: entraHost + ":443", ControlSocket: filepath.Join(r.dir, "azure.sock"), StateDir: r.azureDir(),
		EntraHosts: []string{"login.microsoftonline.com"}, Tenant: cluster.TenantID,
		Nodes: []azure.Node{{Name: nodeName, Sources: []netip.Prefix{netip.MustParsePrefix("10.246.0.1/32"), netip.MustParsePrefix("10.245.1.0/24")}}},
	}
	text, err := json.Marshal(config)
	if err != nil {
		return err
	}
	file := filepath.Join(r.dir, "azure.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return err
	}
	cmd := inNetns(context.WithoutCancel(ctx), r.imdsNetns, filepath.Join(repo(), "bin", "cluster"), "azure", "serve", "--config", file)
	cmd.Stderr = os.Stderr
	if _, err := r.children.start(cmd); err != nil {
		return fmt.Errorf("starting the fake IMDS: %w", err)
	}
	r.azure = azure.Dial(config.ControlSocket)
	waiting, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if err := r.azure.WaitReady(waiting); err != nil {
		return err
	}
	return r.azure.AddIdentity(ctx, shared)
}

// startNMI runs NMI on its node like the DaemonSet, and returns when NMI is ready. Besides the flags that NMI needs
// outside of a pod, only the capture, profiling, the verification of pods, and the address and the CA of Entra ID
// differ from the defaults.
func (r *environment) startNMI(ctx context.Context) error {
	binary, err := buildProgram(ctx, "nmi", r.dir)
	if err != nil {
		return err
	}
	if r.nmiLog, err = os.Create(filepath.Join(r.dir, "nmi.log")); err != nil {
		return err
	}
	all, pod, err := makePodCgroup(ctx, r)
	if err != nil {
		return fmt.Errorf("making the cgroup of a pod: %w", err)
	}
	r.podCgroup = pod
	// A bpffs of its own, which ends with NMI.
	const start = `mount -t bpf bpf /sys/fs/bpf && exec "$0" "$@"`
	cmd := inNetns(context.WithoutCancel(ctx), r.nmi.node, "unshare", "--mount", "sh", "-c", start, binary, "--node="+nodeName, "--capture=both", "--pods-cgroup="+all, "--kubeconfig="+r.cluster.Kubeconfig(), "--enable-profile",
		"--pod-verification=off", // all pods are behind one link
		"--authority-host=https://"+entraHost, "--ca-bundle="+filepath.Join(r.azureDir(), azure.CAFile))
	cmd.Stderr = r.nmiLog
	cmd.Env = append(os.Environ(), "GOMEMLIMIT=204MiB") // as in the chart
	if r.nmiProcess, err = r.children.start(cmd); err != nil {
		return fmt.Errorf("starting NMI: %w", err)
	}
	return r.waitReady(ctx, r.nmi.node, "http://127.0.0.1:8085/readyz")
}

func (r *environment) waitReady(ctx context.Context, netns, url string) error {
	for range 600 {
		if inNetns(ctx, netns, "curl", "-sf", "--max-time", "2", url).Run() == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	var why []byte
	if r.nmiLog != nil {
		why, _ = os.ReadFile(r.nmiLog.Name())
	}
	return fmt.Errorf("NMI is not ready: %s in network namespace %s returned no success in 600 attempts; the end of NMI's log:\n%s",
		url, netns, why[max(0, len(why)-4000):])
}

// startBare starts the bare handler (see bare) with the body of a response of NMI, and returns when the bare handler
// responds with exactly this body.
func (r *environment) startBare(ctx context.Context) error {
	answer, err := r.nmi.client(0).once(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(r.dir, "answer.json")
	if err := os.WriteFile(file, answer, 0o600); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := inNetns(context.WithoutCancel(ctx), r.bare.node, self, "bare", file)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if _, err := r.children.start(cmd); err != nil {
		return fmt.Errorf("starting the bare handler (bench bare, the HTTP server that NMI is compared with): %w", err)
	}
	client := r.bare.client(0)
	var got []byte
	for range 100 {
		if got, err = client.once(ctx); err == nil && bytes.Equal(got, answer) {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err == nil {
		err = fmt.Errorf("unexpected body %q", got)
	}
	return fmt.Errorf("the bare handler (bench bare, the HTTP server that NMI is compared with) did not return NMI's response body in 100 attempts: %w;"+
		" its standard error:\n%s", err, stderr.String())
}

// burst resets the log and the counts of the fake Azure, and sends one request from each pod, all at once. It returns
// how many token requests IMDS received, and the time until the last response. It returns an error if a request failed,
// or if a pod connected to IMDS directly.
func (r *environment) burst(ctx context.Context) (calls int, slowest time.Duration, err error) {
	if err := r.azure.ResetLog(ctx); err != nil {
		return 0, 0, err
	}
	start := make(chan struct{})
	results := make(chan error, pods)
	var began time.Time
	for i := range pods {
		client := r.nmi.client(i)
		go func() {
			<-start
			_, err := client.once(ctx)
			results <- err
		}()
	}
	began = time.Now()
	close(start)
	for range pods {
		err = errors.Join(err, <-results)
	}
	slowest = time.Since(began)
	stats, statsErr := r.azure.Stats(ctx)
	if stats.IMDS.RequestsFromPods != 0 || stats.IMDS.ConnectionsFromPods != 0 {
		err = errors.Join(err, fmt.Errorf("%d connections and %d requests of pods reached IMDS directly, not through NMI",
			stats.IMDS.ConnectionsFromPods, stats.IMDS.RequestsFromPods))
	}
	return stats.IMDS.Token.Requests, slowest, errors.Join(err, statsErr)
}

// profile writes a CPU profile and a heap profile of NMI, taken while it is under load, into a folder.
func (r *environment) profile(ctx context.Context, dir string, length time.Duration) error {
	for name, path := range map[string]string{"cpu.pprof": fmt.Sprintf("profile?seconds=%.0f", length.Seconds()), "heap.pprof": "heap?gc=1"} {
		done := make(chan error, 1)
		go func() {
			_, err := r.nmi.measure(ctx, length+time.Second)
			done <- err
		}()
		err := inNetns(ctx, r.nmi.node, "curl", "-sf", "-o", filepath.Join(dir, name), "http://127.0.0.1:6060/debug/pprof/"+path).Run()
		if err := errors.Join(err, <-done); err != nil {
			return fmt.Errorf("profiling NMI (%s): %w", name, err)
		}
	}
	return nil
}

// readAll reads a whole response. A status other than 200 is an error.
func readAll(resp *http.Response) ([]byte, error) {
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: status %d: %s", resp.Request.URL, resp.StatusCode, body)
	}
	return body, err
}
