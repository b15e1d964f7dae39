package mic

import (
	"cmp"
	"fmt"

	"github.com/podidentity/podidentity/internal/text"
	"github.com/podidentity/podidentity/mic/azure"
)

// explain returns a text for operators: why Azure does not update a machine and, if MIC lacks a permission, which role
// to grant.
func explain(r azure.Resource, e *azure.Error) string {
	what := fmt.Sprintf("MIC cannot read or change the identities of %s %s: ", r.Kind, r.Name)
	switch e.Class {
	case azure.Denied:
		role := "Virtual Machine Contributor"
		return text.OneLine(fmt.Sprintf("%sif a permission is missing, grant MIC's identity the role %s on resource group %s of subscription %s (%s)", what, role, r.ResourceGroup, r.SubscriptionID, e.Message), maxText)
	case azure.NotFound:
		return text.OneLine(fmt.Sprintf("Azure does not find %s %s in resource group %s of subscription %s, or is deleting it; check that MIC's credential is for the tenant and the cloud of this subscription (%s)", r.Kind, r.Name, r.ResourceGroup, r.SubscriptionID, e.Message), maxText)
	case azure.Unavailable:
		return text.OneLine(fmt.Sprintf("MIC cannot read or change the identities of %s %s now and retries: %s", r.Kind, r.Name, cmp.Or(e.Message, e.Error())), maxText)
	case azure.Unconfigured:
		return text.OneLine("MIC cannot call Azure: "+cmp.Or(e.Message, e.Error()), maxText)
	}
	return text.OneLine(what+cmp.Or(e.Message, e.Error()), maxText)
}

// explainRefused returns a text for operators: why Azure refuses an identity, and what to do.
func explainRefused(r azure.Resource, id string, e *azure.Error) string {
	advice := "check that the managed identity exists and that spec.resourceID of the AzureIdentity is correct"
	if e.Code == "LinkedAuthorizationFailed" {
		advice = "grant MIC's identity the role Managed Identity Operator on the managed identity"
	}
	return text.OneLine(fmt.Sprintf("Azure refuses to attach or detach %s on %s %s; %s (%s: %s)", id, r.Kind, r.Name, advice, e.Code, e.Message), maxText)
}
