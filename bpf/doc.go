// Package bpf captures the connections of a node's pods to the metadata service and identifies their owners, by cgroup.
// Its programs are attached to the cgroup of all pods. Package iptables does the same for packets, by address.
//
// # What it protects against
//
// An address identifies a pod only until another pod gets the address, and pods in the host network all have the address
// of the node. The cgroup of the process that calls connect is known to the kernel, and a pod cannot choose it. Where the
// data path of the network plugin bypasses netfilter, this package is the only capture.
//
// The following holds for pods with a network namespace of their own, and with Config.CaptureHostNetwork also for pods
// in the host network that are not exempt:
//
//   - connect to the metadata address and port is redirected to NMI's listener, for IPv4 sockets and for IPv6 sockets
//     with an IPv4-mapped address. connect to another port or with another protocol fails with EPERM. getpeername
//     returns the address that the client dialed.
//   - The SYN of such a connection gets a token, in a TCP option. When the connection is established, the token is
//     recorded with the cgroups of the owner. NMI reads the token from the SYN that it received, and then the record. See
//     [Capture.Owner].
//   - All other packets to the metadata address are dropped: datagrams, and packets of raw sockets and of sockets
//     that were connected before the installation. The call that sends them fails with EPERM.
//
// Programs, maps and eBPF links are pinned in bpffs. They stay in force while NMI starts, runs, is upgraded, hangs or
// has crashed, until Uninstall.
//
// # Why a record is right
//
// Only the kernel writes the token, into a SYN of the socket whose owner it records, and NMI receives this SYN. So the record
// with the token is that of the connection, also if network address translation in the pod has changed its address and port.
// A pod can send any SYN, but it does not know the token of another pod's connection: a token is a keyed hash (SipHash), and
// the key is secret. Address and port would not be enough: a pod can create network namespaces with the addresses of another
// pod and of NMI, and connect to itself there.
//
// The record is written when the client's kernel receives the SYN-ACK, which is before the server can accept the connection.
// NMI reads it once. A record older than a minute identifies nobody.
//
// # Limits
//
//   - Processes in a VM of their own (Kata Containers, gVisor with its own network stack) connect inside the VM. Their
//     packets have no record; package iptables captures them.
//   - A pod that may use AF_PACKET sockets (NET_RAW), or that may configure its own network to forward packets (NET_ADMIN),
//     can send packets that meet no cgroup hook. The drop in FORWARD of package iptables stops them, except where the data
//     path bypasses netfilter.
//   - If a flood of connections makes the kernel use SYN cookies, it keeps no SYN. NMI then closes the connection. One pod can
//     cause this for all pods of the node.
//   - Sockets of Multipath TCP in the host network have no mark. Without Config.CaptureHostNetwork their packets to the
//     metadata service are dropped.
//   - A privileged pod can evade the capture: it can leave its cgroup, enter the network namespace of the node, and
//     change programs and rules.
package bpf
