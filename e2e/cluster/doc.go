// Package cluster starts a real two-node Kubernetes cluster on one computer, the host, and removes it again, whatever
// happens. The end-to-end tests, `make demo` and `make bench` run on it.
//
// Each computer of the cluster is a set of namespaces. Four network namespaces are connected by one bridge: podid-cp
// (etcd, API server, controller-manager, scheduler), podid-node1 and podid-node2 (containerd and a kubelet each, with
// mount, PID and host name namespaces of their own) and podid-azure (the fake IMDS, Entra ID and ARM). No link leads from
// them to the host's own network, and none has a route out.
//
// Clusters can run side by side: with PODIDENTITY_CLUSTER=N in the environment all names and folders contain the number
// N, such as podidN-cp.
//
// What the package protects against:
//
//   - Packets in the wrong network. Nothing here sends a packet from the host's own network namespace; whatever
//     enters a namespace first checks that it is not that one (see guard.go).
//   - Leftovers. All processes belong to one supervisor process (see supervisor.go) that ends when its owner ends,
//     even by SIGKILL, and kills by PID and start time only, so that a reused PID is never hit. The next start or
//     stop finds by name what a killed supervisor left, and removes it.
//   - Changes to the host. Nodes run on an overlay of the host's root file system, and the node sees substitutes of the
//     kernel settings that kubelets insist on (see nodeinit.go).
package cluster
