// Package mic is the Managed Identity Controller of standard mode. It attaches the managed identities that pods need to
// the virtual machine or scale set beneath their nodes, detaches them when the last pod that needs one there is gone,
// and records in AzureAssignedIdentity objects who has what.
//
// Work is keyed. One queue has pods: from a pod's bindings follows what it wants, and its reconcile alone writes its
// AzureAssignedIdentity objects. The other has machines (the ARM resource beneath nodes): its reconcile alone talks to
// Azure about that machine, one update at a time, and what comes in meanwhile is in the next. Between the two stands
// the [fleet], which knows in memory who wants what where. An event costs work for what it touches; nothing looks at
// the whole cluster.
//
// What the package protects against:
//
//   - An identity that is in use is detached. Nothing is detached before all objects have been loaded; only what no
//     living pod on any node of the machine wants, after a delay; and the pods are looked through once more before.
//   - An identity that somebody else attached is detached. Only what the ledger of the machine says that MIC attached
//     itself is ever removed, and the ledger is written before Azure is asked. See package ledger.
//   - One identity that Azure refuses holds up others. It is set aside by itself; see [refusal].
//   - Two controllers work on one machine. The ledger is written with its version, so the second of two that believe
//     that they lead is stopped before it reaches Azure; and it holds the operation that is under way, which the next
//     leader waits for instead of beginning another.
package mic
