package identity

import (
	"strings"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// FromAzureIdentity takes from the object what the decision reads.
func FromAzureIdentity(o *v1.AzureIdentity) Identity {
	return Identity{
		Namespace:  o.Namespace,
		Name:       o.Name,
		Kind:       Kind(o.Spec.Type),
		ClientID:   o.Spec.ClientID,
		ResourceID: o.Spec.ResourceID,
		TenantID:   o.Spec.TenantID,
		Namespaced: strings.EqualFold(o.Annotations[v1.BehaviorAnnotation], v1.BehaviorNamespaced),
	}
}

// FromAzureIdentityBinding takes from the object what the decision reads.
func FromAzureIdentityBinding(o *v1.AzureIdentityBinding) Binding {
	return Binding{Namespace: o.Namespace, Name: o.Name, AzureIdentity: o.Spec.AzureIdentity, Selector: o.Spec.Selector}
}

// FromAzurePodIdentityException takes from the object what the decision reads.
func FromAzurePodIdentityException(o *v1.AzurePodIdentityException) Exception {
	return Exception{Namespace: o.Namespace, Name: o.Name, PodLabels: o.Spec.PodLabels}
}
