// Package links checks that a pod still has the address that the API server reports for it.
//
// # What it protects against
//
// It protects against a token for the wrong pod where only the address identifies a pod. After a reboot of the node, or with
// a network plugin that assigns an address again at once, the API server still reports an address as that of pod A while
// pod B already has it.
//
// # Why a confirmation is right
//
// The network plugin creates a network link for each sandbox of a pod, after the kubelet has acknowledged the pod and
// before the containers of the sandbox start. The kubelet reports addresses and start times of a pod together. A Table
// knows of each link the interval in which it was created. So the pod that is reported with the address of a link is
// behind that link only if the following holds:
//
//   - The link was created after the start time of the pod (status.startTime). Otherwise it is that of an older pod.
//   - The link was created before the newest start of a container of the pod. Otherwise another pod may have it.
//   - The kubelet reports times in seconds. If link and container are of the same second or interval, their order is
//     unknown. Then a list of the pods decides that started reportTime or later after the link was created: it must
//     report the pod with the address.
//
// While several pods are reported with one address, the pod that is confirmed has it, if all others are certainly older or
// newer than the link.
//
// Link, address and pod are compared on each request. The table is current then: the kernel queues an event for each change
// before the system call that changes it returns, and Confirm first processes the queue.
//
// # Why the source address of a connection can be trusted
//
// A connection is open only if its client received the answer of the node, which went to the link behind the address. A pod
// that forges a source address receives no answer. In addition the connection must have been opened on the interface to
// which the node sends packets for its address (Claim.Interface). A netfilter rule (rpfilter) could drop such packets
// earlier, but it would drop all packets of pods where a network plugin routes packets to a pod by another interface than
// the one on which it receives them, such as Cilium without routes for each endpoint. Here the refusal names its cause.
//
// # What is behind an address
//
// The link to which the node routes packets for the address, directly and not through a gateway. If that link is a bridge:
// the port of the bridge, by the neighbor table of the node and the forwarding table of the bridge. Only a veth or netkit
// link identifies a pod. Other links, such as the uplink of the node or the parent of macvlan links, lead to several pods,
// and so may a veth that has more than maxAddresses addresses. Behind these no address is confirmed.
//
// The network plugin sets routes, but pods with NET_RAW can claim an address of another pod on the same bridge, by ARP or by
// its MAC. A pod does not move to another link while its link exists. So an address that moves from one port of a bridge to
// another is claimed, not assigned, as long as the former link exists. The same holds for an address whose route moves to a
// link that is not newer than the former one. A claimed address identifies nobody, until it has been behind its former link
// again for claimTime.
//
// # Limits
//
//   - A container can start, lose its sandbox and its address, and another sandbox get the address, all within the second
//     in which the start times are equal, or while NMI is not running. The list that then decides is wrong if the kubelet
//     needs more than reportTime to report the loss.
//   - The first pod that claims an address on a bridge has it, until the pod that the address was assigned to is seen. The
//     start time of the pod still excludes the links of all pods that are older than the pod.
//   - Sandboxes whose packets reach the node through a link that several pods share cannot be confirmed. They need the
//     capture by cgroup (package bpf), or no verification.
package links
