// Package v1 holds the four custom resources of group aadpodidentity.k8s.io: an Azure identity
// (AzureIdentity), the pods that may use it (AzureIdentityBinding), the assignment of an identity to a pod on a node
// (AzureAssignedIdentity) and the pods that get the identities of the VM itself (AzurePodIdentityException).
//
// The JSON has every field of AAD Pod Identity with the same name and type, because clusters migrate with their
// objects in place. The package protects clusters against objects that cannot work and against objects that cannot be
// read:
//
//   - The API server refuses an invalid object with a message that says what to write instead. The validation rules apply
//     to the spec of objects that users write. They do not apply to the copies inside AzureAssignedIdentity: a copy
//     repeats what is already stored, and refusing it would only prevent MIC from assigning the identity.
//   - An invalid object that was stored before the rules existed stays readable, its labels and finalizers can be
//     changed, and it can be deleted. The API server does not evaluate rules on spec again while spec is unchanged
//     (validation ratcheting). Ratcheting does not cover the rules on the whole object, so these refer to the old
//     object explicitly.
//   - Every field that MIC or NMI reads has a JSON type in the schema, in the copies too: a single object that does not
//     decode would make a client's whole list fail.
//
// The package imports only k8s.io/apimachinery and k8s.io/api/core/v1, so that NMI stays small.
//
// +kubebuilder:object:generate=true
// +groupName=aadpodidentity.k8s.io
package v1
