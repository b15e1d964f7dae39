// Package ledger records what MIC itself attached to one machine (a VM or VMSS), and the update in progress. A ledger
// is a ConfigMap in MIC's own namespace: AzureAssignedIdentity objects are in namespaces of users, who may delete
// them, and what MIC may detach must not depend on these objects.
//
// What the package protects against:
//
//   - Detaching what somebody else attached: MIC detaches only identities that the ledger contains.
//   - Identities that MIC attached and never detaches, because it has no record of them, for example after a crash: MIC
//     writes the ledger before it sends an update, so the ledger contains every identity that MIC may have attached.
//   - Updates of one machine by two MICs that both act as the leader: each write requires that the ledger still has the
//     resourceVersion that the MIC last read or wrote, or that no ledger exists yet. If both MICs write the ledger, the
//     write of the second MIC fails, and this MIC does not send its update.
package ledger
