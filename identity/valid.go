package identity

import (
	"fmt"
	"net/url"
	"strings"
)

// Problem returns why no token can be requested for the identity, or "" if it is valid. The validation rules of the CRD
// do not make this check unnecessary: they do not check adEndpoint and the form of tenants, and do not apply to objects
// that AAD Pod Identity stored. Problem is called for every request, so it uses no regular expressions.
func (i Identity) Problem() string {
	switch i.Kind {
	case UserAssigned:
		if !isGUID(i.ClientID) {
			return fmt.Sprintf("spec.clientID %q is not a GUID; write the client ID of the managed identity", i.ClientID)
		}
		if !isUserAssignedID(i.ResourceID) {
			return fmt.Sprintf("spec.resourceID %q is not the resource ID of a user-assigned managed identity; write /subscriptions/<subscription>/resourcegroups/<group>/providers/Microsoft.ManagedIdentity/userAssignedIdentities/<name>", i.ResourceID)
		}
	case ServicePrincipalSecret, ServicePrincipalCertificate, Federated:
		return i.entraProblem()
	default:
		return fmt.Sprintf("spec.type %d is unknown; write 0, 1, 2 or 3", i.Kind)
	}
	return ""
}

// maxAuxiliaryTenants bounds how many tokens one request needs: one for the home tenant and one for each auxiliary
// tenant.
const maxAuxiliaryTenants = 10

// entraProblem is Problem for the types that request tokens from Entra ID directly.
func (i Identity) entraProblem() string {
	if i.ClientID == "" || i.TenantID == "" {
		return fmt.Sprintf("spec.type %d requires both spec.clientID and spec.tenantID; write what is missing", i.Kind)
	}
	if i.Kind == Federated && !isGUID(i.ClientID) {
		return fmt.Sprintf("spec.clientID %q is not a GUID; write the client ID of the application or managed identity", i.ClientID)
	}
	if i.Kind != Federated && i.SecretName == "" {
		return "spec.clientPassword.name is missing; write the name of the Secret with the client secret or the certificate"
	}
	for _, tenant := range append([]string{i.TenantID}, i.AuxiliaryTenantIDs...) {
		if !isTenant(tenant) {
			return fmt.Sprintf("tenant %q is neither a GUID nor a domain name; write the ID of the tenant in spec.tenantID or spec.auxiliaryTenantIDs", tenant)
		}
	}
	if len(i.AuxiliaryTenantIDs) > maxAuxiliaryTenants {
		return fmt.Sprintf("spec.auxiliaryTenantIDs has %d tenants; at most %d are supported", len(i.AuxiliaryTenantIDs), maxAuxiliaryTenants)
	}
	if i.ADEndpoint != "" {
		if _, err := ParseAuthority(i.ADEndpoint); err != nil {
			return "spec.adEndpoint: " + err.Error()
		}
	}
	return ""
}

// isTenant reports whether s is a GUID or a domain name: letters, digits, dots and hyphens. "common", "organizations"
// and "consumers" are no tenants and have no service principals.
func isTenant(s string) bool {
	if s == "" || len(s) > 253 || strings.EqualFold(s, "common") || strings.EqualFold(s, "organizations") || strings.EqualFold(s, "consumers") {
		return false
	}
	if strings.HasPrefix(s, ".") || strings.HasSuffix(s, ".") || strings.Contains(s, "..") {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '.' || c == '-') {
			return false
		}
	}
	return true
}

// ParseAuthority parses the address of a token service and returns https://host or https://host:port, in lower case. An
// address of Entra ID has no other parts.
func ParseAuthority(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil {
		return "", fmt.Errorf("%q is not a URL; write a URL such as https://login.microsoftonline.com/", s)
	}
	if u.Scheme != "https" {
		return "", fmt.Errorf("%q does not begin with https://, which is required because secrets are sent there", s)
	}
	if u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" || u.Opaque != "" {
		return "", fmt.Errorf("%q is not a URL of only scheme and host; write a URL such as https://login.microsoftonline.com/, and the tenant in spec.tenantID", s)
	}
	return "https://" + strings.ToLower(u.Host), nil
}

// isGUID reports whether s has the form 8-4-4-4-12 of hexadecimal digits.
func isGUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case '0' <= c && c <= '9', 'a' <= c && c <= 'f', 'A' <= c && c <= 'F':
		default:
			return false
		}
	}
	return true
}

// userAssignedForm has the segments of the resource ID of a user-assigned managed identity; "" matches any name that is
// not empty. Azure ignores the case of IDs.
var userAssignedForm = [...]string{"subscriptions", "", "resourcegroups", "", "providers", "Microsoft.ManagedIdentity", "userAssignedIdentities", ""}

func isUserAssignedID(id string) bool {
	rest, ok := strings.CutPrefix(strings.TrimSuffix(id, "/"), "/")
	if !ok {
		return false
	}
	for i, want := range userAssignedForm {
		part, after, more := strings.Cut(rest, "/")
		if part == "" || want != "" && !strings.EqualFold(part, want) || more != (i < len(userAssignedForm)-1) {
			return false
		}
		rest = after
	}
	return true
}
