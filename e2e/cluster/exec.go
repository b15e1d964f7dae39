package cluster

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"syscall"
)

// The functions of this file replace this program by another one (exec): they return only with an error. The other
// program has the standard input and output and the exit status of this one.

// ExecInNode executes a program of the host inside a node's network namespace.
func (n NetworkNamespaces) ExecInNode(node, program string, args []string) error {
	path, err := NodeNetns(node)
	if err != nil {
		return err
	}
	return execInside(path, program, args)
}

// ExecInPod executes a program of the host inside a pod's network namespace.
func (n NetworkNamespaces) ExecInPod(ctx context.Context, namespace, pod, program string, args []string) error {
	file, err := n.PodNetns(ctx, namespace, pod)
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
