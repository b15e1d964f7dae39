// Package mic is the Managed Identity Controller of standard mode. It attaches the managed identities that pods need to
// the VM or VMSS of their nodes. When no pod there needs an identity any more that MIC attached, MIC detaches it. MIC
// records in AzureAssignedIdentity objects which pod has which identity.
//
// A machine is a VM or VMSS whose identities MIC changes. There are three work queues of keys: pods, machines and
// bindings. The reconcile of a pod derives from its bindings what the pod needs. Only this reconcile writes the
// AzureAssignedIdentity objects of the pod. Only the reconcile of a machine updates that machine in Azure, one update
// at a time; demands that come during an update are in the next one. Package usage connects the reconciles of pods with
// those of machines: it keeps in memory which pod needs which identity on which machine. The work for an event depends
// on what the event affects, not on the size of the cluster.
//
// One assignment goes through these steps: an event requeues a pod (package cluster). The reconcile of the pod
// computes its desired assignments (package cluster) and records its demands (package usage), which requeues the
// machine. The reconcile of the machine plans and sends one update (updater, packages ledger and azure). The new
// state of the machine requeues the pods that wait (package usage), and their reconciles write the status (package
// cluster).
//
// What the package protects against:
//
//   - Detaching an identity that is in use. MIC detaches nothing before all objects have been loaded. Except for an
//     uninstall, it detaches only what no living pod on any node of the machine needs, after a delay, and checks the
//     pods once more before the update.
//   - Detaching an identity that somebody else attached. MIC detaches only what the ledger of the machine says that MIC
//     attached. It writes the ledger before it sends an update. See package ledger.
//   - Blocking all identities of a machine because Azure refuses one. MIC sets the refused identity aside and retries
//     it after a delay; see [usage.Refusal].
//   - Updates of one machine by two MICs that both act as the leader. A MIC writes the ledger before each update. The
//     write fails if the other MIC has changed the ledger since this MIC last read or wrote it. So only the MIC that
//     writes first sends its update. The ledger also contains the update in progress. Before the next leader sends an
//     update, it waits for the end of this one; maxUpdateTime limits the wait.
package mic
