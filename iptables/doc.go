// Package iptables captures the instance metadata traffic of a node's pods and brings it to the node server.
//
// # What it protects against
//
// The metadata service of the machine (169.254.169.254) answers whoever asks, so a pod that reaches it can get a token of
// any identity attached to the node. This package makes sure that none does. From the moment Install has put its first
// rule in place until Uninstall is called, a packet that a pod sends to the metadata address is either redirected to the
// node server or dropped, at every instant: while the node server starts, runs, is upgraded, hangs or has crashed, and
// while the rules themselves are repaired.
//
// Three hooks hold that up, each with a chain of its own that no one else is meant to touch:
//
//   - filter FORWARD drops what is forwarded to the metadata address, any protocol and any port, and what is forwarded
//     from it. Pods' packets are forwarded; those of the node itself and of pods in its network are not, and stay as they
//     are. It stands first and falls last, so whatever happens to the redirection, nothing gets through. It also drops
//     what is forwarded to the listen address: should the link be lost, no captured request is routed off the node.
//   - filter INPUT drops what reaches the listen address without having been redirected by us: see below.
//   - nat PREROUTING redirects TCP to the metadata address and port to the listen address. The source stays the pod's,
//     and the source is how the node server knows who asks.
//
// Nothing here names an interface, so the network plugin of the cluster does not matter. Captured packets still pass the
// rest of INPUT: a firewall of the node, or a network policy on the pod's egress, sees them with the listen address as
// their destination and has to allow that. We do not overrule it.
//
// # Why a link of its own
//
// The node server listens on a link-local address of a link that exists only for it (LinkName). Redirecting to loopback
// instead would need route_localnet. With that set, everything bound to 127.0.0.0/8 on the node, and much is bound there
// because its author thought it private, opens to whoever can put a packet on the wire (the class of CVE-2020-8558); it
// must be set on interfaces that come and go with the pods; and someone has to remember what it was before. The link
// costs no sysctl, is a single thing to remove, and an address on it is never chosen as the source of other traffic.
//
// Linux answers for an address of any of its links on all of them. A neighbour could therefore route to the listen
// address through the node, or a pod dial it directly. The INPUT chain admits only connections which conntrack knows to
// have been sent to the metadata address and been redirected, and those from the node itself, as probes are.
//
// # What remains
//
//   - A host on the node's own network segment can address a frame with destination 169.254.169.254 to the node. It is
//     captured like a pod's, and the node server sees the host's address, which is no pod of this node: it is refused.
//     With a pod's address as its forged source the answer goes to that pod, so no TCP handshake completes.
//   - A datapath that lets pods' packets leave the node around netfilter (eBPF host routing, a bridge with
//     net.bridge.bridge-nf-call-iptables off, a NIC handed to the pod) is out of reach of any rule here.
//   - Processes in the network namespace of the node are not captured. Who may run there is up to admission.
//   - The metadata service speaks IPv4 only, and so does this package.
//
// # How rules change without a gap
//
// Chains come in two generations, A and B. A repair never edits the chain in force: it fills the other one, puts a jump
// to it at position 1, looks at the result, and only then takes the old jump and chain away. A crash at any point leaves
// a capture that holds, and leftovers that the next Sync removes.
package iptables
