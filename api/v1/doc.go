// Package v1 holds the four custom resources of group aadpodidentity.k8s.io: who an Azure identity is
// (AzureIdentity), which pods may have it (AzureIdentityBinding), which pod on which node has it
// (AzureAssignedIdentity) and which pods are left alone (AzurePodIdentityException).
//
// The JSON is that of AAD Pod Identity, field for field, because clusters change over with their objects in place.
// What protects them:
//
//   - What could never have worked is refused at the API server with a sentence that says what to write instead.
//     The rules hang on the spec of an object that somebody writes. They do not hang on the copies inside
//     AzureAssignedIdentity: those repeat what is already stored, and refusing them would only stop the controller.
//   - An object that was stored before the rules came stays readable, can have its labels and finalizers changed, and
//     can be deleted. Rules on spec are not evaluated again while spec stays as it is (the API server's validation
//     ratcheting); the rules on the whole object look at the old object themselves.
//   - Everything that is read has a JSON type in the schema, in the copies too: one object that does not decode
//     would stop a client's whole list.
//
// The package imports nothing but k8s.io/apimachinery and k8s.io/api/core/v1, so that the node server stays small.
//
// +kubebuilder:object:generate=true
// +groupName=aadpodidentity.k8s.io
package v1
