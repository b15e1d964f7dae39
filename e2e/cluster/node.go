package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// node is one node of the cluster as the supervisor sees it: a process, init, that is PID 1 in the node's PID
// namespace.
type node struct {
	nodeSpec
	bin        Binaries
	program    string // the cluster program, which is also the node's init
	providerID string
	logDir     string
	spawn      spawner
	hosts      string // lines for the node's /etc/hosts

	onStart func(name string, p *process) error

	began time.Time // when the node was started
	init  *process
	input *os.File // write end of init's standard input; the line "kubelet" makes init start the kubelet
}

func (n *node) dir() string { return filepath.Join(runDir, n.Name) }

func (n *node) log(part string) string { return filepath.Join(n.logDir, n.Name+"-"+part+".log") }

func containerdSocket(node string) string {
	return filepath.Join(runDir, node, "run-containerd", "containerd.sock")
}

// nodePlan is the configuration of NodeInit, which reads it from a file.
type nodePlan struct {
	Name       string
	Dir        string
	KeepDirs   []string // folders of the host that the node sees at the same path
	Hosts      string
	Containerd []string
	Kubelet    []string
	LogDir     string
	Path       string
}

// boot creates the node's mount, PID and host name namespaces, starts containerd in them, and returns when containerd
// accepts connections. It does not start the kubelet (see startKubelet).
func (n *node) boot(ctx context.Context) error {
	n.began = time.Now()
	// A restarted node starts like a rebooted computer: with new cgroups and an empty /run, but with the old folders of
	// containerd, the kubelet and CNI in /var/lib. With the old cgroups, the kubelet would spend half a minute looking
	// for containers in them.
	if err := errors.Join(removeCgroups(n.netns()), createCgroups(n.netns())); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(n.dir(), "run-containerd")); err != nil {
		return err
	}
	for _, d := range []string{"run-containerd", "containerd", "kubelet", "cni", "root", "config"} {
		if err := os.MkdirAll(filepath.Join(n.dir(), d), 0o755); err != nil {
			return err
		}
	}
	plan, err := n.writeConfig()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd, err := inNetns(context.WithoutCancel(ctx), n.netns(), n.program, "node-init", plan)
	if err != nil {
		w.Close()
		return err
	}
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS}
	n.input = w
	if n.init, err = n.spawn.start(n.Name, n.log("init"), cmd); err != nil {
		return err
	}
	if err := n.onStart(n.Name, n.init); err != nil {
		return err
	}
	return waitFor(ctx, "containerd on "+n.Name, startLimit, []*process{n.init}, polled(func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", containerdSocket(n.Name))
		if err == nil {
			conn.Close()
		}
		return err
	}))
}

// startKubelet makes init start the kubelet. The caller calls it when the API server is ready: a kubelet that is
// started earlier waits longer and longer between its attempts to connect.
func (n *node) startKubelet() error {
	_, err := n.input.Write([]byte("kubelet\n"))
	if err := errors.Join(err, n.input.Close()); err != nil {
		return fmt.Errorf("making the init process of node %s start the kubelet: %w", n.Name, err)
	}
	return nil
}

func (n *node) awaitReady(ctx context.Context, api *apiClient) error {
	err := waitFor(ctx, "node "+n.Name, startLimit, []*process{n.init}, func(ctx context.Context) error { return api.awaitNode(ctx, n.Name, n.began) })
	if err != nil {
		return fmt.Errorf("%w%s", err, logTail(n.log("kubelet")))
	}
	return nil
}

// importImages loads image archives into the node's containerd, one after the other: parallel imports of images that
// share a layer fail.
func importImages(ctx context.Context, bin Binaries, node string, archives []string) error {
	for _, archive := range archives {
		if _, err := runCtr(ctx, bin, node, "images", "import", archive); err != nil {
			return fmt.Errorf("importing image archive %s: %w", archive, err)
		}
	}
	return nil
}

func (n *node) writeConfig() (plan string, err error) {
	cni, err := json.Marshal(map[string]any{
		"cniVersion": "1.0.0",
		"name":       "pods",
		"plugins": []any{map[string]any{
			// No masquerading: packets of pods keep the pods' own addresses.
			"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
			"ipam": map[string]any{
				"type":   "host-local",
				"ranges": []any{[]any{map[string]any{"subnet": n.PodCIDR}}},
				"routes": []any{map[string]any{"dst": "0.0.0.0/0"}},
			},
		}},
	})
	if err != nil {
		return "", err
	}
	at := func(file string) string { return filepath.Join(n.dir(), "config", file) }
	cache := filepath.Dir(n.bin.Debian)
	path := strings.Join([]string{filepath.Join(n.bin.Debian, "usr/bin"), filepath.Join(n.bin.Debian, "usr/sbin"),
		"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}, ":")
	planJSON, err := json.Marshal(nodePlan{
		Name: n.Name, Dir: n.dir(), Hosts: n.hosts, LogDir: n.logDir, Path: path,
		KeepDirs:   []string{pkiDir, at(""), cache, n.logDir},
		Containerd: []string{n.bin.debian("containerd"), "--config", at("containerd.toml")},
		Kubelet: []string{n.bin.kube("kubelet"),
			"--config", at("kubelet.json"),
			"--kubeconfig", filepath.Join(pkiDir, n.Name+".kubeconfig"),
			"--hostname-override", n.Name, "--node-ip", n.IP, "--root-dir", "/var/lib/kubelet", "--v", "2"},
	})
	if err != nil {
		return "", err
	}
	kubelet, err := json.MarshalIndent(n.kubeletConfig(), "", "  ")
	if err != nil {
		return "", err
	}
	for file, data := range map[string][]byte{
		"cni.conflist":    cni,
		"containerd.toml": []byte(n.containerdConfig()),
		"kubelet.json":    kubelet,
		"plan.json":       planJSON,
	} {
		if err := os.WriteFile(at(file), data, 0o644); err != nil {
			return "", err
		}
	}
	return at("plan.json"), nil
}

// containerdConfig is for the containerd of Debian 12, hence version 2 of the format. The sandbox image has docker.io/
// before its name, because containerd's importer adds that prefix.
func (n *node) containerdConfig() string {
	return fmt.Sprintf(`version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/%s"
  # Without CAP_SYS_RESOURCE, which root lacks on some hosts, a container cannot get a lower OOM score than its parent.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = %q
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = "/etc/cni/net.d"
`, PauseImage, n.bin.debianS("runc"), n.bin.cni())
}

func (n *node) kubeletConfig() map[string]any {
	return map[string]any{
		"apiVersion":   "kubelet.config.k8s.io/v1beta1",
		"kind":         "KubeletConfiguration",
		"failCgroupV1": false,
		"cgroupDriver": "cgroupfs",
		"cgroupRoot":   "/" + n.netns(),
		"failSwapOn":   false,
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": true},
			"x509":      map[string]any{"clientCAFile": filepath.Join(pkiDir, "ca.crt")},
		},
		"authorization":            map[string]any{"mode": "Webhook"},
		"tlsCertFile":              filepath.Join(pkiDir, n.Name+"-serving.crt"),
		"tlsPrivateKeyFile":        filepath.Join(pkiDir, n.Name+"-serving.key"),
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"providerID":               n.providerID,
		"address":                  "0.0.0.0",
		"resolvConf":               "/etc/resolv.conf", // the node's own, without a name server
		"makeIPTablesUtilChains":   false,              // only the rules under test are in the tables
		"maxPods":                  250,
		// Tests read long logs of NMI after load tests, and kubectl shows only what was not rotated.
		"containerLogMaxSize":       "500Mi",
		"syncFrequency":             "10s",
		"nodeStatusUpdateFrequency": "5s",
		// The disk is the host's: its usage must not cause evictions or image garbage collection.
		"imageGCHighThresholdPercent": 100,
		"evictionHard": map[string]string{
			"memory.available": "50Mi", "nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.inodesFree": "0%",
		},
	}
}

// defaultProviderID has the form that Azure gives the nodes of a scale set.
func defaultProviderID(index int) string {
	return fmt.Sprintf("azure:///subscriptions/%s/resourceGroups/%s/providers/Microsoft.Compute/virtualMachineScaleSets/%s/virtualMachines/%d",
		SubscriptionID, ResourceGroup, ScaleSet, index)
}
