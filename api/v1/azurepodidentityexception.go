package v1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// AzurePodIdentityException exempts pods of its namespace from bindings: they get tokens of any identity that is attached
// to their VM or scale set.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:path=azurepodidentityexceptions,singular=azurepodidentityexception,scope=Namespaced
// +kubebuilder:metadata:annotations="api-approved.kubernetes.io=unapproved"
// +kubebuilder:printcolumn:name="PodLabels",type=string,priority=1,JSONPath=`.spec.podLabels`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type AzurePodIdentityException struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec AzurePodIdentityExceptionSpec `json:"spec,omitempty"`

	// +optional
	Status AzurePodIdentityExceptionStatus `json:"status,omitempty"`
}

// AzurePodIdentityExceptionSpec selects the pods.
type AzurePodIdentityExceptionSpec struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// PodLabels exempts a pod that has at least one of these labels. The case of the value is ignored.
	// +optional
	PodLabels map[string]string `json:"podLabels,omitempty"`
}

// AzurePodIdentityExceptionStatus is never written.
type AzurePodIdentityExceptionStatus struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// Deprecated: never had a meaning. Remove it.
	// +optional
	Status string `json:"status,omitempty"`
}

// AzurePodIdentityExceptionList is a list of AzurePodIdentityException.
//
// +kubebuilder:object:root=true
type AzurePodIdentityExceptionList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []AzurePodIdentityException `json:"items"`
}
