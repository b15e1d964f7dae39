package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NetworkNamespaces runs programs in the network namespaces of nodes and pods. Tests call it often, so it gets pods
// from the API server without kubectl: a kubectl process takes a quarter of a second of CPU time.
type NetworkNamespaces struct {
	api func() (*apiClient, error)
}

func newNetworkNamespaces() NetworkNamespaces {
	return NetworkNamespaces{sync.OnceValues(func() (*apiClient, error) { return newAPIClient(pkiDir, netnsPath(ControlPlaneNetns)) })}
}

func (n NetworkNamespaces) pod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	api, err := n.api()
	if err != nil {
		return nil, err
	}
	pod, err := api.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("getting pod %s/%s: %w", namespace, name, err)
	}
	return pod, nil
}

// PodPIDs returns the processes of a pod, including that of its sandbox, as PIDs of the host.
func (n NetworkNamespaces) PodPIDs(ctx context.Context, namespace, name string) ([]int, error) {
	pod, err := n.pod(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	return podProcesses(pod)
}

// podProcesses returns the PIDs of a pod's processes, sorted. It finds them by the pod's cgroup, whose name the kubelet
// derives from the pod's UID.
func podProcesses(pod *corev1.Pod) ([]int, error) {
	if pod.UID == "" {
		return nil, fmt.Errorf("the processes of pod %s/%s cannot be found: the API server returned the pod without a UID", pod.Namespace, pod.Name)
	}
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(data), "/"+namePrefix) || !strings.Contains(string(data), "/pod"+string(pod.UID)+"/") {
			continue // the process has ended, or is not of this pod
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	slices.Sort(pids)
	return pids, nil
}

// PodNetns opens the network namespace of a running pod. The kernel keeps the namespace until the caller closes the
// file.
//
// PodNetns returns an error for a pod whose address the API server does not report yet, even if the pod already has a
// network. NMI finds a pod by the address that the API server reports, and waits only for a limited time until the
// address is reported. On a busy host that time may be too short, and NMI would refuse requests that a test sends from
// the pod's network.
func (n NetworkNamespaces) PodNetns(ctx context.Context, namespace, name string) (*os.File, error) {
	pod, err := n.pod(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	if pod.Spec.HostNetwork {
		return nil, fmt.Errorf("pod %s/%s has no network namespace of its own (hostNetwork): run the program in the network namespace of node %s (InNode, or `bin/cluster in-node`)",
			namespace, name, pod.Spec.NodeName)
	}
	if pod.Status.PodIP == "" {
		return nil, fmt.Errorf("pod %s/%s has no address (its phase is %s), so its network may not be ready", namespace, name, pod.Status.Phase)
	}
	pids, err := podProcesses(pod)
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		file, err := openPodNetns(pid, pod)
		if err != nil {
			return nil, err
		}
		if file != nil {
			return file, nil
		}
	}
	return nil, fmt.Errorf("pod %s/%s has no process in a network namespace of its own (its phase is %s)", namespace, name, pod.Status.Phase)
}

// openPodNetns opens the network namespace of a process of a pod. It returns nil without an error if the process has
// ended or is not in the pod's network: runc sets up a container with processes that are in the pod's cgroup a moment
// before they are in its namespaces.
func openPodNetns(pid int, pod *corev1.Pod) (*os.File, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, nil //nolint:nilerr // see above
	}
	// Before the open, the process may have ended, and the kernel may have given its PID to another process. So this
	// check comes after the open. The open file keeps the namespace from then on.
	still, err := podProcesses(pod)
	if err != nil || !slices.Contains(still, pid) {
		file.Close()
		return nil, err
	}
	self := fmt.Sprintf("/proc/self/fd/%d", file.Fd())
	if err := refuseHostNetns(self); err != nil {
		file.Close()
		return nil, err
	}
	inode := netnsInode(self)
	for _, n := range nodeSpecs {
		if inode == netnsInode(netnsPath(n.netns())) {
			file.Close()
			return nil, nil
		}
	}
	return file, nil
}

// InPodCommand returns a command that runs a program of the host inside the pod's network namespace and in the cgroup of
// its first container, as `kubectl exec` does. The program has the files, environment and user of the host.
func (n NetworkNamespaces) InPodCommand(ctx context.Context, namespace, name, program string, args ...string) (*exec.Cmd, error) {
	file, err := n.PodNetns(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	cmd, err := netnsFileCommand(ctx, file, program, args...)
	if err != nil {
		return nil, err
	}
	pod, err := n.pod(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	return cmd, joinCgroup(cmd, pod)
}

// joinCgroup makes the command start in the cgroup v2 of the pod's first container.
func joinCgroup(cmd *exec.Cmd, pod *corev1.Pod) error {
	if len(pod.Status.ContainerStatuses) == 0 {
		return fmt.Errorf("pod %s/%s has no container yet", pod.Namespace, pod.Name)
	}
	_, id, _ := strings.Cut(pod.Status.ContainerStatuses[0].ContainerID, "://")
	root, err := PodsCgroup(pod.Spec.NodeName)
	if err != nil {
		return err
	}
	// The folder of the quality of service class is missing for guaranteed pods.
	for _, pattern := range []string{"pod" + string(pod.UID), "*/pod" + string(pod.UID)} {
		found, err := filepath.Glob(filepath.Join(root, pattern, id))
		if err != nil || len(found) == 0 {
			continue
		}
		folder, err := os.Open(found[0])
		if err != nil {
			return fmt.Errorf("opening the cgroup of pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(folder.Fd())}
		cmd.ExtraFiles = append(cmd.ExtraFiles, folder) // so that it stays open until the command starts
		return nil
	}
	return fmt.Errorf("pod %s/%s has no cgroup v2 of container %s", pod.Namespace, pod.Name, id)
}

// PodsCgroup returns the cgroup v2 of all pods of a node.
func PodsCgroup(node string) (string, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		if m.v2 {
			return filepath.Join(m.path, namePrefix+node, "kubepods"), nil
		}
	}
	return "", errors.New("this host has no cgroup v2 hierarchy")
}

// InNodeCommand returns a command that runs a program of the host inside a node's network namespace.
func (n NetworkNamespaces) InNodeCommand(ctx context.Context, node, program string, args ...string) (*exec.Cmd, error) {
	path, err := NodeNetns(node)
	if err != nil {
		return nil, err
	}
	program, err = findHostTool(program)
	if err != nil {
		return nil, err
	}
	return inNetns(ctx, filepath.Base(path), program, args...)
}

// InNode runs a program inside a node's network namespace and returns what it printed.
func (n NetworkNamespaces) InNode(ctx context.Context, node, program string, args ...string) (string, error) {
	cmd, err := n.InNodeCommand(ctx, node, program, args...)
	if err != nil {
		return "", err
	}
	out, err := run(cmd)
	if err != nil {
		return out, fmt.Errorf("on %s: %w", node, err)
	}
	return out, nil
}

// InPod runs a program inside a pod's network namespace and returns what it printed.
func (n NetworkNamespaces) InPod(ctx context.Context, namespace, name, program string, args ...string) (string, error) {
	cmd, err := n.InPodCommand(ctx, namespace, name, program, args...)
	if err != nil {
		return "", err
	}
	out, err := run(cmd)
	if err != nil {
		return out, fmt.Errorf("in pod %s/%s: %w", namespace, name, err)
	}
	return out, nil
}

// netnsFileCommand returns a command that runs a program of the host inside the network namespace that file refers to.
// The caller must not use or close the file afterwards.
func netnsFileCommand(ctx context.Context, file *os.File, program string, args ...string) (*exec.Cmd, error) {
	program, err := findHostTool(program)
	if err != nil {
		file.Close()
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/proc/self/fd/3", "--", program}, args...)...)
	cmd.ExtraFiles = []*os.File{file} // descriptor 3; the garbage collector closes it in this process
	return cmd, nil
}

// NodeNetns is the path of a node's network namespace.
func NodeNetns(node string) (string, error) {
	var names []string
	for _, n := range nodeSpecs {
		if n.Name == node {
			return netnsPath(n.netns()), nil
		}
		names = append(names, n.Name)
	}
	return "", fmt.Errorf("there is no node %q; the nodes are %s", node, strings.Join(names, " and "))
}
