package request

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/token"
)

// Allowed reports whether a pod may still have tokens of a principal, so that they are worth renewing. It neither
// waits nor asks anybody.
func (t *Tokens) Allowed(pod *corev1.Pod, principal token.Principal) bool {
	facts, err := t.Cluster.Facts(pod)
	if err != nil {
		return true // nothing is known against it
	}
	subject := cluster.Subject(pod)
	bound, refusal := identity.Bound(t.Rules, subject, facts)
	if refusal == nil {
		for i := range bound {
			if t.Principals.Stands(bound[i], principal) && (t.Rules.Mode != identity.Standard || identity.Assigned(subject, &bound[i], facts.Assignments) == nil) {
				return true
			}
		}
	}
	return identity.IsExcepted(subject, facts) && principal.Source == token.Managed
}
