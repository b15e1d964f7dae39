package identity

import (
	"fmt"
	"regexp"
)

var (
	guid = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
	// An ARM id of a user-assigned managed identity. Azure compares ids without case.
	userAssignedID = regexp.MustCompile(`(?i)^/subscriptions/[^/]+/resourcegroups/[^/]+/providers/microsoft\.managedidentity/userassignedidentities/[^/]+/?$`)
)

// Problem says why the identity can never yield a token, or "" if nothing speaks against it. New objects of this form
// are refused by the CRD's own rules; objects stored by the predecessor never met those.
func (i Identity) Problem() string {
	switch i.Kind {
	case UserAssigned:
		if !guid.MatchString(i.ClientID) {
			return fmt.Sprintf("spec.clientID %q is not a GUID; write the client ID of the managed identity", i.ClientID)
		}
		if !userAssignedID.MatchString(i.ResourceID) {
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
