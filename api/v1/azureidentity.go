package v1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// BehaviorAnnotation is an annotation of AzureIdentity that says which pods the identity can be bound to; see
	// BehaviorNamespaced.
	BehaviorAnnotation = "aadpodidentity.k8s.io/Behavior"

	// BehaviorNamespaced as the value of BehaviorAnnotation restricts the identity to pods of its own namespace.
	BehaviorNamespaced = "namespaced"
)

// IdentityType is the type of the Azure identity. It decides how NMI gets tokens.
type IdentityType int

const (
	// UserAssignedMSI is a user-assigned managed identity; it is the default.
	UserAssignedMSI IdentityType = 0
	// ServicePrincipal is a service principal that authenticates with a client secret.
	ServicePrincipal IdentityType = 1
	// ServicePrincipalCertificate is a service principal that authenticates with a certificate.
	ServicePrincipalCertificate IdentityType = 2
	// Federated is an application or a user-assigned managed identity that trusts tokens of this cluster.
	Federated IdentityType = 3
)

// AzureIdentity describes one identity in Azure.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:path=azureidentities,singular=azureidentity,scope=Namespaced
// +kubebuilder:metadata:annotations="api-approved.kubernetes.io=unapproved"
// +kubebuilder:printcolumn:name="Type",type=integer,JSONPath=`.spec.type`
// +kubebuilder:printcolumn:name="ClientID",type=string,JSONPath=`.spec.clientID`
// +kubebuilder:printcolumn:name="ResourceID",type=string,priority=1,JSONPath=`.spec.resourceID`
// +kubebuilder:printcolumn:name="TenantID",type=string,priority=1,JSONPath=`.spec.tenantID`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule=`has(self.spec) || (oldSelf.hasValue() && !has(oldSelf.value().spec))`,optionalOldSelf=true,message="spec is missing: write at least type, resourceID and clientID under it"
type AzureIdentity struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	// +kubebuilder:validation:XValidation:rule=`!has(self.type) || (self.type >= 0 && self.type <= 3)`,fieldPath=`.type`,message="write type 0 (user-assigned managed identity), 1 (service principal with a client secret), 2 (service principal with a certificate) or 3 (federated identity)"
	// +kubebuilder:validation:XValidation:rule=`(has(self.type) && self.type != 0) || (has(self.resourceID) && self.resourceID.matches('(?i)^/subscriptions/[^/\\s<>{}$%?#&]+/resourcegroups/[^/\\s<>{}$%?#&]+/providers/microsoft\\.managedidentity/userassignedidentities/[^/\\s<>{}$%?#&]+/?$'))`,fieldPath=`.resourceID`,message="type 0: the field resourceID (case-sensitive) is missing or not valid: write the whole ARM ID of a user-assigned managed identity and nothing else: /subscriptions/SUBSCRIPTION/resourcegroups/GROUP/providers/Microsoft.ManagedIdentity/userAssignedIdentities/NAME"
	// +kubebuilder:validation:XValidation:rule=`(has(self.type) && self.type != 0) || (has(self.clientID) && self.clientID.matches('^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$'))`,fieldPath=`.clientID`,message="type 0: the field clientID (case-sensitive) is missing or not valid: write the client ID of the managed identity, a GUID such as 01234567-89ab-cdef-0123-456789abcdef"
	// +kubebuilder:validation:XValidation:rule=`!has(self.type) || self.type < 1 || self.type > 2 || (has(self.tenantID) && self.tenantID.size() > 0)`,fieldPath=`.tenantID`,message="types 1 and 2 require the field tenantID (case-sensitive): the tenant of the service principal"
	// +kubebuilder:validation:XValidation:rule=`!has(self.type) || self.type < 1 || self.type > 2 || (has(self.clientID) && self.clientID.size() > 0)`,fieldPath=`.clientID`,message="types 1 and 2 require the field clientID (case-sensitive): the client ID of the service principal"
	// +kubebuilder:validation:XValidation:rule=`!has(self.type) || self.type < 1 || self.type > 2 || (has(self.clientPassword) && has(self.clientPassword.name) && self.clientPassword.name.size() > 0)`,fieldPath=`.clientPassword`,message="types 1 and 2 require the field clientPassword.name (case-sensitive): the name of the Secret that holds the client secret or the certificate; clientPassword.namespace may be left out, and is then the namespace of this AzureIdentity"
	// +kubebuilder:validation:XValidation:rule=`!has(self.type) || self.type != 3 || (has(self.tenantID) && self.tenantID.size() > 0)`,fieldPath=`.tenantID`,message="type 3 requires the field tenantID (case-sensitive): the tenant of the federated identity"
	// +kubebuilder:validation:XValidation:rule=`!has(self.type) || self.type != 3 || (has(self.clientID) && self.clientID.matches('^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$'))`,fieldPath=`.clientID`,message="type 3: the field clientID (case-sensitive) is missing or not valid: write the client ID of the federated identity, a GUID such as 01234567-89ab-cdef-0123-456789abcdef"
	Spec AzureIdentitySpec `json:"spec,omitempty"`

	// +optional
	Status AzureIdentityStatus `json:"status,omitempty"`
}

// AzureIdentityCopy is a copy of an AzureIdentity at the time when MIC assigned it. It is a separate type because the
// validation rules of AzureIdentity must not apply to copies. Its metadata is not an embedded field because the schema
// generator treats every type that embeds ObjectMeta as a resource.
type AzureIdentityCopy struct {
	metav1.TypeMeta `json:",inline"`

	// +optional
	Metadata metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec AzureIdentitySpec `json:"spec,omitempty"`

	// +optional
	Status AzureIdentityStatus `json:"status,omitempty"`
}

// Copy returns a copy of the identity for an AzureAssignedIdentity, without managedFields. It sets kind and apiVersion:
// the API server requires them in an embedded object, and an object from a typed client does not have them.
func (in *AzureIdentity) Copy() *AzureIdentityCopy {
	in = in.DeepCopy()
	in.ManagedFields = nil
	return &AzureIdentityCopy{
		TypeMeta: metav1.TypeMeta{APIVersion: GroupVersion.String(), Kind: "AzureIdentity"},
		Metadata: in.ObjectMeta,
		Spec:     in.Spec,
		Status:   in.Status,
	}
}

// AzureIdentity returns the copied identity.
func (in *AzureIdentityCopy) AzureIdentity() *AzureIdentity {
	in = in.DeepCopy()
	return &AzureIdentity{TypeMeta: in.TypeMeta, ObjectMeta: in.Metadata, Spec: in.Spec, Status: in.Status}
}

// AzureIdentitySpec identifies the Azure identity. Maximum lengths are far above what Azure allows. The API server needs
// them to estimate the cost of the validation rules.
type AzureIdentitySpec struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// Type of the identity: 0 user-assigned managed identity (the default), 1 service principal with a client secret,
	// 2 service principal with a certificate, 3 federated identity.
	// +optional
	Type IdentityType `json:"type,omitempty"`

	// ResourceID is the ARM ID of the user-assigned managed identity, for type 0. Case is ignored.
	// +optional
	// +kubebuilder:validation:MaxLength=2048
	ResourceID string `json:"resourceID,omitempty"`

	// ClientID of the managed identity, the service principal or the federated identity.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	ClientID string `json:"clientID,omitempty"`

	// ClientPassword names the Secret with the client secret (type 1, key clientSecret) or the certificate
	// (type 2, keys certificate and password). Its namespace may be left out; the default is that of the AzureIdentity.
	// +optional
	ClientPassword corev1.SecretReference `json:"clientPassword,omitempty,omitzero"`

	// TenantID of the service principal or the federated identity, for types 1, 2 and 3.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	TenantID string `json:"tenantID,omitempty"`

	// AuxiliaryTenantIDs are further tenants of a multi-tenant service principal, for type 1.
	// +optional
	// +nullable
	AuxiliaryTenantIDs []string `json:"auxiliaryTenantIDs,omitempty"`

	// Deprecated: never had a meaning. The application names the resource in its token request.
	// +optional
	ADResourceID string `json:"adResourceID,omitempty"`

	// ADEndpoint is the https URL of Entra ID for an identity of type 1, 2 or 3. The default is --authority-host of NMI,
	// which is https://login.microsoftonline.com/ unless it is set.
	// +optional
	ADEndpoint string `json:"adEndpoint,omitempty"`

	// Deprecated: never had a meaning. Remove it.
	// +optional
	// +nullable
	Replicas *int32 `json:"replicas,omitempty"`
}

// AzureIdentityStatus is never written.
type AzureIdentityStatus struct {
	// Deprecated: never had a meaning. Put labels and annotations into the object's own metadata.
	// +optional
	Metadata *metav1.ObjectMeta `json:"metadata,omitempty"`

	// Deprecated: never had a meaning. The AzureAssignedIdentity objects say which pods have the identity.
	// +optional
	AvailableReplicas int32 `json:"availableReplicas,omitempty"`
}

// AzureIdentityList is a list of AzureIdentity.
//
// +kubebuilder:object:root=true
type AzureIdentityList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []AzureIdentity `json:"items"`
}
