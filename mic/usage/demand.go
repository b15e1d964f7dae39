package usage

import (
	"slices"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// SetDemands replaces the demands of a pod. It requeues a machine in two cases: a new demand is for an identity that is
// not known to be attached to the machine, or an identity on the machine has lost its last pod.
func (t *Tracker) SetDemands(pod string, demands []Demand) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.demands[pod]
	var keys []Key
	for _, d := range demands {
		keys = append(keys, d.Key)
		if !slices.Contains(before, d.Key) {
			t.addUser(pod, d)
		}
	}
	for _, k := range before {
		if !slices.Contains(keys, k) {
			t.removeUser(pod, k)
		}
	}
	if len(keys) == 0 {
		delete(t.demands, pod)
	} else {
		t.demands[pod] = keys
	}
}

func (t *Tracker) addUser(pod string, d Demand) {
	m := t.at(d.Machine, d.Resource)
	u := m.use(d.Identity, d.ID)
	u.users[pod] = struct{}{}
	if !u.unusedSince.IsZero() {
		u.unusedSince = time.Time{}
		// Another pod may wait because its assignment was the last one of the identity; see MayRelease.
		t.requeueWaiters(u)
	}
	if !m.known || !m.has(d.Identity) {
		m.lastDemand = time.Now()
		if m.firstDemand.IsZero() {
			m.firstDemand = m.lastDemand
		}
		t.requeue.Machine(d.Machine, quietTime)
	}
}

func (t *Tracker) removeUser(pod string, k Key) {
	m := t.machines[k.Machine]
	if m == nil || m.identities[k.Identity] == nil {
		return
	}
	u := m.identities[k.Identity]
	delete(u.users, pod)
	delete(u.waiters, pod)
	if len(u.users) == 0 {
		u.unusedSince = time.Now()
		t.requeue.Machine(k.Machine, quietTime) // the plan of the machine says when MIC detaches the identity, if at all
	}
}

// Status is the status of an identity on a machine.
type Status int

// The statuses of an identity on a machine.
const (
	Unknown Status = iota // the state of the machine is not known, or the Tracker has no record of the identity
	Missing               // not attached, or an update that detaches it is in progress
	Attached
)

// Status returns the status of an identity, and the problem that prevents its attachment, if any. The demands of the
// pod must contain k. Unless the identity is attached, the Tracker requeues the pod when Azure reports another status
// or the problem changes.
func (t *Tracker) Status(pod string, k Key) (status Status, problem string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.machines[k.Machine]
	if m == nil || m.identities[k.Identity] == nil {
		return Unknown, "" // the demand is not set; the next reconcile of the pod sets it
	}
	u := m.identities[k.Identity]
	if m.known && m.has(k.Identity) {
		delete(u.waiters, pod)
		return Attached, ""
	}
	u.waiters[pod] = struct{}{}
	problem = m.problem
	if u.refusal != nil {
		problem = u.refusal.Message
	}
	if !m.known {
		return Unknown, problem
	}
	return Missing, problem
}

// AdoptLegacy records that AAD Pod Identity assigned an identity on a machine, and so may have attached it there. The
// reconcile of the machine then adds the identity to the ledger, so that MIC can detach it. uid is the UID of the
// assignment; further calls with the same UID have no effect.
func (t *Tracker) AdoptLegacy(k Key, r azure.Resource, uid string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, done := t.adoptedUIDs[uid]; done {
		return
	}
	t.adoptedUIDs[uid] = struct{}{}
	m := t.at(k.Machine, r)
	if m.inLedger[k.Identity] {
		return
	}
	m.use(k.Identity, k.Identity).fromLegacy = true
	t.requeue.Machine(k.Machine, quietTime)
}

// MayRelease reports whether the assignment of k to pod may be deleted, if the pod no longer needs it. The last
// assignment of an identity that MIC attached, or may have attached, must stay until the identity is detached. If
// MayRelease returns false, the Tracker requeues the pod when the result may have changed.
func (t *Tracker) MayRelease(pod string, k Key) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.machines[k.Machine]
	if m == nil {
		return true // no pod needs an identity on the machine, and the Tracker knows no ledger of the machine
	}
	u := m.identities[k.Identity]
	if u == nil || !u.fromLegacy { // a legacy assignment stays until the ledger contains its identity
		if m.inLedger != nil && !m.inLedger[k.Identity] || u != nil && len(u.users) > 0 {
			return true
		}
	}
	if u == nil {
		u = m.use(k.Identity, k.Identity)
		u.unusedSince = time.Now()
	}
	u.waiters[pod] = struct{}{}
	if m.inLedger == nil || !m.known {
		t.requeue.Machine(k.Machine, quietTime)
	}
	return false
}

// Absent reports whether the state of a machine is known and does not contain an identity.
func (t *Tracker) Absent(k Key) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.machines[k.Machine]
	if m == nil || !m.known {
		return false
	}
	_, present := m.attached[k.Identity]
	return !present
}
