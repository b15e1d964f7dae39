// Package usage tracks which pod needs which identity on which machine (a VM or VMSS), and decides what must be attached and
// detached.
//
// A [Tracker] has two sides. Reconciles of pods set demands and ask for the status of an identity. Reconciles of
// machines record what Azure, the ledger and failures say, through a [Machine]. A demand for a missing identity
// requeues the machine. A new status of an identity requeues the pods that wait for it. [Decide] is the decision
// itself. It is pure.
//
// What the package protects against: an identity is detached although a pod needs it, or although MIC did not attach it;
// a pod waits for an event that never comes; and one identity that Azure refuses delays the others.
package usage
