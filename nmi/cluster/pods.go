package cluster

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/identity"
)

// Names of the indexes of pods.
const (
	byIP  = "ip"
	byUID = "uid"
)

// PodIndexers returns the indexes of pods: by each of their addresses, and by UID.
func PodIndexers() cache.Indexers { return cache.Indexers{byIP: podIPs, byUID: podUID} }

// podIPs is the index function for addresses. A pod in the host network has the addresses of the node, and another pod
// may have the address of a finished pod, so podIPs returns no addresses for these pods.
func podIPs(o any) ([]string, error) {
	pod, ok := o.(*corev1.Pod)
	if !ok || pod.Spec.HostNetwork || finished(pod) {
		return nil, nil
	}
	var ips []string
	add := func(text string) {
		if ip, err := netip.ParseAddr(text); err == nil {
			ips = append(ips, ip.Unmap().String())
		}
	}
	for _, ip := range pod.Status.PodIPs {
		add(ip.IP)
	}
	if len(pod.Status.PodIPs) == 0 {
		add(pod.Status.PodIP)
	}
	return ips, nil
}

func podUID(o any) ([]string, error) {
	pod, ok := o.(*corev1.Pod)
	if !ok {
		return nil, nil
	}
	return []string{string(pod.UID)}, nil
}

// finished reports whether all containers of the pod have terminated and will not restart.
func finished(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// PodByUID returns the pod with this UID. It returns false if the cache does not have the pod or the pod has finished.
func (c *Cache) PodByUID(uid string) (*corev1.Pod, bool) {
	found, err := c.pods.GetIndexer().ByIndex(byUID, uid)
	if err != nil || len(found) != 1 || finished(found[0].(*corev1.Pod)) {
		return nil, false
	}
	return found[0].(*corev1.Pod), true
}

// Latest returns the state of the pod in the cache. If the cache does not have the pod, or the pod has finished, Latest
// returns its argument. In this case either NMI found the pod in a list of the API server and the watch has not
// reported it yet, or the pod has ended.
func (c *Cache) Latest(pod *corev1.Pod) *corev1.Pod {
	if current, ok := c.PodByUID(string(pod.UID)); ok {
		return current
	}
	return pod
}

// IdentityPod returns the pod in the form that the decision reads.
func IdentityPod(pod *corev1.Pod) identity.Pod {
	return identity.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), Labels: pod.Labels}
}
