package azure

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"
)

// identitySet are the identities of a machine.
type identitySet struct {
	system *Identity
	user   map[string]attachment // by folded ID
}

type attachment struct {
	asSent   string // the ID as in the request that attached it
	identity Identity
	since    time.Time
}

func (s identitySet) clone() identitySet { return identitySet{s.system, maps.Clone(s.user)} }

// delta is the change that a PATCH makes to the identities. A nil *delta changes nothing.
type delta struct {
	// system is nil if the machine has no system-assigned identity after the PATCH.
	// Otherwise, a machine without a system-assigned identity gets this one.
	system *Identity
	user   bool // whether the new type allows user-assigned identities
	add    map[string]attachment
	remove []string
}

// after returns s with the change d applied. If d adds a resource ID that s already has,
// the client ID decides: with the same client ID, the attachment in s remains. With
// another client ID, d adds a new identity, and its attachment replaces the one in s. If
// d.user is false, the result has no user-assigned identities.
func (s identitySet) after(d *delta) identitySet {
	if d == nil {
		return s
	}
	out := identitySet{system: d.system, user: map[string]attachment{}}
	if s.system != nil && d.system != nil {
		out.system = s.system
	}
	if !d.user {
		return out
	}
	maps.Copy(out.user, s.user)
	for key, at := range d.add {
		if have, ok := s.user[key]; !ok || have.identity.ClientID != at.identity.ClientID {
			out.user[key] = at
		}
	}
	for _, key := range d.remove {
		delete(out.user, key)
	}
	return out
}

// armMachine is guarded by armState.mu.
type armMachine struct {
	computeID
	set        identitySet
	delay      time.Duration   // of its operations; negative: ARMSettings.Delay applies
	forced     string          // provisioning state that overrides all others
	idleState  string          // provisioning state while nothing runs
	version    int             // increases with each change; is the ETag
	operations []*armOperation // the first one is running, the others are queued
	patching   int             // number of PATCH requests in progress
}

// armOperation is an operation that a PATCH started or queued.
type armOperation struct {
	id         string
	machine    *armMachine
	delta      *delta
	start, end time.Time
	failure    *armError // nil: the operation succeeds
	apply      bool      // change the identities at the end; can be true although the operation fails
	ended      bool
}

// maxEndedOperations is the number of ended operations that can still be polled.
const maxEndedOperations = 10_000

func (m *armMachine) etag() string { return `"` + strconv.Itoa(m.version) + `"` }

func (m *armMachine) provisioningState() string {
	switch {
	case m.forced != "":
		return m.forced
	case len(m.operations) > 0:
		return stateUpdating
	}
	return m.idleState
}

// finishDueOperations finishes all operations whose end has passed, in the order
// of their ends. The caller holds the lock.
func (a *armState) finishDueOperations() {
	now := a.o.Now()
	for {
		var next *armMachine
		for m := range a.running {
			if end := m.operations[0].end; !end.After(now) && (next == nil || end.Before(next.operations[0].end)) {
				next = m
			}
		}
		if next == nil {
			return
		}
		a.finish(next)
	}
}

// finish ends the running operation of the machine. The caller holds the lock.
func (a *armState) finish(m *armMachine) {
	o := m.operations[0]
	if m.operations = m.operations[1:]; len(m.operations) == 0 {
		delete(a.running, m)
	}
	o.ended = true
	if _, known := a.operations[o.id]; known {
		a.ended = append(a.ended, o.id)
	}
	if len(a.ended) > maxEndedOperations {
		delete(a.operations, a.ended[0])
		a.ended = a.ended[1:]
	}
	m.idleState = stateSucceeded
	if o.failure != nil {
		m.idleState = stateFailed
	}
	if o.apply {
		m.replace(m.set.after(o.delta), ARMChange{Time: o.end, OperationID: o.id}, &a.records.changes)
	}
	m.version++
}

// newSystemAssigned returns the system-assigned identity that the machine gets when
// a PATCH adds SystemAssigned to its type.
func (m *armMachine) newSystemAssigned() Identity {
	return Identity{ClientID: derivedGUID("client " + m.key()), ObjectID: derivedGUID("object " + m.key()), ResourceID: m.id}
}

func derivedGUID(text string) string {
	sum := sha256.Sum256([]byte(text))
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}

// replace sets the identities of the machine. For each identity that it attaches or
// detaches, it adds a copy of change to the change log, with Resource, Identity and
// Attached filled in. It does not log a new identity that replaces an attached identity
// with the same resource ID. It logs the system-assigned identity as SystemIdentity.
func (m *armMachine) replace(set identitySet, change ARMChange, changes *changeLog) {
	change.Resource = m.key()
	log := func(identity string, attached bool) {
		change.Identity, change.Attached = identity, attached
		changes.add(change)
	}
	if (m.set.system == nil) != (set.system == nil) {
		log(SystemIdentity, set.system != nil)
	}
	for _, key := range slices.Sorted(maps.Keys(m.set.user)) {
		if _, kept := set.user[key]; !kept {
			log(key, false)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(set.user)) {
		if _, had := m.set.user[key]; !had {
			log(key, true)
		}
	}
	m.set = set
}

// projected returns the identities of the machine after all its operations, if none fails.
func (m *armMachine) projected() identitySet {
	set := m.set
	for _, o := range m.operations {
		set = set.after(o.delta)
	}
	return set
}

// begin starts the operation of a PATCH, or queues it after the other operations of the
// machine. An operation ends immediately if it is not queued, has no delay and does
// not fail; then it cannot be polled.
func (a *armState) begin(m *armMachine, p identityPatch, failure *armError, apply bool) *armOperation {
	now := a.o.Now()
	delay := m.delay
	if delay < 0 {
		delay = a.settings.Delay
	}
	o := &armOperation{id: newGUID(), machine: m, start: now, failure: failure, apply: apply || failure == nil}
	if n := len(m.operations); n > 0 {
		o.start = m.operations[n-1].end
	}
	o.end = o.start.Add(delay)
	o.delta = p.delta(m, a.identities, o.end)
	m.operations = append(m.operations, o)
	a.running[m] = true
	if o.start.Equal(now) && delay == 0 && failure == nil {
		a.finish(m)
		return o
	}
	a.operations[o.id] = o
	m.version++
	return o
}

// delta returns the change that the PATCH makes to m, or nil for a PATCH without an
// identity part. It omits added identities that do not exist. at is the expected end of
// the operation: the time when the added identities are attached.
func (p identityPatch) delta(m *armMachine, identities map[string]Identity, at time.Time) *delta {
	if !p.given {
		return nil
	}
	d := &delta{user: p.user, add: map[string]attachment{}, remove: p.remove}
	if p.system {
		id := m.newSystemAssigned()
		d.system = &id
	}
	for key, asSent := range p.add {
		if identity, ok := identities[key]; ok {
			d.add[key] = attachment{asSent: asSent, identity: identity, since: at}
		}
	}
	return d
}
