package cluster

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
)

// The functions of this file replace this program by another one (exec): they return only with an error. The other
// program has the standard input and output and the exit status of this one.

// ExecKubectl executes kubectl as admin.
func (c *Cluster) ExecKubectl(args []string) error { return execAdmin(c.bin.kube("kubectl"), args) }

// ExecHelm executes helm as admin.
func (c *Cluster) ExecHelm(args []string) error { return execAdmin(c.bin.kube("helm"), args) }

func execAdmin(program string, args []string) error {
	for _, entry := range adminEnv() {
		key, value, _ := strings.Cut(entry, "=")
		if err := os.Setenv(key, value); err != nil {
			return err
		}
	}
	return execInside(netnsPath(controlPlaneNetns), program, args)
}

// ExecInNode executes a program of the host inside a node's network namespace.
func (c *Cluster) ExecInNode(node, program string, args []string) error {
	path, err := NodeNetns(node)
	if err != nil {
		return err
	}
	return execInside(path, program, args)
}

// ExecInPod executes a program of the host inside a pod's network namespace.
func (c *Cluster) ExecInPod(ctx context.Context, namespace, pod, program string, args []string) error {
	file, err := c.PodNetns(ctx, namespace, pod)
	if err != nil {
		return err
	}
	defer file.Close()
	return execInside(fmt.Sprintf("/proc/self/fd/%d", file.Fd()), program, args)
}

func execInside(netns, program string, args []string) error {
	program, err := findHostTool(program)
	if err != nil {
		return err
	}
	// The new program has the namespaces of the thread that calls exec.
	runtime.LockOSThread()
	if err := enterNetns(netns); err != nil {
		return err
	}
	if err := syscall.Exec(program, append([]string{program}, args...), os.Environ()); err != nil {
		return fmt.Errorf("running %s: %w", program, err)
	}
	return nil
}
