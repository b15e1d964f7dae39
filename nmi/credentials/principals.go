package credentials

import (
	"context"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/token"
)

// Principals says what stands behind an identity that a pod may use: whom Azure is asked as, and what proves it.
type Principals struct {
	Authority    string // asked where an identity names none
	ByResourceID bool   // ask IMDS for managed identities by their resource ID
	Secrets      *Secrets
	Assertions   *Assertions
}

// ForPod returns the principals of an identity for a pod that may use it: one, or one for each tenant. Its error is of the
// kinds that a fetch has.
func (p *Principals) ForPod(ctx context.Context, pod *corev1.Pod, id identity.Identity) ([]token.Principal, error) {
	principals := p.FromIdentity(id)
	switch id.Kind {
	case identity.ServicePrincipalSecret, identity.ServicePrincipalCertificate:
		content, err := p.Secrets.forPod(ctx, principals[0].Secret, string(pod.UID))
		if err != nil {
			return nil, err
		}
		for i := range principals {
			principals[i].Revision = content.Revision
		}
	case identity.Federated:
		if err := p.Assertions.verify(ctx, pod); err != nil {
			return nil, err
		}
		principals[0].ServiceAccount = ServiceAccountOf(pod)
	}
	return principals, nil
}

// FromIdentity is what the AzureIdentity alone says about its principals. Neither the content of a Secret nor a
// ServiceAccount is part of that.
func (p *Principals) FromIdentity(id identity.Identity) []token.Principal {
	if id.Kind == identity.UserAssigned {
		if p.ByResourceID {
			return []token.Principal{token.ManagedKey("", "", strings.TrimSuffix(id.ResourceID, "/"), "").Principal}
		}
		return []token.Principal{token.ManagedKey(id.ClientID, "", "", "").Principal}
	}
	first := token.Principal{ClientID: strings.ToLower(id.ClientID), TenantID: strings.ToLower(id.TenantID), Authority: p.Authority}
	if id.ADEndpoint != "" {
		// The decision has found it well-formed.
		first.Authority, _ = identity.ParseAuthority(id.ADEndpoint)
	}
	switch id.Kind {
	case identity.ServicePrincipalSecret:
		first.Source = token.Secret
	case identity.ServicePrincipalCertificate:
		first.Source = token.Certificate
	case identity.Federated:
		first.Source = token.Federated
		return []token.Principal{first}
	}
	first.Secret = token.Ref{Namespace: id.SecretNamespace, Name: id.SecretName}
	all := []token.Principal{first}
	for _, tenant := range id.AuxiliaryTenantIDs {
		next := first
		next.TenantID = strings.ToLower(tenant)
		all = append(all, next)
	}
	return all
}

// Matches reports whether a principal is one of those that an identity stands for, or has stood for.
func (p *Principals) Matches(id identity.Identity, principal token.Principal) bool {
	principal.Revision, principal.ServiceAccount = "", token.Ref{}
	for _, candidate := range p.FromIdentity(id) {
		if candidate == principal {
			return true
		}
	}
	return false
}
