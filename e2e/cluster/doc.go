// Package cluster starts and removes a real two-node Kubernetes cluster on one computer, the host. The end-to-end
// tests, `make demo` and `make bench` run on it.
//
// Each computer of the cluster is a set of namespaces. Four network namespaces are connected by one bridge: podid-cp
// (etcd, API server, controller-manager, scheduler), podid-node1 and podid-node2 (containerd and a kubelet each, with
// mount, PID and host name namespaces of their own) and podid-azure (the fake IMDS, Entra ID and ARM). No link connects
// these namespaces with the host's own network, and none of them has a default route.
//
// Clusters can run side by side: with PODIDENTITY_CLUSTER=N in the environment, the names of the run folder, the
// network namespaces, the bridge and the nodes' cgroups contain the number N: podidN-cp, for example. All clusters
// share the cache folder.
//
// What the package protects against:
//
//   - Packets in the wrong network. The cluster sends no packet from the host's own network namespace; only apt-get,
//     npm and the Go toolchain use the host's network, for downloads. Code that enters a network namespace first checks
//     that the namespace is not the host's (see guard.go).
//   - Leftovers. All processes are descendants of one supervisor process (see supervisor.go). The owner is the process
//     that started the cluster. When the owner ends, even by SIGKILL, the supervisor stops the cluster, unless the
//     owner has called Detach. A recorded process is killed only if its PID and start time match, so that no other
//     process with a reused PID is killed. A process that is not recorded is killed if it is in a cgroup of the
//     cluster. The next start or stop removes what a killed supervisor left.
//   - Changes to the host. Each node runs on an overlay of the host's root file system. In place of the kernel settings
//     that a kubelet would change, the node sees files with the expected values (see nodeinit.go).
package cluster
