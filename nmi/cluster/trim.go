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
		o.ObjectMeta = metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion, Labels: o.Labels}
		o.Spec = corev1.PodSpec{NodeName: o.Spec.NodeName, HostNetwork: o.Spec.HostNetwork, ServiceAccountName: o.Spec.ServiceAccountName}
		o.Status = corev1.PodStatus{Phase: o.Status.Phase, PodIP: o.Status.PodIP, PodIPs: o.Status.PodIPs}
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
