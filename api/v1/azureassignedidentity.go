package v1

import (
	"crypto/sha256"
	"encoding/hex"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// AssignedIdentityFinalizer keeps an AzureAssignedIdentity until its identity is detached from the VM or scale set.
	AssignedIdentityFinalizer = "azureassignedidentity.finalizers.aadpodidentity.k8s.io"

	// NodeNameLabel is a label of AzureAssignedIdentity with the NodeNameLabelValue of the node. NMI selects by this
	// label, so that it watches only the objects of its node.
	NodeNameLabel = "nodename"
)

// NodeNameLabelValue returns the value of NodeNameLabel for a node: the name of the node, as in AAD Pod Identity. For a
// name that is longer than a label value may be (63 bytes), it returns the first 46 bytes of the name, a hyphen, and
// the first 16 hexadecimal digits of the SHA-256 of the name.
func NodeNameLabelValue(node string) string {
	if len(node) <= 63 {
		return node
	}
	sum := sha256.Sum256([]byte(node))
	return node[:46] + "-" + hex.EncodeToString(sum[:8])
}

// AssignmentState is the state of an assignment.
type AssignmentState string

const (
	// AssignmentLegacy is the state of an object whose status is empty. If no pod owns the object, a version of AAD Pod
	// Identity without states wrote it, and the pod may use the identity. If a pod owns the object, MIC created it and
	// has not set the state yet, so AssignmentLegacy means the same as AssignmentCreated.
	AssignmentLegacy AssignmentState = ""
	// AssignmentCreated means that the pod needs the identity, and it is not yet attached to the pod's VM or scale set.
	AssignmentCreated AssignmentState = "Created"
	// AssignmentAssigned means that the identity is attached to the pod's VM or scale set: the pod may use it.
	AssignmentAssigned AssignmentState = "Assigned"
	// AssignmentUnassigned means that the identity has been detached and the object is about to be deleted.
	AssignmentUnassigned AssignmentState = "Unassigned"
)

// AzureAssignedIdentity records the assignment of one identity to one pod on one node. Only MIC writes it. It is in the
// namespace of its pod, which owns it. Objects that AAD Pod Identity wrote are in the namespace of the identity or in
// "default", and have no owner.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:path=azureassignedidentities,singular=azureassignedidentity,scope=Namespaced
// +kubebuilder:subresource:status
// +kubebuilder:metadata:annotations="api-approved.kubernetes.io=unapproved"
// +kubebuilder:printcolumn:name="Pod",type=string,JSONPath=`.spec.pod`
// +kubebuilder:printcolumn:name="PodNamespace",type=string,JSONPath=`.spec.podNamespace`
// +kubebuilder:printcolumn:name="AzureIdentity",type=string,JSONPath=`.spec.azureIdentityRef.metadata.name`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.spec.nodename`
// +kubebuilder:printcolumn:name="Status",type=string,JSONPath=`.status.status`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type AzureAssignedIdentity struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec AzureAssignedIdentitySpec `json:"spec,omitempty"`

	// +optional
	Status AzureAssignedIdentityStatus `json:"status,omitempty"`
}

// AzureAssignedIdentitySpec names the pod, its node, the identity and the binding.
type AzureAssignedIdentitySpec struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// AzureIdentityRef is a copy of the whole AzureIdentity at the time of the assignment.
	// +optional
	// +kubebuilder:validation:EmbeddedResource
	AzureIdentityRef *AzureIdentityCopy `json:"azureIdentityRef,omitempty"`

	// AzureBindingRef is a copy of the whole AzureIdentityBinding at the time of the assignment.
	// +optional
	// +kubebuilder:validation:EmbeddedResource
	AzureBindingRef *AzureIdentityBindingCopy `json:"azureBindingRef,omitempty"`

	// Pod is the name of the pod.
	// +optional
	Pod string `json:"pod,omitempty"`

	// PodNamespace is the namespace of the pod.
	// +optional
	PodNamespace string `json:"podNamespace,omitempty"`

	// NodeName is the node that the pod runs on. The name of the field is in lower case.
	// +optional
	NodeName string `json:"nodename,omitempty"`

	// Deprecated: never had a meaning. Remove it.
	// +optional
	// +nullable
	Replicas *int32 `json:"replicas,omitempty"`
}

// AzureAssignedIdentityStatus is the state of the assignment.
type AzureAssignedIdentityStatus struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// Status is Created, Assigned or Unassigned. It is empty in a new object until MIC sets it. It is also empty in an
	// object that a version of AAD Pod Identity without states wrote.
	// +optional
	Status AssignmentState `json:"status,omitempty"`

	// Message says why the state is still Created and what to do; empty if there is no problem.
	// +optional
	Message string `json:"message,omitempty"`

	// Deprecated: never had a meaning; AAD Pod Identity always wrote 1. See status.
	// +optional
	AvailableReplicas int32 `json:"availableReplicas,omitempty"`
}

// AzureAssignedIdentityList is a list of AzureAssignedIdentity.
//
// +kubebuilder:object:root=true
type AzureAssignedIdentityList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []AzureAssignedIdentity `json:"items"`
}
