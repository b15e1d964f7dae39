package request

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/limit"
	"github.com/podidentity/podidentity/nmi/links"
)

// Caller is who opened a connection.
type Caller struct {
	Address netip.Addr
	// Interface is the index of the network interface on which the connection was opened: 0 if nobody asked, -1 if the
	// kernel does not say.
	Interface int
	// PodUID and ContainerID are what the kernel recorded of the process that opened the connection. They are empty if it
	// recorded nothing. ContainerID may be empty although PodUID is not.
	PodUID, ContainerID string
}

// Source returns whose connections and requests count together.
func (c Caller) Source() limit.Source {
	if c.PodUID != "" {
		return limit.Source{PodUID: c.PodUID}
	}
	return limit.Source{Address: c.Address}
}

// PodVerification says how NMI finds the pod of a caller.
type PodVerification string

// Values of PodVerification.
const (
	VerifyAuto     PodVerification = "auto"     // by cgroup if the kernel recorded it, otherwise by address
	VerifyRequired PodVerification = "required" // only by cgroup
	VerifyOff      PodVerification = "off"      // only by address
)

// Verification is how NMI found the pod of a request, for the audit log.
type Verification string

// Values of Verification.
const (
	VerifiedByCgroup  Verification = "cgroup"
	VerifiedByAddress Verification = "address"
)

// findCaller returns the pod that opened the connection.
func (p *Processor) findCaller(ctx context.Context, rec *Record, caller Caller) (*corev1.Pod, *metadata.Error) {
	if caller.PodUID == "" || p.PodVerification == VerifyOff {
		if p.PodVerification == VerifyRequired {
			return nil, metadata.Forbidden(identity.PodUnverified, fmt.Sprintf("The kernel has no record of the pod that opened this connection from address %s, and --pod-verification=required does not trust the address alone", caller.Address))
		}
		if p.PodVerification == VerifyAuto {
			rec.Verified = VerifiedByAddress
		}
		return p.findPod(ctx, podQuery{address: caller.Address, confirmer: p.confirmer(caller)})
	}
	rec.Verified = VerifiedByCgroup
	pod, refusal := p.findPod(ctx, podQuery{uid: caller.PodUID})
	if refusal == nil && p.OnMoved != nil && !cluster.HasAddress(pod, caller.Address) {
		p.OnMoved(caller, pod)
	}
	return pod, refusal
}

// confirmer returns what confirms the address of the caller, or nil if addresses are trusted as they are.
func (p *Processor) confirmer(caller Caller) cluster.Confirmer {
	if p.PodVerification == VerifyOff || p.Confirmer == nil {
		return nil
	}
	return confirmerOnInterface{p.Confirmer, caller.Interface}
}

// confirmerOnInterface is a Confirmer for connections that were opened on the interface with the index.
type confirmerOnInterface struct {
	cluster.Confirmer
	index int
}

// Confirm implements cluster.Confirmer.
func (c confirmerOnInterface) Confirm(claim links.Claim) *links.Unconfirmed {
	claim.Interface = c.index
	return c.Confirmer.Confirm(claim)
}

// confirmAgain returns a refusal if the address of the caller moved while its request was processed. An established
// connection stays with its socket, but the node sends the response to the address. A pod that has received the address
// could read the token with a packet socket. The move between this check and the last packet remains.
func (p *Processor) confirmAgain(caller Caller, pod *corev1.Pod) *metadata.Error {
	confirmer := p.confirmer(caller)
	if confirmer == nil {
		return nil
	}
	if reason := confirmer.Confirm(cluster.Claim(caller.Address, p.Cluster.Latest(pod), time.Time{})); reason != nil {
		return p.unconfirmed(caller.Address, pod, reason)
	}
	return nil
}

// unconfirmed returns the refusal of a request from an address that is not confirmed, and counts it.
func (p *Processor) unconfirmed(address netip.Addr, pod *corev1.Pod, reason *links.Unconfirmed) *metadata.Error {
	p.Metrics.CountUnconfirmed(string(reason.Cause))
	return metadata.Unavailable(identity.PodUnconfirmed, fmt.Sprintf("The API server reports address %s as that of pod %s/%s, but NMI cannot confirm it (%s): %s", address, pod.Namespace, pod.Name, reason.Cause, reason), defaultRetryAfter)
}
