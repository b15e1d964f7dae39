package credentials

import (
	"context"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/token"
)

// Config has the settings of Principals.
type Config struct {
	Authority    string // the Entra ID endpoint for identities that name none
	ByResourceID bool   // request tokens of managed identities by resource ID instead of client ID

	Secrets SecretSource
	// OnSecretChange is called with a revision that was replaced or deleted, or is no longer watched.
	OnSecretChange func(ref token.Ref, revision string)
	Tokens         TokenRequester
	Pods           PodGetter
}

// Principals builds the principals of identities.
type Principals struct {
	cfg        Config
	Secrets    *Secrets
	Assertions *Assertions
}

// New returns Principals whose watches of Secrets end with ctx.
func New(ctx context.Context, cfg Config) *Principals {
	return &Principals{
		cfg:        cfg,
		Secrets:    NewSecrets(ctx, cfg.Secrets, cfg.OnSecretChange),
		Assertions: NewAssertions(cfg.Tokens, cfg.Pods),
	}
}

// ForPod returns the principals of an identity for a pod. The caller must have decided that the pod may use the
// identity. A service principal (types 1 and 2) has one principal for each of its tenants, other identities have one.
// The error is a *token.Error, [token.ErrPodThrottled], the error of ctx, or an unexpected error of client-go.
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

// FromIdentity returns the principals as far as the AzureIdentity determines them: without the revision of the Secret
// and without the ServiceAccount of a pod.
func (p *Principals) FromIdentity(id identity.Identity) []token.Principal {
	if id.Kind == identity.UserAssigned {
		if p.cfg.ByResourceID {
			return []token.Principal{token.ManagedKey("", "", strings.TrimSuffix(id.ResourceID, "/"), "").Principal}
		}
		return []token.Principal{token.ManagedKey(id.ClientID, "", "", "").Principal}
	}
	first := token.Principal{ClientID: strings.ToLower(id.ClientID), TenantID: strings.ToLower(id.TenantID), Authority: p.cfg.Authority}
	if id.ADEndpoint != "" {
		// For an invalid endpoint the authority is empty. No token has such a principal, because the decision refuses
		// an identity with an invalid endpoint.
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

// Matches reports whether the principal belongs to the identity. It ignores the revision and the ServiceAccount of the
// principal.
func (p *Principals) Matches(id identity.Identity, principal token.Principal) bool {
	principal.Revision, principal.ServiceAccount = "", token.Ref{}
	for _, candidate := range p.FromIdentity(id) {
		if candidate == principal {
			return true
		}
	}
	return false
}

// Release drops the assertion of a pod, and stops the watches of those of its Secrets that no other pod uses.
func (p *Principals) Release(uid string) {
	p.Secrets.release(uid)
	p.Assertions.release(uid)
}

// PodUIDs returns the UIDs of the pods for which Secrets are watched or an assertion was requested, and that were not
// released. A UID may be in the result twice.
func (p *Principals) PodUIDs() []string {
	return append(p.Secrets.podUIDs(), p.Assertions.podUIDs()...)
}
