package identity

import (
	"fmt"
	"strings"
)

// Problem says why the identity can never yield a token, or "" if nothing speaks against it. New objects of this form
// are refused by the CRD's own rules; objects stored by the predecessor never met those. It is asked for every request,
// so it looks at the text by hand.
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
		if i.ClientID == "" || i.TenantID == "" {
			return "spec.clientID and spec.tenantID are both needed for this type"
		}
	default:
		return fmt.Sprintf("spec.type %d is unknown; write 0, 1, 2 or 3", i.Kind)
	}
	return ""
}

// isGUID wants 8-4-4-4-12 hexadecimal digits.
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

// userAssignedForm is the resource ID of a user-assigned managed identity, with "" for what is free. Azure compares IDs
// without case.
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
