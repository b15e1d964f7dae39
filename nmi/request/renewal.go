package request

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/token"
)

// MayRenew reports whether a pod may still have tokens of a principal, so that they are worth renewing. It neither
// waits nor retriesUpstream anybody.
func (p *Processor) MayRenew(pod *corev1.Pod, principal token.Principal) bool {
	facts, err := p.Cluster.Facts(pod)
	if err != nil {
		return true // nothing is known against it
	}
	subject := cluster.IdentityPod(pod)
	bound, refusal := identity.Bound(p.Rules, subject, facts)
	if refusal == nil {
		for i := range bound {
			if p.Principals.Matches(bound[i], principal) && (p.Rules.Mode != identity.Standard || identity.Assigned(subject, &bound[i], facts.Assignments) == nil) {
				return true
			}
		}
	}
	return identity.IsExcepted(subject, facts) && principal.Source == token.Managed
}
