package v1

import (
	"crypto/sha256"
	"encoding/hex"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// AssignedIdentityFinalizer keeps an AzureAssignedIdentity until its identity is off the machine again.
	AssignedIdentityFinalizer = "azureassignedidentity.finalizers.aadpodidentity.k8s.io"

	// NodeNameLabel on an AzureAssignedIdentity holds NodeNameLabelValue of the node, so that a node watches only its
	// own.
	NodeNameLabel = "nodename"
)

// NodeNameLabelValue is the node's name, as the predecessor wrote it; of a name that is too long for a label (63 bytes)
// the first 46 bytes, a hyphen and 16 hexadecimal digits of its SHA-256.
func NodeNameLabelValue(node string) string {
	if len(node) <= 63 {
		return node
	}
	sum := sha256.Sum256([]byte(node))
	return node[:46] + "-" + hex.EncodeToString(sum[:8])
}

// AssignmentState says how far an assignment is.
type AssignmentState string

const (
	// AssignmentLegacy is the state of objects written before there were states: the pod may use the identity. An object
	// that a pod owns was not: there it is the state before the first word on it, and means the same as Created.
	AssignmentLegacy AssignmentState = ""
	// AssignmentCreated means that the identity is wanted and not yet on the pod's machine.
	AssignmentCreated AssignmentState = "Created"
	// AssignmentAssigned means that the identity is on the pod's machine: the pod may use it.
	AssignmentAssigned AssignmentState = "Assigned"
	// AssignmentUnassigned means that the identity is off the machine again and the object is about to go.
	AssignmentUnassigned AssignmentState = "Unassigned"
)

// AzureAssignedIdentity records that one pod has one identity on one node. The controller writes it, nobody else. It is
// in the namespace of its pod, which owns it; objects of the predecessor are in that of the identity or in "default",
// and nobody owns them.
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

// AzureAssignedIdentitySpec says who has what where.
type AzureAssignedIdentitySpec struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// AzureIdentityRef is the whole AzureIdentity as it was when it was assigned.
	// +optional
	// +kubebuilder:validation:EmbeddedResource
	AzureIdentityRef *AzureIdentityCopy `json:"azureIdentityRef,omitempty"`

	// AzureBindingRef is the whole AzureIdentityBinding as it was when the identity was assigned.
	// +optional
	// +kubebuilder:validation:EmbeddedResource
	AzureBindingRef *AzureIdentityBindingCopy `json:"azureBindingRef,omitempty"`

	// Pod is the name of the pod.
	// +optional
	Pod string `json:"pod,omitempty"`

	// PodNamespace is the namespace of the pod.
	// +optional
	PodNamespace string `json:"podNamespace,omitempty"`

	// NodeName is the node that the pod runs on. The key is written in lower case.
	// +optional
	NodeName string `json:"nodename,omitempty"`

	// Deprecated: never had a meaning. Remove it.
	// +optional
	// +nullable
	Replicas *int32 `json:"replicas,omitempty"`
}

// AzureAssignedIdentityStatus says how far the assignment is.
type AzureAssignedIdentityStatus struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// Status is Created, Assigned or Unassigned; empty in objects written before there were states.
	// +optional
	Status AssignmentState `json:"status,omitempty"`

	// Message says why the state is still Created and what to do about it; empty if nothing is in the way.
	// +optional
	Message string `json:"message,omitempty"`

	// Deprecated: says nothing (it was always 1). Look at status.
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
