// Package mic is the Managed Identity Controller of standard mode. It attaches the managed identities that pods need to
// the VM or VMSS of their nodes, detaches them when no pod there needs them any more, and records in
// AzureAssignedIdentity objects which pod has which identity.
//
// A machine is a VM or VMSS whose identities MIC changes. There are three work queues of keys: pods, machines and
// bindings. The reconcile of a pod derives from its bindings what the pod needs. Only this reconcile writes the
// AzureAssignedIdentity objects of the pod. Only the reconcile of a machine updates that machine in Azure, one update
// at a time; demands that come during an update are in the next one. Package usage connects the two: it keeps in memory
// which pod needs which identity on which machine. The work for an event depends on what the event affects, not on the
// size of the cluster.
//
// One assignment goes through these steps: an event requeues a pod (package cluster), the reconcile of the pod computes its
// desired assignments (package cluster) and its demands (package usage), which requeues the machine; the reconcile of the
// machine plans and sends one update (updater, packages ledger and azure); the new state of the machine requeues the pods
// that wait (package usage), and their reconcile writes the status (package cluster).
//
// What the package protects against:
//
//   - Detaching an identity that is in use. MIC detaches nothing before all objects have been loaded. It detaches only
//     what no living pod on any node of the machine needs, after a delay, and checks the pods once more before the
//     update.
//   - Detaching an identity that somebody else attached. MIC detaches only what the ledger of the machine says that MIC
//     attached. It writes the ledger before it sends an update. See package ledger.
//   - One identity that Azure refuses blocks others. MIC sets it aside and retries it separately; see [usage.Refusal].
//   - Two controllers update one machine. The ledger is written with its resourceVersion, so the second of two that
//     both act as the leader is stopped before it reaches Azure. The ledger also contains the update in progress; the
//     next leader waits for the end of this update instead of starting another.
package mic
