// Package cluster reads the cluster for NMI: it watches the pods of this node, all AzureIdentities, bindings and
// exceptions, and in standard mode the assignments on this node. It also sends NMI's other requests to the API server.
//
// It protects against decisions that are based on outdated or missing objects. A pod is identified by an address only
// if exactly one live pod of this node has it. StaleWatch names a watch, other than of a Secret, that is disconnected
// or has not caught up. While there is one, callers respond with an error that clients retry instead of a refusal,
// because the watch may not have received the object that is missing. Watches share one probe of the API server and
// reconnect together, within seconds after an outage.
//
// Caches hold only the fields that NMI reads, because NMI uses this memory on each node of the cluster. For the same
// reason the package uses client-go's informers with a scheme of a few types instead of a complete clientset.
package cluster
