package azure

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// principal is a client of Entra ID: an application, or a user-assigned identity.
// A user-assigned identity can authenticate only with federated credentials.
type principal struct {
	Identity
	tenants      []string
	secrets      []AppSecret
	certificates []*x509.Certificate
	federated    []FederatedCredential
}

// addApp creates or replaces the application. To rotate a secret or certificate,
// a test calls addApp again. Credentials that addFederated added remain.
func (d *directory) addApp(a App) error {
	if err := validateIDs(Identity{ClientID: a.ClientID, ObjectID: a.ObjectID}); err != nil {
		return err
	}
	for _, t := range a.Tenants {
		if !isGUID(t) {
			return fmt.Errorf("tenant %q is not a GUID", t)
		}
	}
	for _, s := range a.Secrets {
		if s.Value == "" {
			return errors.New("a client secret of the application is empty")
		}
	}
	for _, c := range a.Certificates {
		if _, err := parseCertificate(c); err != nil {
			return err
		}
	}
	for _, f := range a.Federated {
		if err := validateFederated(f); err != nil {
			return err
		}
	}
	if len(a.Tenants) == 0 {
		a.Tenants = []string{d.tenant}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, id := range d.identities {
		if strings.EqualFold(id.ClientID, a.ClientID) {
			return fmt.Errorf("clientID %s already belongs to %s", a.ClientID, id.ResourceID)
		}
	}
	d.apps[strings.ToLower(a.ClientID)] = a
	return nil
}

// removeApp deletes the application and all its credentials.
func (d *directory) removeApp(clientID string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.apps, strings.ToLower(clientID))
	delete(d.federated, strings.ToLower(clientID))
}

// addFederated adds a federated credential to an application or a user-assigned
// identity. If an earlier call added a credential with the same issuer and subject,
// addFederated replaces that one.
func (d *directory) addFederated(clientID string, f FederatedCredential) error {
	if err := validateFederated(f); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	key := strings.ToLower(clientID)
	_, isApp := d.apps[key]
	_, isIdentity := d.findIdentity(clientID)
	if !isApp && !isIdentity {
		return fmt.Errorf("no application or user-assigned identity with clientID %q", clientID)
	}
	kept := slices.DeleteFunc(slices.Clone(d.federated[key]), func(have FederatedCredential) bool {
		return have.Issuer == f.Issuer && have.Subject == f.Subject
	})
	d.federated[key] = append(kept, f)
	return nil
}

// removeFederated removes a federated credential that addFederated added. It does
// nothing if there is none.
func (d *directory) removeFederated(clientID, issuer, subject string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	key := strings.ToLower(clientID)
	d.federated[key] = slices.DeleteFunc(slices.Clone(d.federated[key]), func(have FederatedCredential) bool {
		return have.Issuer == issuer && have.Subject == subject
	})
}

func validateFederated(f FederatedCredential) error {
	if f.Issuer == "" || f.Subject == "" || f.Audience == "" {
		return errors.New("a federated credential needs issuer, subject and audience")
	}
	if _, err := parseJWKS(f.JWKS); err != nil {
		return fmt.Errorf("key set of issuer %s: %w", f.Issuer, err)
	}
	return nil
}

func parseCertificate(text string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("a certificate of the application is not PEM of the type CERTIFICATE")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parsing a certificate of the application: %w", err)
	}
	return cert, nil
}

// principal returns the client with the client ID, and whether it exists.
func (d *directory) principal(clientID string) (principal, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	key := strings.ToLower(clientID)
	if a, ok := d.apps[key]; ok {
		p := principal{
			Identity: Identity{ClientID: a.ClientID, ObjectID: a.ObjectID},
			tenants:  a.Tenants, secrets: a.Secrets,
			federated: append(slices.Clone(a.Federated), d.federated[key]...),
		}
		for _, text := range a.Certificates {
			if cert, err := parseCertificate(text); err == nil { // validated in addApp
				p.certificates = append(p.certificates, cert)
			}
		}
		return p, true
	}
	for _, id := range d.identities {
		if strings.EqualFold(id.ClientID, clientID) {
			return principal{Identity: id, tenants: []string{id.TenantID}, federated: d.federated[key]}, true
		}
	}
	return principal{}, false
}

func (p principal) inTenant(tenant string) bool {
	return slices.ContainsFunc(p.tenants, func(t string) bool { return strings.EqualFold(t, tenant) })
}

// tenantExists reports whether the tenant is the home tenant or has an
// application or identity.
func (d *directory) tenantExists(tenant string) bool {
	if strings.EqualFold(tenant, d.tenant) {
		return true
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, a := range d.apps {
		if (principal{tenants: a.Tenants}).inTenant(tenant) {
			return true
		}
	}
	for _, id := range d.identities {
		if strings.EqualFold(id.TenantID, tenant) {
			return true
		}
	}
	return false
}
