// Package cluster starts a real two-node Kubernetes cluster on one computer, the host, and removes it again, whatever
// happens. The end-to-end tests, `make demo` and `make bench` run on it.
//
// Each computer of the cluster is a set of namespaces. Four network namespaces are connected by one bridge: podid-cp
// (etcd, API server, controller-manager, scheduler), podid-node1 and podid-node2 (containerd and a kubelet each, with
// mount, PID and host name namespaces of their own) and podid-azure (the fake IMDS, Entra ID and ARM). No link leads from
// them to the host's own network, and none has a route out.
//
// Clusters can run side by side: with PODIDENTITY_CLUSTER=N in the environment, the run folder and the names of all
// namespaces, links and cgroups contain the number N, such as podidN-cp. All clusters share the cache folder.
//
// What the package protects against:
//
//   - Packets in the wrong network. The cluster sends no packet from the host's own network namespace; only apt-get, npm
//     and the Go toolchain use that network, for downloads. Code that enters a network namespace first checks that the
//     namespace is not the host's (see guard.go).
//   - Leftovers. All processes belong to one supervisor process (see supervisor.go). It ends when its owner ends, even by
//     SIGKILL, unless the owner has detached. A recorded process is killed only if its PID and start time match, so that a
//     reused PID is never hit; other processes are killed if they are in a cgroup of the cluster. The next start or stop
//     finds by name what a killed supervisor left, and removes it.
//   - Changes to the host. Nodes run on an overlay of the host's root file system, and the node sees substitutes of the
//     kernel settings that kubelets insist on (see nodeinit.go).
package cluster
