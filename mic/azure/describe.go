package azure

import (
	"encoding/json"
	"fmt"

	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/compute/armcompute/v7"
)

// Describe returns, in one line, the request that [Client.Begin] would send to ARM, or the error if the update is
// invalid.
func Describe(r Resource, basis State, add, remove []string) string {
	p, err := newPatch(basis, add, remove)
	if err != nil {
		return err.Error()
	}
	body, err := json.Marshal(armcompute.VirtualMachineScaleSetUpdate{Identity: &armcompute.VirtualMachineScaleSetIdentity{
		Type: &p.identityType, UserAssignedIdentities: p.identities,
	}})
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("PATCH %s %s", r.ID(), body)
}

// ParseID parses the ID of a machine, as [Resource.ID] returns it.
func ParseID(id string) (Resource, error) {
	if r, err := ParseProviderID("azure://" + id); err == nil {
		return r, nil
	}
	// A provider ID names an instance of a scale set, never the scale set itself, so ParseID appends an instance.
	r, err := ParseProviderID("azure://" + id + "/virtualMachines/0")
	if err != nil {
		return Resource{}, fmt.Errorf("%q is not the ID of a virtual machine or scale set", id)
	}
	return r, nil
}
