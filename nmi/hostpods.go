package nmi

import (
	"context"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/cluster"
)

// exemptInterval is the shortest time between two updates of the exempt pods. When a node starts, many pods change at once.
const exemptInterval = 100 * time.Millisecond

// onHostPodsChanged makes exemptHostPods update the exempt pods. It does not block.
func (a *agent) onHostPodsChanged() {
	select {
	case a.hostPodsChanged <- struct{}{}:
	default: // an update is due already
	}
}

// exemptHostPods exempts the pods in the host network that NMI does not serve, until ctx ends. They reach IMDS also
// while NMI is not running. Until a new pod is exempt, NMI forwards its requests: a pod that NMI serves must never
// reach IMDS at its start.
//
// setExempt is the method SetExemptPods of package bpf.
func (a *agent) exemptHostPods(ctx context.Context, setExempt func(ctx context.Context, uids []string) error) {
	for a.objects.WaitSynced(ctx, time.Minute) != nil {
		if ctx.Err() != nil {
			return
		}
	}
	for {
		uids, err := a.exemptPods()
		if err == nil {
			err = setExempt(ctx, uids)
		}
		if err != nil && ctx.Err() == nil {
			a.metrics.SyncErrors.Inc()
			a.logs.Main.Error("exempting pods in the host network from the capture failed; NMI forwards their requests to IMDS, and retries", zap.Error(err))
			time.AfterFunc(a.cfg.SyncInterval, a.onHostPodsChanged)
		}
		select {
		case <-time.After(exemptInterval):
		case <-ctx.Done():
			return
		}
		select {
		case <-a.hostPodsChanged:
		case <-ctx.Done():
			return
		}
	}
}

// exemptPods returns the UIDs of the cgroups of the exempt pods.
func (a *agent) exemptPods() ([]string, error) {
	var uids []string
	own, _ := a.objects.PodByUID(a.cfg.PodUID)
	for _, pod := range a.objects.HostPods() {
		facts, err := a.objects.Facts(pod)
		if err != nil {
			return nil, err
		}
		if isNMI(pod, own) || identity.IsExcepted(a.cfg.rules(), cluster.IdentityPod(pod), facts) {
			uid := cluster.CgroupUID(pod)
			if other, known := a.objects.PodByUID(uid); known && other != pod {
				continue // annotations of the pod claim the UID of another pod
			}
			uids = append(uids, uid)
		}
	}
	return uids, nil
}

// isNMI reports whether the pod is NMI: own is the pod of this process, and during an upgrade another pod may run beside it.
func isNMI(pod, own *corev1.Pod) bool {
	return own != nil && pod.Namespace == own.Namespace && pod.Spec.ServiceAccountName == own.Spec.ServiceAccountName
}
