package azure

import (
	"context"
	"net/http"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/arm"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/compute/armcompute/v7"
)

// machines is the client for one kind of machine in one subscription. The SDK has separate types for virtual machines
// and scale sets; this file hides the difference.
type machines interface {
	get(ctx context.Context, r Resource) (State, error)
	// update starts an update. If token is not "", it resumes the update of this token instead, and sends nothing.
	update(ctx context.Context, r Resource, p patch, token string) (poller, error)
}

// poller polls a running update.
type poller interface {
	Poll(ctx context.Context) (*http.Response, error)
	Done() bool
	ResumeToken() (string, error)
	// outcome reads the machine once the update is done, or returns why the update failed. found is false if the response
	// was not the machine.
	outcome(ctx context.Context) (state State, found bool, err error)
}

func newMachines(subscriptionID string, credential azcore.TokenCredential, o *arm.ClientOptions) ([2]machines, error) {
	single, err := armcompute.NewVirtualMachinesClient(subscriptionID, credential, o)
	if err != nil {
		return [2]machines{}, err
	}
	sets, err := armcompute.NewVirtualMachineScaleSetsClient(subscriptionID, credential, o)
	return [2]machines{VirtualMachine: virtualMachines{single}, ScaleSet: scaleSets{sets}}, err
}

type virtualMachines struct {
	*armcompute.VirtualMachinesClient
}

func (v virtualMachines) get(ctx context.Context, r Resource) (State, error) {
	resp, err := v.Get(ctx, r.ResourceGroup, r.Name, nil)
	if err != nil {
		return State{}, err
	}
	return readVirtualMachine(resp.VirtualMachine).state, nil
}

func (v virtualMachines) update(ctx context.Context, r Resource, p patch, token string) (poller, error) {
	update := armcompute.VirtualMachineUpdate{Identity: &armcompute.VirtualMachineIdentity{Type: &p.identityType, UserAssignedIdentities: p.identities}}
	started, err := v.BeginUpdate(ctx, r.ResourceGroup, r.Name, update, &armcompute.VirtualMachinesClientBeginUpdateOptions{IfMatch: p.ifMatch(), ResumeToken: token})
	if err != nil {
		return nil, err
	}
	read := func(u armcompute.VirtualMachinesClientUpdateResponse) parsedMachine {
		return readVirtualMachine(u.VirtualMachine)
	}
	return updatePoller[armcompute.VirtualMachinesClientUpdateResponse]{started, r, read}, nil
}

type scaleSets struct {
	*armcompute.VirtualMachineScaleSetsClient
}

func (s scaleSets) get(ctx context.Context, r Resource) (State, error) {
	resp, err := s.Get(ctx, r.ResourceGroup, r.Name, nil)
	if err != nil {
		return State{}, err
	}
	return readScaleSet(resp.VirtualMachineScaleSet).state, nil
}

func (s scaleSets) update(ctx context.Context, r Resource, p patch, token string) (poller, error) {
	update := armcompute.VirtualMachineScaleSetUpdate{Identity: &armcompute.VirtualMachineScaleSetIdentity{Type: &p.identityType, UserAssignedIdentities: p.identities}}
	started, err := s.BeginUpdate(ctx, r.ResourceGroup, r.Name, update, &armcompute.VirtualMachineScaleSetsClientBeginUpdateOptions{IfMatch: p.ifMatch(), ResumeToken: token})
	if err != nil {
		return nil, err
	}
	read := func(u armcompute.VirtualMachineScaleSetsClientUpdateResponse) parsedMachine {
		return readScaleSet(u.VirtualMachineScaleSet)
	}
	return updatePoller[armcompute.VirtualMachineScaleSetsClientUpdateResponse]{started, r, read}, nil
}

// updatePoller is the SDK's poller with a function that reads its response.
type updatePoller[T any] struct {
	*runtime.Poller[T]
	resource Resource
	read     func(T) parsedMachine
}

func (u updatePoller[T]) outcome(ctx context.Context) (State, bool, error) {
	result, err := u.Result(ctx)
	if err != nil {
		return State{}, false, err
	}
	got := u.read(result)
	return got.state, Fold(got.id) == u.resource.Key(), nil
}

// parsedMachine has the fields of a response that are used. The rest, which may be long, is not kept.
type parsedMachine struct {
	id    string
	state State
}

func readVirtualMachine(m armcompute.VirtualMachine) parsedMachine {
	got := parsedMachine{id: stringValue(m.ID), state: State{ETag: stringValue(m.Etag)}}
	if m.Properties != nil {
		got.state.ProvisioningState = stringValue(m.Properties.ProvisioningState)
	}
	if m.Identity != nil {
		got.state.setIdentities(m.Identity.Type, m.Identity.UserAssignedIdentities)
	}
	return got
}

func readScaleSet(m armcompute.VirtualMachineScaleSet) parsedMachine {
	got := parsedMachine{id: stringValue(m.ID), state: State{ETag: stringValue(m.Etag)}}
	if m.Properties != nil {
		got.state.ProvisioningState = stringValue(m.Properties.ProvisioningState)
	}
	if m.Identity != nil {
		got.state.setIdentities(m.Identity.Type, m.Identity.UserAssignedIdentities)
	}
	return got
}

func (s *State) setIdentities(kind *armcompute.ResourceIdentityType, identities map[string]*armcompute.UserAssignedIdentitiesValue) {
	if kind != nil {
		s.SystemAssigned = strings.Contains(strings.ToLower(string(*kind)), "systemassigned")
	}
	if len(identities) == 0 {
		return
	}
	s.Identities = make(map[string]Identity, len(identities))
	for id, of := range identities {
		identity := Identity{ID: id}
		if of != nil {
			identity.ClientID, identity.PrincipalID = stringValue(of.ClientID), stringValue(of.PrincipalID)
		}
		s.Identities[Fold(id)] = identity
	}
}

func stringValue(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}
