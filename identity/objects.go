package identity

import (
	"cmp"
	"slices"
	"strings"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/internal/text"
)

// FromAzureIdentity returns the fields of the object that the decision reads.
func FromAzureIdentity(o *v1.AzureIdentity) Identity {
	i := Identity{
		Namespace:  o.Namespace,
		Name:       o.Name,
		Kind:       Kind(o.Spec.Type),
		ClientID:   o.Spec.ClientID,
		ResourceID: o.Spec.ResourceID,
		Namespaced: strings.EqualFold(o.Annotations[v1.BehaviorAnnotation], v1.BehaviorNamespaced),
	}
	if i.Kind == UserAssigned {
		return i // the other fields have no meaning for this type, and thousands of identities are kept in memory
	}
	i.TenantID, i.ADEndpoint = o.Spec.TenantID, o.Spec.ADEndpoint
	if i.usesSecret() {
		i.SecretName = o.Spec.ClientPassword.Name
		i.SecretNamespace = cmp.Or(o.Spec.ClientPassword.Namespace, o.Namespace)
	}
	if i.Kind == ServicePrincipalSecret {
		i.AuxiliaryTenantIDs = slices.Clone(o.Spec.AuxiliaryTenantIDs)
	}
	return i
}

// FromAzureIdentityBinding returns the fields of the object that the decision reads.
func FromAzureIdentityBinding(o *v1.AzureIdentityBinding) Binding {
	return Binding{Namespace: o.Namespace, Name: o.Name, AzureIdentity: o.Spec.AzureIdentity, Selector: o.Spec.Selector}
}

// FromAzurePodIdentityException returns the fields of the object that the decision reads.
func FromAzurePodIdentityException(o *v1.AzurePodIdentityException) Exception {
	return Exception{Namespace: o.Namespace, Name: o.Name, PodLabels: o.Spec.PodLabels}
}

// FromAzureAssignedIdentity returns the fields of the object that the decision reads. An object without a copy of its
// identity covers no identity.
func FromAzureAssignedIdentity(o *v1.AzureAssignedIdentity) Assignment {
	a := Assignment{
		PodNamespace: o.Spec.PodNamespace,
		PodName:      o.Spec.Pod,
		State:        State(o.Status.Status),
		Message:      text.OneLine(strings.ToValidUTF8(o.Status.Message, ""), maxMessage),
	}
	for _, owner := range o.OwnerReferences {
		if owner.Kind == "Pod" && owner.APIVersion == "v1" {
			a.PodUID = string(owner.UID)
		}
	}
	if i := o.Spec.AzureIdentityRef; i != nil {
		a.IdentityNamespace, a.IdentityName = i.Metadata.Namespace, i.Metadata.Name
		a.Kind, a.ResourceID = Kind(i.Spec.Type), i.Spec.ResourceID
	}
	return a
}

// maxMessage bounds the message of an assignment, in bytes: it becomes part of responses, log lines and Events.
const maxMessage = 800
