// Package iptables captures the instance metadata traffic of a node's pods and redirects it to NMI, which this package
// calls the node server.
//
// # What it protects against
//
// The metadata service of the VM (169.254.169.254) responds to every client, so a pod that reaches it can get a token
// of any identity attached to the VM. This package prevents that. From the first jump that Install inserts until
// Uninstall, a packet that a pod sends to the metadata address is either redirected to the node server or dropped:
// while the node server starts, runs, is upgraded, hangs or has crashed, and while Sync repairs the rules. If another
// program removes or bypasses the rules, packets may reach the metadata service until the next Sync.
//
// There are three hooks, each with chains of its own that no other program should change:
//
//   - filter FORWARD drops what is forwarded to the metadata address, with any protocol and any port, and what is
//     forwarded from it. Packets of pods are forwarded. Packets of the node itself and of pods with hostNetwork are not
//     forwarded, so these rules do not affect them. These rules are installed first and removed last, so they apply
//     whatever happens to the redirection. They also drop what is forwarded to the listen address, so that no captured
//     request is routed off the node if the link is deleted.
//   - filter INPUT drops packets to the listen address, except packets of redirected connections, packets of the node
//     itself, and packets to the port of package bpf (Config.IdentifiedPort). The next section says why.
//   - nat PREROUTING redirects TCP packets for the metadata address and port to the listen address and port. The source
//     address stays that of the pod; the node server identifies the pod by the source address.
//
// The rules name no interface except lo, so they do not depend on the interface names of the network plugin. Captured
// packets still pass the other rules of INPUT: a firewall of the node, or a network policy on the pod's egress, sees
// them with the listen address as their destination and has to allow that. This package does not bypass such rules.
//
// # Why a link of its own
//
// The node server listens on a link-local address of a link that exists only for it (package nodelink). Redirecting to loopback
// instead would require the sysctl route_localnet. That setting exposes everything bound to 127.0.0.0/8 on the node,
// which programs consider private, to anyone who can send packets to the node (the class of CVE-2020-8558). It would
// have to be set on interfaces that are created and deleted with the pods, and its previous value would have to be
// restored. The link needs no sysctl and is easy to remove, and the kernel never chooses its address as the source of
// other traffic.
//
// Linux accepts packets to the address of one link on every link. A neighbor could therefore route packets to the
// listen address through the node, or a pod could connect to it directly. The INPUT chain admits only connections that,
// according to conntrack, were sent to the metadata address and redirected, those from the node itself, such as
// probes, and connections to the port of package bpf, which NMI closes if they have no record. Anyone can reach that
// port, also a host on the node's network segment.
//
// # Limits
//
//   - A host on the node's network segment can send the node a packet for 169.254.169.254. The packet is captured like
//     one of a pod. The node server sees the host's address. No pod of this node has that address, so the server
//     refuses the request. If the host forges a pod's source address, the response goes to that pod, so no TCP
//     handshake completes.
//   - A data path that lets packets of pods leave the node without passing netfilter (eBPF host routing, a bridge with
//     net.bridge.bridge-nf-call-iptables off, a NIC assigned to the pod) cannot be controlled by iptables rules.
//   - Processes in the network namespace of the node are not captured. Admission control decides who may run there.
//   - The metadata service uses IPv4 only, and so does this package.
//
// # How rules change without a gap
//
// Each hook has two chains of NMI, the generations A and B. The hook jumps to the active one. A repair never changes
// the active chain. It fills the other chain, inserts a jump to it at position 1, checks the result, and only then
// removes the old jump and chain. After a crash at any point the capture is at least as complete as before the repair,
// and the next Sync finishes the repair. generationToBuild describes the exception.
package iptables
