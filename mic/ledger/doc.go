// Package ledger records what MIC itself attached to one machine (a VM or VMSS), and the update in progress. A ledger is a
// ConfigMap in MIC's own namespace: AzureAssignedIdentity objects are in namespaces of users, who may delete them, and
// what MIC may detach must not depend on them.
//
// What the package protects against:
//
//   - MIC detaches an identity that somebody else attached. MIC detaches only identities that the ledger contains.
//   - MIC never detaches an identity that MIC attached. MIC writes the ledger before it sends an update, so the ledger
//     contains every identity that MIC may have attached.
//   - Two MICs that both act as the leader update one machine. Each write of a ledger requires the resourceVersion that
//     MIC read, so the write of the second MIC fails before it sends an update.
package ledger
