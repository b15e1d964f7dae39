package cluster

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/identity"
)

// Names of the indexes of pods.
const (
	byIP        = "ip"
	byUID       = "uid"
	byStaticUID = "static UID"
)

// PodIndexers returns the indexes of pods: by each of their addresses, by UID, and by the UID of a static pod.
func PodIndexers() cache.Indexers {
	return cache.Indexers{byIP: podIPs, byUID: podUID, byStaticUID: indexStaticUID}
}

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

// The kubelet sets these annotations on a mirror pod, which represents a static pod at the API server. configHash has the
// UID that the kubelet gives the static pod. The cgroup of the pod has this UID, and the mirror pod has another one. The
// kubelet deletes pods with the annotation configMirror that do not represent a static pod of its own.
const (
	configHash   = "kubernetes.io/config.hash"
	configMirror = "kubernetes.io/config.mirror"
)

// staticUID returns the UID of the static pod that the mirror pod represents, or "" for all other pods.
func staticUID(pod *corev1.Pod) string {
	if pod.Annotations[configMirror] == "" {
		return ""
	}
	return pod.Annotations[configHash]
}

// indexStaticUID is the index function for the UID of a static pod. Whoever may create pods can set annotations, so an exact
// UID comes before it. See FindByUID.
func indexStaticUID(o any) ([]string, error) {
	pod, ok := o.(*corev1.Pod)
	if !ok || staticUID(pod) == "" {
		return nil, nil
	}
	return []string{staticUID(pod)}, nil
}

// HasAddress reports whether the API server reports the address as one of the pod, or the pod is in the host network.
func HasAddress(pod *corev1.Pod, address netip.Addr) bool {
	ips, _ := podIPs(pod) // never fails
	return pod.Spec.HostNetwork || slices.Contains(ips, address.Unmap().String())
}

// CgroupUID returns the UID in the name of the pod's cgroup.
func CgroupUID(pod *corev1.Pod) string {
	return cmp.Or(staticUID(pod), string(pod.UID))
}

// HostPods returns the pods in the host network that have not finished.
func (c *Cache) HostPods() []*corev1.Pod {
	var pods []*corev1.Pod
	for _, o := range c.pods.GetStore().List() {
		if pod := o.(*corev1.Pod); pod.Spec.HostNetwork && !finished(pod) {
			pods = append(pods, pod)
		}
	}
	return pods
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

// PodsWithAddress returns the pods that the API server reports to have the address, in the form namespace/name.
func (c *Cache) PodsWithAddress(address netip.Addr) []string {
	found, _ := c.pods.GetIndexer().ByIndex(byIP, address.Unmap().String()) // fails only for an unknown index
	var names []string
	for _, o := range found {
		pod := o.(*corev1.Pod)
		names = append(names, pod.Namespace+"/"+pod.Name)
	}
	return names
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
	return identity.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), Labels: pod.Labels, HostNetwork: pod.Spec.HostNetwork}
}
