package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// podInfo is what is needed to find a pod's processes.
type podInfo struct {
	Metadata struct{ UID string }
	Spec     struct {
		NodeName    string
		HostNetwork bool
	}
	Status struct{ Phase, PodIP string }
}

func (c *Cluster) pod(ctx context.Context, namespace, name string) (podInfo, error) {
	var pod podInfo
	out, err := c.Kubectl(ctx, "--namespace", namespace, "get", "pod", name, "--output", "json")
	if err != nil {
		return pod, fmt.Errorf("looking for pod %s/%s: %w", namespace, name, err)
	}
	if err := json.Unmarshal([]byte(out), &pod); err != nil {
		return pod, fmt.Errorf("reading pod %s/%s: %w", namespace, name, err)
	}
	return pod, nil
}

// PodPIDs are the processes of a pod, as seen from the machine. The sandbox's own is among them.
func (c *Cluster) PodPIDs(ctx context.Context, namespace, name string) ([]int, error) {
	pod, err := c.pod(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	return podProcesses(pod.Metadata.UID)
}

// podProcesses finds processes by the pod's cgroup, whose name the kubelet makes from the UID. Nothing else on the
// machine says which namespaces are a pod's.
func podProcesses(uid string) ([]int, error) {
	if uid == "" {
		return nil, errors.New("the pod has no UID")
	}
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(data), "/"+namePrefix) || !strings.Contains(string(data), "/pod"+uid+"/") {
			continue // ended, or somebody else's
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

// PodNetns opens the network namespace of a running pod. The caller closes the file, which keeps the namespace.
//
// A pod whose address the kubelet has not told yet is not running: it has a network some time before it has a container,
// on a busy machine for longer than anything that looks for the pod behind an address can be asked to wait.
func (c *Cluster) PodNetns(ctx context.Context, namespace, name string) (*os.File, error) {
	pod, err := c.pod(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	if pod.Spec.HostNetwork {
		return nil, fmt.Errorf("pod %s/%s is in its node's network (hostNetwork): use in-node %s", namespace, name, pod.Spec.NodeName)
	}
	if pod.Status.PodIP == "" {
		return nil, fmt.Errorf("pod %s/%s has no address yet (its phase is %s)", namespace, name, pod.Status.Phase)
	}
	pids, err := podProcesses(pod.Metadata.UID)
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
	return nil, fmt.Errorf("pod %s/%s has no running process (its phase is %s)", namespace, name, pod.Status.Phase)
}

// openPodNetns returns nil without an error if the process is gone or is not in the pod's network: runc sets a
// container up by processes that are in the pod's cgroup a moment before they are in its namespaces.
func openPodNetns(pid int, pod podInfo) (*os.File, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, nil
	}
	// The open file pins the namespace; the process must still have been the pod's when it was opened.
	still, err := podProcesses(pod.Metadata.UID)
	if err != nil || !slices.Contains(still, pid) {
		file.Close()
		return nil, err
	}
	self := fmt.Sprintf("/proc/self/fd/%d", file.Fd())
	if err := refuseMachineNetns(self); err != nil {
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

// InPodCommand is a program of this machine, ready to run inside the pod's network namespace. Of the pod it has
// nothing but the network: no files, no environment, no user.
func (c *Cluster) InPodCommand(ctx context.Context, namespace, name, program string, args ...string) (*exec.Cmd, error) {
	file, err := c.PodNetns(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	return netnsFileCommand(ctx, file, program, args...)
}

// InNodeCommand is a program of this machine, ready to run inside a node's network namespace.
func (c *Cluster) InNodeCommand(ctx context.Context, node, program string, args ...string) (*exec.Cmd, error) {
	path, err := NodeNetns(node)
	if err != nil {
		return nil, err
	}
	program, err = lookHostTool(program)
	if err != nil {
		return nil, err
	}
	return inNetns(ctx, filepath.Base(path), program, args...)
}

// InNode runs a program inside a node's network namespace and returns what it printed.
func (c *Cluster) InNode(ctx context.Context, node, program string, args ...string) (string, error) {
	cmd, err := c.InNodeCommand(ctx, node, program, args...)
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
func (c *Cluster) InPod(ctx context.Context, namespace, name, program string, args ...string) (string, error) {
	cmd, err := c.InPodCommand(ctx, namespace, name, program, args...)
	if err != nil {
		return "", err
	}
	out, err := run(cmd)
	if err != nil {
		return out, fmt.Errorf("in pod %s/%s: %w", namespace, name, err)
	}
	return out, nil
}

// netnsFileCommand hands the open namespace on to the command, which owns it from here.
func netnsFileCommand(ctx context.Context, file *os.File, program string, args ...string) (*exec.Cmd, error) {
	program, err := lookHostTool(program)
	if err != nil {
		file.Close()
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/proc/self/fd/3", "--", program}, args...)...)
	cmd.ExtraFiles = []*os.File{file} // descriptor 3; the garbage collector closes ours
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

// NodePID is the first process of a node. Its end is the node's end.
func (c *Cluster) NodePID(node string) (int, error) {
	if _, err := NodeNetns(node); err != nil {
		return 0, err
	}
	s, err := running()
	if err != nil {
		return 0, err
	}
	p := s.Processes[node]
	if !p.alive() {
		return 0, fmt.Errorf("node %s is down", node)
	}
	return p.PID, nil
}
