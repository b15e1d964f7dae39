// Package usage tracks which pod needs which identity on which machine (a VM or VMSS), and plans what to attach and
// detach.
//
// Reconciles of pods set the demands of pods in a [Tracker] and ask it for the status of an identity. Reconciles of
// machines record, through a [Machine], which identities are attached, which are in the ledger, and what failed. A
// demand for a missing identity requeues the machine. When the status of an identity changes, the Tracker requeues the
// pods that wait for this. [Decide] computes the plan for a machine. It is a pure function.
//
// What the package protects against: an identity is detached although a pod needs it, or although MIC did not attach
// it; a pod waits for an event that never comes; and one identity that Azure refuses delays the others.
package usage
