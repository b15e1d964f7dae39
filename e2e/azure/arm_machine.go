package azure

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Machine is a snapshot of a virtual machine or a scale set.
type Machine struct {
	ID                string    `json:"id"`   // as sent when the machine was added
	Kind              string    `json:"kind"` // KindVM or KindVMSS
	ProvisioningState string    `json:"provisioning_state"`
	ETag              string    `json:"etag"`
	SystemAssigned    *Identity `json:"system_assigned,omitempty"`
	// Identities are the folded and sorted resource IDs of the user-assigned
	// identities attached now. With the setting Early, GET may return others.
	Identities   []string  `json:"identities"`
	Operation    string    `json:"operation,omitempty"` // ID of the running operation
	OperationEnd time.Time `json:"operation_end,omitzero"`
	Nodes        []string  `json:"nodes,omitempty"` // on this machine; only in results of a Client
}

const (
	stateSucceeded = "Succeeded"
	stateFailed    = "Failed"
	stateUpdating  = "Updating"
	stateCreating  = "Creating"
	stateDeleting  = "Deleting"
)

// AddMachine adds a machine or replaces it. It uses the ID, SystemAssigned,
// Identities and ProvisioningState of m. It does not add the identities of m to the
// change log. It returns an error if m.ID is not the ID of a machine, or if one of
// m.Identities does not exist.
func (a *armState) AddMachine(m Machine) error {
	id, ok := parseComputeID(m.ID)
	if !ok {
		return fmt.Errorf("%q is not the ID of a virtual machine or a scale set"+
			" (/subscriptions/S/resourceGroups/G/providers/Microsoft.Compute/virtualMachines/NAME or …/virtualMachineScaleSets/NAME)", m.ID)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	add := &armMachine{computeID: id, delay: -1, idleState: stateSucceeded, version: 1,
		set: identitySet{system: m.SystemAssigned, user: map[string]attachment{}}}
	for _, asSent := range m.Identities {
		key := FoldID(asSent)
		identity, ok := a.identities[key]
		if !ok {
			return fmt.Errorf("no user-assigned identity %q", asSent)
		}
		add.set.user[key] = attachment{asSent: asSent, identity: identity}
	}
	add.setState(m.ProvisioningState)
	a.remove(add.key())
	a.machines[add.key()] = add
	return nil
}

// RemoveMachine deletes a machine. The operations of the machine fail with
// ResourceNotFound. RemoveMachine does nothing for an unknown machine.
func (a *armState) RemoveMachine(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	a.remove(FoldID(id))
}

func (a *armState) remove(key string) {
	m, ok := a.machines[key]
	if !ok {
		return
	}
	for len(m.operations) > 0 {
		o := m.operations[0]
		o.failure, o.apply, o.end = notFound(m.computeID), false, a.o.Now()
		a.finish(m)
	}
	delete(a.machines, key)
}

// Machines returns all machines, sorted by ID.
func (a *armState) Machines() []Machine {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	out := make([]Machine, 0, len(a.machines))
	for _, key := range slices.Sorted(maps.Keys(a.machines)) {
		out = append(out, a.machines[key].snapshot())
	}
	return out
}

// Machine returns the machine with this ID, and whether it exists.
func (a *armState) Machine(id string) (Machine, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	m, ok := a.machines[FoldID(id)]
	if !ok {
		return Machine{}, false
	}
	return m.snapshot(), true
}

func (m *armMachine) snapshot() Machine {
	out := Machine{
		ID: m.id, Kind: m.kind, ProvisioningState: m.provisioningState(), ETag: m.etag(),
		SystemAssigned: m.set.system, Identities: slices.Sorted(maps.Keys(m.set.user)),
	}
	if len(m.operations) > 0 {
		out.Operation, out.OperationEnd = m.operations[0].id, m.operations[0].end
	}
	return out
}

// change calls f for the machine with this ID while it holds the lock. It returns
// the error of f, or an error if there is no such machine.
func (a *armState) change(id string, f func(*armMachine) error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	m, ok := a.machines[FoldID(id)]
	if !ok {
		return fmt.Errorf("no machine %q; the machines are %s", id, strings.Join(slices.Sorted(maps.Keys(a.machines)), ", "))
	}
	return f(m)
}

// SetProvisioningState sets the provisioning state of a machine. "" means Succeeded.
// Succeeded and Failed apply only while no operation runs, and the next operation
// replaces them by its own result when it ends. Any other state, such as Deleting,
// applies during and after operations, until SetProvisioningState is called with
// Succeeded, Failed or "".
func (a *armState) SetProvisioningState(id, state string) error {
	return a.change(id, func(m *armMachine) error {
		m.setState(state)
		m.version++
		return nil
	})
}

func (m *armMachine) setState(state string) {
	switch {
	case state == "" || strings.EqualFold(state, stateSucceeded):
		m.forced, m.idleState = "", stateSucceeded
	case strings.EqualFold(state, stateFailed):
		m.forced, m.idleState = "", stateFailed
	default:
		m.forced = state
	}
}

// SetDelay sets the delay for the operations of one machine. For these operations, it
// overrides ARMSettings.Delay. A negative delay removes the override.
func (a *armState) SetDelay(id string, d time.Duration) error {
	return a.change(id, func(m *armMachine) error {
		m.delay = d
		return nil
	})
}

// EndOperations ends the operations of a machine now, whatever their delay. In the
// request log, ARMRequest.End remains the end that was expected when ARM accepted the
// PATCH.
func (a *ARM) EndOperations(id string) error {
	return a.change(id, func(m *armMachine) error {
		now := a.o.Now()
		for len(m.operations) > 0 {
			o := m.operations[0]
			o.end = now
			if o.delta != nil {
				for key, added := range o.delta.add {
					added.since = now
					o.delta.add[key] = added
				}
			}
			a.finish(m)
		}
		return nil
	})
}

// Attach attaches an identity immediately, also during an operation, like a manual
// change.
func (a *armState) Attach(machine, identity string) error {
	return a.change(machine, func(m *armMachine) error {
		key := FoldID(identity)
		known, ok := a.identities[key]
		if !ok {
			return fmt.Errorf("no user-assigned identity %q", identity)
		}
		set, now := m.set.clone(), a.o.Now()
		if _, had := set.user[key]; !had {
			set.user[key] = attachment{asSent: known.ResourceID, identity: known, since: now}
		}
		m.replace(set, ARMChange{Time: now, ByHand: true}, &a.records.changes)
		m.version++
		return nil
	})
}

// Detach detaches an identity immediately. An identity that is not attached is not
// an error.
func (a *armState) Detach(machine, identity string) error {
	return a.change(machine, func(m *armMachine) error {
		set := m.set.clone()
		delete(set.user, FoldID(identity))
		m.replace(set, ARMChange{Time: a.o.Now(), ByHand: true}, &a.records.changes)
		m.version++
		return nil
	})
}

// Attached reports whether an identity is attached to a machine now.
func (a *armState) Attached(machine, identity string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	m, ok := a.machines[FoldID(machine)]
	if ok {
		_, ok = m.set.user[FoldID(identity)]
	}
	return ok
}

// provides reports whether IMDS on the machine issues tokens for the identity id. The
// identity must exist and be attached, and the propagation time must have passed. The
// attached identity must also have the client ID of id: otherwise id is a new identity
// that reuses the resource ID of the attached one. machine is a folded ID.
func (a *armState) provides(machine string, id Identity) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	m, ok := a.machines[machine]
	if !ok {
		return false
	}
	key := FoldID(id.ResourceID)
	at, attached := m.set.user[key]
	_, exists := a.identities[key]
	return attached && exists && at.identity.ClientID == id.ClientID && !a.o.Now().Before(at.since.Add(a.settings.Propagation))
}

// systemAssigned returns the machine's system-assigned identity, and whether the
// machine exists. machine is a folded ID.
func (a *armState) systemAssigned(machine string) (*Identity, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	m, ok := a.machines[machine]
	if !ok {
		return nil, false
	}
	return m.set.system, true
}
