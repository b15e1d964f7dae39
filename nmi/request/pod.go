package request

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/cluster"
)

// podQuery is what findPod searches for: an address, a UID, or a name (namespace/name).
type podQuery struct {
	address   netip.Addr
	confirmer cluster.Confirmer // of address; may be nil
	uid       string
	name      string
}

func (q podQuery) String() string {
	switch {
	case q.name != "":
		return "name " + q.name
	case q.uid != "":
		return "UID " + q.uid
	}
	return "address " + q.address.String()
}

// findPod returns the pod. It waits for the caches to sync, at most for PodLookupTimeout, and then for the pod to
// appear, at most for the timeout of the PodFinder p.Pods.
func (p *Processor) findPod(ctx context.Context, query podQuery) (*corev1.Pod, *metadata.Error) {
	start := time.Now()
	defer func() { p.Metrics.PodLookups.Observe(time.Since(start).Seconds()) }()
	if err := p.Cluster.WaitSynced(ctx, p.PodLookupTimeout); err != nil {
		return nil, metadata.Unavailable(identity.NotReady, "NMI has not loaded the cluster's objects yet: "+err.Error(), defaultRetryAfter)
	}
	var pod *corev1.Pod
	var err error
	switch {
	case query.name != "":
		pod, err = p.Pods.FindByName(ctx, query.name)
	case query.uid != "":
		pod, err = p.Pods.FindByUID(ctx, query.uid)
	default:
		pod, err = p.Pods.FindByAddress(ctx, query.address, query.confirmer)
	}
	var notConfirmed *cluster.UnconfirmedError
	switch {
	case err == nil:
		return pod, nil
	case errors.Is(err, cluster.ErrPodAmbiguous):
		return nil, metadata.Unavailable(identity.PodAmbiguous, fmt.Sprintf("The API server reports several pods of this node with the %s; none of them gets a token until it reports only one, or NMI can confirm which of them has it", query), defaultRetryAfter)
	case errors.As(err, &notConfirmed):
		return nil, p.unconfirmed(query.address, notConfirmed.Pod, notConfirmed.Reason)
	default:
		return nil, metadata.Unavailable(identity.PodUnknown, fmt.Sprintf("NMI knows no live pod of this node with the %s", query), defaultRetryAfter)
	}
}
