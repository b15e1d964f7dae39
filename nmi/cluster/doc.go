// Package cluster reads the cluster for NMI: it watches the pods of this node, all AzureIdentities, bindings and
// exceptions, and in standard mode the assignments on this node. It also sends NMI's other requests to the API server.
//
// It protects against decisions that are based on outdated or missing objects. An address identifies a pod only if
// exactly one live pod of this node has that address. While a watch is disconnected or has not caught up, an object
// that seems to be missing may exist. Client.StaleWatch names such a watch. While it names one, NMI responds with an
// error that clients retry instead of a refusal, which they do not retry. StaleWatch ignores watches of Secrets. All
// watches share one probe of the API server and reconnect together, within seconds after an outage.
//
// Caches hold only the fields that NMI reads, because NMI uses this memory on each node of the cluster. For the same
// reason the package uses client-go's informers with a scheme of a few types instead of a complete clientset.
package cluster
