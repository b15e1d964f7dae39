package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// LoseSandboxes does to the pods of a namespace on a node what a reboot does: it kills all of their processes, and the
// network plugin forgets their addresses. The pods keep their names and UIDs. The kubelet starts them again, and the
// network plugin assigns the addresses anew, from the lowest on: one pod gets the former address of another, while the API
// server still reports the former addresses.
func (n NetworkNamespaces) LoseSandboxes(ctx context.Context, node, namespace string) error {
	api, err := n.api()
	if err != nil {
		return err
	}
	pods, err := api.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
	if err != nil {
		return fmt.Errorf("listing the pods of %s: %w", namespace, err)
	}
	var processes []int
	for i := range pods.Items {
		pids, err := podProcesses(&pods.Items[i])
		if err != nil {
			return err
		}
		processes = append(processes, pids...)
	}
	for _, pid := range processes {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("killing process %d of a pod: %w", pid, err)
		}
	}
	return forgetAddresses(node, pods.Items)
}

// forgetAddresses removes the addresses of the pods from the state of the network plugin host-local, and makes it assign the
// lowest of them next.
func forgetAddresses(node string, pods []corev1.Pod) error {
	state := filepath.Join(runDir, node, "cni", "networks", "pods")
	var lowest netip.Addr
	for _, pod := range pods {
		address, err := netip.ParseAddr(pod.Status.PodIP)
		if err != nil {
			return fmt.Errorf("pod %s/%s has no address: %w", pod.Namespace, pod.Name, err)
		}
		if err := os.Remove(filepath.Join(state, address.String())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if !lowest.IsValid() || address.Less(lowest) {
			lowest = address
		}
	}
	return os.WriteFile(filepath.Join(state, "last_reserved_ip.0"), []byte(lowest.Prev().String()), 0o644)
}
