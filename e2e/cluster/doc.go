// Package cluster starts a real two-node Kubernetes on one machine and takes it down again, whatever happens: the
// end-to-end tests and `make demo` stand on it.
//
// A "machine" of the cluster is a set of namespaces. Four network namespaces hang on one bridge: podid-cp (etcd, the
// API server, controller-manager, scheduler), podid-node1 and podid-node2 (containerd and a kubelet each, with mount,
// PID and host name namespaces of their own) and podid-azure (the stand-in for IMDS and Entra ID). No link leads from
// them to the machine's own network, and none has a route out.
//
// With PODIDENTITY_CLUSTER=N in the environment all names and folders have the number N, so that two clusters run side by
// side: podidN-cp and so on.
//
// What the package protects against:
//
//   - Packets in the wrong network. Nothing here sends a packet from the machine's own network namespace; whatever
//     enters a namespace first checks that it is not that one (see guard.go).
//   - Leftovers. All processes belong to one supervisor process (see supervisor.go) that ends when its owner ends,
//     even by SIGKILL, and kills by PID and start time only, so that a recycled PID is never hit. What a killed
//     supervisor leaves behind is found again by name and removed by the next start or stop.
//   - Changes to the machine. Nodes run on an overlay of the machine's root file system, and the kernel settings that
//     kubelets insist on are shielded (see nodeinit.go).
package cluster
