// Package azure is a fake Azure for end-to-end tests, the demo and the
// benchmarks: the Instance Metadata Service (IMDS), Entra ID and the part of
// Azure Resource Manager (ARM) that attaches identities to machines.
//
// It protects against tests that pass only because the fake is stricter than Azure.
// The fake IMDS is as permissive as the real IMDS is known to be: in a path, it reads a
// backslash as a slash, collapses doubled slashes and ignores the case of /metadata. If
// NMI wrongly forwards a token request with such a path, or if a pod's request reaches
// the fake IMDS without NMI, the fake IMDS responds with a token, as the real IMDS would.
// The fake IMDS distinguishes nodes and pods by their source address, so its log and its
// counts show which requests came from a pod. Tokens are real JWTs with the identity in
// their claims, signed with a key of the fake Azure. So a test can check that a pod got
// a token for its own identity and for no other.
//
// Run serves until its context ends. A Client controls the fake Azure over a unix
// socket, which also works from another network namespace: it registers identities
// and applications, sets the fault switches, and reads the request log. A node gets
// tokens for a user-assigned identity from the fake IMDS if the Client attached the
// identity to that node, or if the identity is attached to the node's virtual machine
// or scale set in the fake ARM. The fake ARM can also run alone, in the process of a
// test: see NewARM.
//
// The path of a token request to the fake IMDS or Entra ID: service (log, faults) -> imds
// or entra (the protocol) -> directory (identities and where they are attached)
// -> issuer (the token).
package azure
