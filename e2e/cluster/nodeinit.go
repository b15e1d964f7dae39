package cluster

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// NodeInit is what PID 1 of a node runs, in the node's own network, mount, PID and host name namespaces. It sets the
// host name and the node's root file system, and runs containerd and, after the line "kubelet" on standard input, the
// kubelet. It returns only with an error. When PID 1 ends, the kernel kills all processes of the node; the supervisor
// stops nodes that way.
func NodeInit(planFile string) error {
	if os.Getpid() != 1 {
		return errors.New("node-init is only run by the cluster itself, as the first process of a node")
	}
	if netnsInode("/proc/self/ns/net") == initialNetnsInode {
		return fmt.Errorf("starting a node: %w", ErrHostNetns)
	}
	data, err := os.ReadFile(planFile)
	if err != nil {
		return err
	}
	var plan nodePlan
	if err := json.Unmarshal(data, &plan); err != nil {
		return fmt.Errorf("decoding %s: %w", planFile, err)
	}
	if err := plan.setUp(); err != nil {
		return fmt.Errorf("setting up node %s: %w", plan.Name, err)
	}
	return plan.runDaemons()
}

// mounts performs a series of mounts. It keeps the first error and does nothing after it.
type mounts struct {
	root string
	err  error
}

func (m *mounts) mount(source, target, fstype string, flags uintptr, options string) {
	if m.err != nil {
		return
	}
	if err := unix.Mount(source, m.root+target, fstype, flags, options); err != nil {
		m.err = fmt.Errorf("mounting %s (%s) on %s: %w", source, fstype, target, err)
	}
}

func (m *mounts) bind(source, target string) {
	if m.err == nil {
		m.err = os.MkdirAll(m.root+target, 0o755)
	}
	m.mount(source, target, "", unix.MS_BIND|unix.MS_REC, "")
}

func (m *mounts) write(target, text string) {
	if m.err == nil {
		m.err = os.MkdirAll(filepath.Dir(m.root+target), 0o755)
	}
	if m.err == nil {
		_ = os.Remove(m.root + target) // it may be a symbolic link
		m.err = os.WriteFile(m.root+target, []byte(text), 0o644)
	}
}

// setUp gives the node a root file system of its own, an overlay of the host's: it has the host's programs and
// libraries. What the node writes is in memory and is lost when the node ends, except in the folders that setUp binds.
func (plan *nodePlan) setUp() error {
	if err := unix.Sethostname([]byte(plan.Name)); err != nil {
		return fmt.Errorf("setting the host name: %w", err)
	}
	root := filepath.Join(plan.Dir, "root")
	m := &mounts{}
	m.mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	// The upper layer is a mount of its own: overlayfs refuses layers that contain each other.
	m.mount("podid-node", root, "tmpfs", 0, "mode=0755,size=256m")
	for _, d := range []string{"upper", "work", "merged"} {
		if m.err == nil {
			m.err = os.Mkdir(filepath.Join(root, d), 0o755)
		}
	}
	merged := filepath.Join(root, "merged")
	m.mount("podid-node", merged, "overlay", 0,
		fmt.Sprintf("lowerdir=/,upperdir=%[1]s/upper,workdir=%[1]s/work", root))
	m.root = merged

	m.mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	m.bind("/dev", "/dev")
	// A fresh sysfs shows the devices of this network namespace; the cgroup hierarchies are mounted into it.
	m.mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	m.mount("/sys/fs/cgroup", "/sys/fs/cgroup", "", unix.MS_BIND|unix.MS_REC, "")
	m.mount("podid-bpf", "/sys/fs/bpf", "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
	m.mount("podid-run", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755")
	for _, dir := range plan.KeepDirs {
		m.bind(dir, dir)
	}
	// These folders are on the host's disk. containerd mounts layers as overlays, which cannot be on an overlay. The
	// kubelet and CNI keep their data when the node restarts. The supervisor uses the socket in run-containerd.
	m.bind(filepath.Join(plan.Dir, "containerd"), "/var/lib/containerd")
	m.bind(filepath.Join(plan.Dir, "kubelet"), "/var/lib/kubelet")
	m.bind(filepath.Join(plan.Dir, "cni"), "/var/lib/cni")
	m.bind(filepath.Join(plan.Dir, "run-containerd"), "/run/containerd")

	m.write("/etc/hostname", plan.Name+"\n")
	m.write("/etc/hosts", "127.0.0.1 localhost\n"+plan.Hosts)
	m.write("/etc/resolv.conf", "# The cluster has no name server.\n")
	if m.err == nil {
		m.err = os.Mkdir(merged+"/run/lock", 0o755) // Debian's /var/lock is a link to /run/lock
	}
	if m.err == nil {
		m.err = replaceDir(merged+"/etc/cni/net.d", filepath.Join(plan.Dir, "config", "cni.conflist"), "10-pods.conflist")
	}
	plan.shieldKernelSettings(m)
	if m.err != nil {
		return m.err
	}
	return pivotInto(merged)
}

// replaceDir empties the folder dir and copies the file source into it under the given name: CNI configuration of the
// host must not apply to the node.
func replaceDir(dir, source, name string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	data, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), data, 0o644)
}

// shieldKernelSettings hides the kernel settings that a kubelet changes if they do not have the expected values. They
// are settings of the whole host, which a test must not change. In their place the node sees files with the expected
// values.
func (plan *nodePlan) shieldKernelSettings(m *mounts) {
	for setting, value := range map[string]string{
		"vm/overcommit_memory":      "1",
		"vm/panic_on_oom":           "0",
		"kernel/panic":              "10",
		"kernel/panic_on_oops":      "1",
		"kernel/keys/root_maxkeys":  "1000000",
		"kernel/keys/root_maxbytes": "25000000",
	} {
		file := "/run/podid-sysctl/" + strings.ReplaceAll(setting, "/", ".")
		m.write(file, value+"\n")
		m.mount(m.root+file, "/proc/sys/"+setting, "", unix.MS_BIND, "")
	}
}

func pivotInto(root string) error {
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("entering the new root file system %s: %w", root, err)
	}
	// Old and new root share one mount point; the old one is unmounted next.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("changing the root file system: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmounting the host's root file system: %w", err)
	}
	// Kubelets need mounts that propagate into containers with mountPropagation.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("sharing mounts with containers: %w", err)
	}
	return unix.Chdir("/")
}

// runDaemons runs containerd and, after the line "kubelet" on standard input, the kubelet. It reaps orphaned processes,
// as PID 1 must. It returns an error when one of the two daemons has ended, or when standard input does not have that
// line.
func (plan *nodePlan) runDaemons() error {
	containerd, err := plan.startDaemon("containerd", plan.Containerd)
	if err != nil {
		return err
	}
	names := map[int]string{containerd: "containerd"}
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil || line != "kubelet\n" {
		return fmt.Errorf("node %s: the cluster's supervisor did not send the line \"kubelet\", which starts the kubelet: read %q (error: %v)", plan.Name, line, err)
	}
	kubelet, err := plan.startDaemon("kubelet", plan.Kubelet)
	if err != nil {
		return err
	}
	names[kubelet] = "kubelet"
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("node %s: waiting for its processes: %w", plan.Name, err)
		}
		if name, ok := names[pid]; ok {
			return fmt.Errorf("node %s: %s ended (wait status %#x)%s", plan.Name, name, uint32(status), logTail(plan.daemonLog(name)))
		}
	}
}

func (plan *nodePlan) daemonLog(name string) string {
	return filepath.Join(plan.LogDir, plan.Name+"-"+name+".log")
}

func (plan *nodePlan) startDaemon(name string, argv []string) (int, error) {
	log, err := os.OpenFile(plan.daemonLog(name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=" + plan.Path, "HOME=/root"},
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("node %s: starting %s: %w", plan.Name, name, err)
	}
	return pid, nil
}
