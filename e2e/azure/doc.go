// Package azure is a fake Azure for end-to-end tests, the demo and the
// benchmarks: the Instance Metadata Service (IMDS), Entra ID and the part of
// Azure Resource Manager (ARM) that attaches identities to machines.
//
// It protects against tests that pass because the fake is stricter than Azure.
// It is as permissive as the real IMDS is known to be (it reads a backslash as
// a slash, collapses doubled slashes, ignores the case of /metadata): a request
// that bypasses NMI gets a token here. The fake distinguishes nodes and pods by
// their source address: its log and its counts show that a pod sent such a
// request. Tokens are real JWTs, signed with the fake's own key: a test can check
// that a pod got a token for its own identity and for no other.
//
// Run serves until its context ends. A Client controls it over a unix socket,
// which also works from another network namespace: it registers identities and
// applications, sets the fault switches, and reads the request log. IMDS issues
// tokens for a user-assigned identity on a node if the Client attached the
// identity to that node, or if ARM has it attached to the node's virtual machine
// or scale set. ARM can also run alone, in the process of a test: see NewARM.
//
// The path of a token request to IMDS or Entra ID: service (log, faults) -> imds
// or entra (the protocol) -> directory (identities and where they are attached)
// -> issuer (the token).
package azure
