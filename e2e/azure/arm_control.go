package azure

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"
)

// This file contains the control API of the fake ARM: the HTTP handlers, and the methods of the Client that call them.
// Most requests name a machine by its ID or by the name of one of its nodes, and an identity by its client, object or
// resource ID. AddMachine accepts only the IDs of machines and the resource IDs of identities. SetIdentityFault accepts
// only a resource ID.

type machineRequest struct {
	Machine  string        `json:"machine"`
	Identity string        `json:"identity,omitempty"`
	State    string        `json:"state,omitempty"`
	Delay    time.Duration `json:"delay_ns,omitempty"`
}

func (c *control) handleARM(mux *http.ServeMux) {
	forMachine := func(f func(machine string, q machineRequest) error) http.HandlerFunc {
		return acceptJSON(func(q machineRequest) error { return f(c.dir.machineOf(q.Machine), q) })
	}
	mux.HandleFunc("PUT /identities/define", acceptJSON(func(id Identity) error { return c.dir.defineIdentity(id, nil) }))
	mux.HandleFunc("GET /arm/machines", serveJSON(func() any { return c.dir.showMachines() }))
	mux.HandleFunc("PUT /arm/machines", acceptJSON(c.arm.AddMachine))
	mux.HandleFunc("DELETE /arm/machines", forMachine(func(machine string, _ machineRequest) error {
		c.arm.RemoveMachine(machine)
		return nil
	}))
	mux.HandleFunc("PUT /arm/state", forMachine(func(machine string, q machineRequest) error { return c.arm.SetProvisioningState(machine, q.State) }))
	mux.HandleFunc("PUT /arm/delay", forMachine(func(machine string, q machineRequest) error { return c.arm.SetDelay(machine, q.Delay) }))
	mux.HandleFunc("POST /arm/end", forMachine(func(machine string, _ machineRequest) error { return c.arm.EndOperations(machine) }))
	mux.HandleFunc("POST /arm/attach", forMachine(func(machine string, q machineRequest) error {
		return c.arm.Attach(machine, c.dir.resourceOf(q.Identity))
	}))
	mux.HandleFunc("POST /arm/detach", forMachine(func(machine string, q machineRequest) error {
		return c.arm.Detach(machine, c.dir.resourceOf(q.Identity))
	}))
	mux.HandleFunc("GET /arm/faults", serveJSON(func() any { return c.arm.Faults() }))
	mux.HandleFunc("PUT /arm/faults", acceptJSON(func(f ARMFault) error {
		f.Resource = c.dir.machineOf(f.Resource)
		return c.arm.SetFault(f)
	}))
	mux.HandleFunc("DELETE /arm/faults", forMachine(func(machine string, _ machineRequest) error {
		c.arm.ClearFaults(machine)
		return nil
	}))
	mux.HandleFunc("PUT /arm/identity-faults", acceptJSON(c.arm.SetIdentityFault))
	mux.HandleFunc("GET /arm/log", func(w http.ResponseWriter, r *http.Request) { serveLines(w, r, c.arm.Log) })
	mux.HandleFunc("GET /arm/changes", func(w http.ResponseWriter, r *http.Request) { serveLines(w, r, c.arm.Changes) })
}

// DefineIdentity creates or replaces a user-assigned identity without changing
// where it is attached. Client.RemoveIdentity deletes it.
func (c ARMClient) DefineIdentity(ctx context.Context, id Identity) error {
	return c.call(ctx, "PUT", "/identities/define", id, nil)
}

// Machines returns the virtual machines and scale sets.
func (c ARMClient) Machines(ctx context.Context) ([]Machine, error) {
	var out []Machine
	return out, c.call(ctx, "GET", "/arm/machines", nil, &out)
}

// Machine returns the machine whose ID is ref, or that has a node with the name ref.
// It returns an error if there is none.
func (c ARMClient) Machine(ctx context.Context, ref string) (Machine, error) {
	machines, err := c.Machines(ctx)
	if err != nil {
		return Machine{}, err
	}
	for _, m := range machines {
		if FoldID(m.ID) == FoldID(ref) || slices.Contains(m.Nodes, ref) {
			return m, nil
		}
	}
	return Machine{}, fmt.Errorf("fake Azure: no machine has the ID %q or a node of this name", ref)
}

// AddMachine adds a machine or replaces it. See ARM.AddMachine.
func (c ARMClient) AddMachine(ctx context.Context, m Machine) error {
	return c.call(ctx, "PUT", "/arm/machines", m, nil)
}

// RemoveMachine deletes a machine. An unknown machine is not an error.
func (c ARMClient) RemoveMachine(ctx context.Context, ref string) error {
	return c.call(ctx, "DELETE", "/arm/machines", machineRequest{Machine: ref}, nil)
}

// SetProvisioningState sets the provisioning state of a machine, for example to
// Deleting. See ARM.SetProvisioningState.
func (c ARMClient) SetProvisioningState(ctx context.Context, ref, state string) error {
	return c.call(ctx, "PUT", "/arm/state", machineRequest{Machine: ref, State: state}, nil)
}

// SetDelay sets the delay for the operations of one machine. For these operations, it
// overrides the switch arm.delay. A negative delay removes the override.
func (c ARMClient) SetDelay(ctx context.Context, ref string, d time.Duration) error {
	return c.call(ctx, "PUT", "/arm/delay", machineRequest{Machine: ref, Delay: d}, nil)
}

// EndOperations ends the operations of a machine now, whatever their delay.
func (c ARMClient) EndOperations(ctx context.Context, ref string) error {
	return c.call(ctx, "POST", "/arm/end", machineRequest{Machine: ref}, nil)
}

// AttachTo attaches an identity to a machine immediately, like a manual change in
// the portal.
func (c ARMClient) AttachTo(ctx context.Context, machine, identity string) error {
	return c.call(ctx, "POST", "/arm/attach", machineRequest{Machine: machine, Identity: identity}, nil)
}

// DetachFrom detaches an identity from a machine immediately. An identity that
// is not attached is not an error.
func (c ARMClient) DetachFrom(ctx context.Context, machine, identity string) error {
	return c.call(ctx, "POST", "/arm/detach", machineRequest{Machine: machine, Identity: identity}, nil)
}

// SetARMFault sets a fault. It replaces the fault of the same resource and
// operation.
func (c ARMClient) SetARMFault(ctx context.Context, f ARMFault) error {
	return c.call(ctx, "PUT", "/arm/faults", f, nil)
}

// ClearARMFaults clears the faults of a machine or a subscription. With "" it
// clears all faults, including those of identities.
func (c ARMClient) ClearARMFaults(ctx context.Context, resource string) error {
	return c.call(ctx, "DELETE", "/arm/faults", machineRequest{Machine: resource}, nil)
}

// ARMFaults returns the faults that SetARMFault has set, with their remaining counts.
func (c ARMClient) ARMFaults(ctx context.Context) ([]ARMFault, error) {
	var out []ARMFault
	return out, c.call(ctx, "GET", "/arm/faults", nil, &out)
}

// SetIdentityFault sets or clears the fault of an identity. See ARM.SetIdentityFault.
func (c ARMClient) SetIdentityFault(ctx context.Context, f IdentityFault) error {
	return c.call(ctx, "PUT", "/arm/identity-faults", f, nil)
}

// ARMLog returns the entries of the fake ARM's request log with a sequence number
// greater than since.
func (c ARMClient) ARMLog(ctx context.Context, since int) ([]ARMRequest, error) {
	return readLines[ARMRequest](ctx, c.controlClient, "/arm/log", since)
}

// ARMChanges returns the entries of the fake ARM's change log with a sequence number
// greater than since.
func (c ARMClient) ARMChanges(ctx context.Context, since int) ([]ARMChange, error) {
	return readLines[ARMChange](ctx, c.controlClient, "/arm/changes", since)
}
