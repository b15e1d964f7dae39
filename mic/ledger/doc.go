// Package ledger records what MIC itself attached to one machine (a VM or VMSS), and the update in progress. A ledger is a
// ConfigMap in MIC's own namespace: AzureAssignedIdentity objects are in namespaces of users, who may delete them, and
// what MIC may detach must not depend on them.
//
// What the package protects against: MIC detaches what somebody else attached, because only entries of the ledger are ever
// detached; MIC leaves attached what it attached, because the ledger is written before the update is sent and so never has
// less than was done; and two MICs that both act as the leader update one machine, because each write requires the
// resourceVersion that was read.
package ledger
