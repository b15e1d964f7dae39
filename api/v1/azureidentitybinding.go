package v1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// BindingLabel is the pod label whose value a binding's selector must equal.
const BindingLabel = "aadpodidbinding"

// AzureIdentityBinding binds an identity to the pods whose label aadpodidbinding equals its selector.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:path=azureidentitybindings,singular=azureidentitybinding,scope=Namespaced
// +kubebuilder:metadata:annotations="api-approved.kubernetes.io=unapproved"
// +kubebuilder:printcolumn:name="AzureIdentity",type=string,JSONPath=`.spec.azureIdentity`
// +kubebuilder:printcolumn:name="Selector",type=string,JSONPath=`.spec.selector`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule=`has(self.spec) || (oldSelf.hasValue() && !has(oldSelf.value().spec))`,optionalOldSelf=true,message="spec is missing: write azureIdentity and selector under it"
type AzureIdentityBinding struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	// +kubebuilder:validation:XValidation:rule=`has(self.azureIdentity) && self.azureIdentity.size() <= 253 && self.azureIdentity.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')`,fieldPath=`.azureIdentity`,message="the field azureIdentity (case-sensitive) must be the metadata.name of an AzureIdentity in the namespace of this binding"
	// +kubebuilder:validation:XValidation:rule=`has(self.selector) && self.selector.size() <= 63 && self.selector.matches('^[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$')`,fieldPath=`.selector`,message="the field selector (case-sensitive) must be the value that pods have in their label aadpodidbinding: a label value, not an expression"
	Spec AzureIdentityBindingSpec `json:"spec,omitempty"`

	// +optional
	Status AzureIdentityBindingStatus `json:"status,omitempty"`
}

// AzureIdentityBindingCopy is a copy of an AzureIdentityBinding at the time when MIC assigned the identity.
// AzureIdentityCopy explains why it is a separate type.
type AzureIdentityBindingCopy struct {
	metav1.TypeMeta `json:",inline"`

	// +optional
	Metadata metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec AzureIdentityBindingSpec `json:"spec,omitempty"`

	// +optional
	Status AzureIdentityBindingStatus `json:"status,omitempty"`
}

// Copy returns a copy of the binding for an AzureAssignedIdentity, without managedFields. It sets kind and apiVersion:
// the API server requires them in an embedded object, and an object from a typed client does not have them.
func (in *AzureIdentityBinding) Copy() *AzureIdentityBindingCopy {
	in = in.DeepCopy()
	in.ManagedFields = nil
	return &AzureIdentityBindingCopy{
		TypeMeta: metav1.TypeMeta{APIVersion: GroupVersion.String(), Kind: "AzureIdentityBinding"},
		Metadata: in.ObjectMeta,
		Spec:     in.Spec,
		Status:   in.Status,
	}
}

// AzureIdentityBinding returns the copied binding.
func (in *AzureIdentityBindingCopy) AzureIdentityBinding() *AzureIdentityBinding {
	in = in.DeepCopy()
	return &AzureIdentityBinding{TypeMeta: in.TypeMeta, ObjectMeta: in.Metadata, Spec: in.Spec, Status: in.Status}
}

// AzureIdentityBindingSpec names the identity and selects the pods. AzureIdentitySpec explains the maximum lengths.
type AzureIdentityBindingSpec struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// AzureIdentity is the name of an AzureIdentity in the binding's own namespace.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	AzureIdentity string `json:"azureIdentity,omitempty"`

	// Selector is compared for equality with the value of the pod label aadpodidbinding.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Selector string `json:"selector,omitempty"`

	// Deprecated: never had a meaning. An application that has several identities names one in its token request.
	// +optional
	Weight int `json:"weight,omitempty"`
}

// AzureIdentityBindingStatus is never written.
type AzureIdentityBindingStatus struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// Deprecated: never had a meaning. The AzureAssignedIdentity objects say which pods have the identity.
	// +optional
	AvailableReplicas int32 `json:"availableReplicas,omitempty"`
}

// AzureIdentityBindingList is a list of AzureIdentityBinding.
//
// +kubebuilder:object:root=true
type AzureIdentityBindingList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []AzureIdentityBinding `json:"items"`
}
