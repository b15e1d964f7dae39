package cluster

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
)

// trimmed is what the caches keep of a custom resource: the fields that NMI reads. The whole object would need four
// times the memory, and a cluster may have many thousands of objects.
type trimmed[T any] struct {
	kube.Meta
	value T
}

func trimTo[T any](o metav1.Object, value T) *trimmed[T] {
	return &trimmed[T]{kube.MetaOf(o), value}
}

// trim reduces an object to the fields that NMI reads, before a cache stores the object. It returns an object that is
// already trimmed unchanged.
func trim(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Pod:
		o.ObjectMeta = metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion, Labels: o.Labels, Annotations: mirrorPodAnnotations(o)}
		o.Spec = corev1.PodSpec{NodeName: o.Spec.NodeName, HostNetwork: o.Spec.HostNetwork, ServiceAccountName: o.Spec.ServiceAccountName}
		o.Status = corev1.PodStatus{Phase: o.Status.Phase, PodIP: o.Status.PodIP, PodIPs: o.Status.PodIPs, StartTime: o.Status.StartTime, ContainerStatuses: newestStart(o)}
	case *v1.AzureIdentity:
		return trimTo(o, identity.FromAzureIdentity(o)), nil
	case *v1.AzureIdentityBinding:
		return trimTo(o, identity.FromAzureIdentityBinding(o)), nil
	case *v1.AzurePodIdentityException:
		return trimTo(o, identity.FromAzurePodIdentityException(o)), nil
	case *v1.AzureAssignedIdentity:
		return trimTo(o, assignment{identity.FromAzureAssignedIdentity(o), time.Now()}), nil
	}
	return o, nil
}

// newestStart returns one status that has only the newest start of a container of the pod, or nil if no container has started.
func newestStart(pod *corev1.Pod) []corev1.ContainerStatus {
	started := started(pod)
	if started.IsZero() {
		return nil
	}
	return []corev1.ContainerStatus{{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(started)}}}}
}

// started returns when the newest container of the pod started; zero if none has.
func started(pod *corev1.Pod) (newest time.Time) {
	add := func(t metav1.Time) {
		if t.After(newest) {
			newest = t.Time
		}
	}
	for _, containers := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		for i := range containers {
			for _, state := range []*corev1.ContainerState{&containers[i].State, &containers[i].LastTerminationState} {
				if state.Running != nil {
					add(state.Running.StartedAt)
				}
				if state.Terminated != nil {
					add(state.Terminated.StartedAt)
				}
			}
		}
	}
	return newest
}

// mirrorPodAnnotations returns the annotations of a mirror pod that PodFinder needs. Other pods keep none: whoever may create
// a pod can set its annotations.
func mirrorPodAnnotations(pod *corev1.Pod) map[string]string {
	if staticUID(pod) == "" {
		return nil
	}
	return map[string]string{configHash: pod.Annotations[configHash], configMirror: pod.Annotations[configMirror]}
}
