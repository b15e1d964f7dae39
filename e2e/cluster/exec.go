package cluster

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"syscall"
)

// The functions of this file replace the calling program by another program (exec), so they return only if that fails.
// The other program keeps the standard input and output, and the process ends with the other program's exit status.

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
