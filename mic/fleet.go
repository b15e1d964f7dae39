package mic

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// fleet knows who wants what where, and what is attached to the machines as far as Azure has said. It is kept in step
// with the cluster pod by pod. Its methods never wait; all of them may be called at the same time.
type Tracker struct {
	mu          sync.Mutex
	machines    map[string]*Machine // by key
	demands     map[string][]Key    // by pod (namespace/name); what it was counted for
	adoptedUIDs map[string]struct{} // UIDs of assignments of the predecessor that were taken over

	// wakePod and wakeMachine are told of what has to be looked at again. They must not call back.
	requeuePod     func(pod string)
	requeueMachine func(machine string, after time.Duration)
}

// want is one identity that a pod wants on one machine.
type Key struct{ Machine, Identity string } // keys; the identity's is its folded resource ID

// machine is one virtual machine or scale set. Its fields are the fleet's; see [machineState] for those that belong to
// the machine's reconcile alone.
type Machine struct {
	resource   azure.Resource
	identities map[string]*identityUse // by identity; also of identities that nobody wants any more but somebody waits for
	known      bool                    // attached is what Azure said, and nothing has been asked of it since that ended unclear
	attached   map[string]azure.Identity
	inLedger   map[string]bool // the ledger; nil until it is loaded
	problem    string          // why Azure does nothing for this machine; for messages
	retryAfter time.Time       // after a failure it is left alone until then
	// firstNeed and lastNeed are when pods came to want what is missing, since the last update.
	firstDemand, lastDemand time.Time
	state                   machineState
}

// use is what is known of one identity on one machine.
type identityUse struct {
	id          string              // as spelled where it was seen first
	users       map[string]struct{} // pods that want it
	waiters     map[string]struct{} // pods to be woken when anything about it changes
	unusedSince time.Time           // since when no pod wants it; zero while one does
	detaching   bool                // an update that takes it off is under way
	fromLegacy  bool                // an assignment of the predecessor says that it was attached for pods
	refusal     *Refusal            // by Azure
}

// refusal is an identity set aside: Azure would not attach or detach it.
type Refusal struct {
	Message    string
	Times      int
	RetryAfter time.Time // it is not tried before
}

func newFleet(wakePod func(string), wakeMachine func(string, time.Duration)) *Tracker {
	return &Tracker{machines: map[string]*Machine{}, demands: map[string][]Key{}, adoptedUIDs: map[string]struct{}{}, requeuePod: wakePod, requeueMachine: wakeMachine}
}

// Needs are gathered until none has come for burst, and for gatherMost at most, so that the pods of a burst are in one
// update.
const quietTime, maxGatherTime = 250 * time.Millisecond, 2 * time.Second

// at returns the machine, new if need be. The lock is held.
func (f *Tracker) at(key string, r azure.Resource) *Machine {
	m := f.machines[key]
	if m == nil {
		m = &Machine{resource: r, identities: map[string]*identityUse{}}
		f.machines[key] = m
	}
	return m
}

func (m *Machine) use(identity, spelled string) *identityUse {
	u := m.identities[identity]
	if u == nil {
		u = &identityUse{id: spelled, users: map[string]struct{}{}, waiters: map[string]struct{}{}}
		m.identities[identity] = u
	}
	return u
}

// has reports whether an identity is on the machine and stays there.
func (m *Machine) has(identity string) bool {
	_, ok := m.attached[identity]
	return ok && !(m.identities[identity] != nil && m.identities[identity].detaching)
}

// needed is a want with what a machine has to be known by.
type Demand struct {
	Key
	Resource azure.Resource
	ID       string
}

// set counts a pod for what it wants now, and for nothing else. Machines for which that changes anything are woken.
func (f *Tracker) SetDemands(pod string, now []Demand) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := f.demands[pod]
	var wants []Key
	for _, n := range now {
		wants = append(wants, n.Key)
		if slices.Contains(before, n.Key) {
			continue
		}
		m := f.at(n.Machine, n.Resource)
		u := m.use(n.Identity, n.ID)
		u.users[pod] = struct{}{}
		if !u.unusedSince.IsZero() {
			u.unusedSince = time.Time{}
			f.requeueWaiters(u) // those that waited for it to go
		}
		if !m.known || !m.has(n.Identity) {
			m.lastDemand = time.Now()
			if m.firstDemand.IsZero() {
				m.firstDemand = m.lastDemand
			}
			f.requeueMachine(n.Machine, quietTime)
		}
	}
	for _, w := range before {
		if slices.Contains(wants, w) {
			continue
		}
		m := f.machines[w.Machine]
		if m == nil || m.identities[w.Identity] == nil {
			continue
		}
		u := m.identities[w.Identity]
		delete(u.users, pod)
		delete(u.waiters, pod)
		if len(u.users) == 0 {
			u.unusedSince = time.Now()
			f.requeueMachine(w.Machine, quietTime) // which sees when it is to go, if it is
		}
	}
	if len(wants) == 0 {
		delete(f.demands, pod)
	} else {
		f.demands[pod] = wants
	}
}

// wake tells all pods that wait for news of an identity. The lock is held.
func (f *Tracker) requeueWaiters(u *identityUse) {
	for pod := range u.waiters {
		f.requeuePod(pod)
	}
	clear(u.waiters)
}

// standing is how things stand with an identity on a machine.
type Status int

const (
	Unknown  Status = iota // Azure has not been asked yet
	Missing                // it is not there, or about to go
	Attached               // it is there
)

// standing says how things stand for a pod that wants an identity, and what is in the way, if anything is. Unless it is
// attached, the pod is woken when that changes.
func (f *Tracker) Status(pod string, w Key) (Status, string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[w.Machine]
	if m == nil || m.identities[w.Identity] == nil {
		return Unknown, "" // the pod was never counted; its next reconcile does
	}
	u := m.identities[w.Identity]
	if m.known && m.has(w.Identity) {
		delete(u.waiters, pod)
		return Attached, ""
	}
	u.waiters[pod] = struct{}{}
	message := m.problem
	if u.refusal != nil {
		message = u.refusal.Message
	}
	if !m.known {
		return Unknown, message
	}
	return Missing, message
}

// adopt notes, once for each, what an assignment of the predecessor says: that an identity is on a machine for the sake
// of pods.
func (f *Tracker) AdoptLegacy(w Key, r azure.Resource, uid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, done := f.adoptedUIDs[uid]; done {
		return
	}
	f.adoptedUIDs[uid] = struct{}{}
	m := f.at(w.Machine, r)
	if m.inLedger[w.Identity] {
		return
	}
	m.use(w.Identity, w.Identity).fromLegacy = true
	f.requeueMachine(w.Machine, quietTime)
}

// mayGo reports whether an assignment that its pod has no use for any more may go. It is kept as long as it is the last
// one for an identity that MIC has attached and has yet to detach. Otherwise its pod is woken when that changes.
func (f *Tracker) MayRelease(pod string, w Key) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[w.Machine]
	if m == nil {
		return true // nobody wants anything of it, and all that have a ledger are in the fleet
	}
	u := m.identities[w.Identity]
	if u == nil || !u.fromLegacy { // else the ledger does not have it yet
		if m.inLedger != nil && !m.inLedger[w.Identity] || u != nil && len(u.users) > 0 {
			return true
		}
	}
	if u == nil {
		u = m.use(w.Identity, w.Identity)
		u.unusedSince = time.Now()
	}
	u.waiters[pod] = struct{}{}
	if m.inLedger == nil || !m.known {
		f.requeueMachine(w.Machine, quietTime)
	}
	return false
}

// absent reports whether a machine is known not to have an identity.
func (f *Tracker) Absent(w Key) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[w.Machine]
	if m == nil || !m.known {
		return false
	}
	_, there := m.attached[w.Identity]
	return !there
}

// retry forgets that an identity was refused: somebody has edited what it stands for.
func (f *Tracker) RetryRefused(identity string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for key, m := range f.machines {
		if u := m.identities[identity]; u != nil && u.refusal != nil {
			u.refusal.RetryAfter, m.retryAfter = time.Time{}, time.Time{}
			f.requeueMachine(key, quietTime)
		}
	}
}

// setAsideCount is how many identities are set aside, over all machines.
func (f *Tracker) SetAsideCount() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.machines {
		for _, u := range m.identities {
			if u.refusal != nil {
				n++
			}
		}
	}
	return n
}

// keys returns the keys of all machines.
func (f *Tracker) Keys() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.machines))
}

// machine returns a machine, or nil.
func (f *Tracker) Machine(key string) *Machine {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.machines[key]
}

// know makes the fleet have a machine.
func (f *Tracker) Add(key string, r azure.Resource) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.at(key, r)
}

// view copies what is known for the plan. Uses that mean nothing any more are forgotten.
func (f *Tracker) View(key string) View {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	v := View{Identities: map[string]IdentityView{}}
	for id, u := range m.identities {
		if len(u.users) == 0 && u.unusedSince.IsZero() {
			u.unusedSince = time.Now()
		}
		if m.unneeded(id, u) {
			delete(m.identities, id)
			continue
		}
		v.Identities[id] = IdentityView{u.id, len(u.users), u.unusedSince, u.refusal}
	}
	return v
}

// over reports whether nobody has to do with an identity any more.
func (m *Machine) unneeded(id string, u *identityUse) bool {
	return len(u.users) == 0 && len(u.waiters) == 0 && !m.inLedger[id] && !u.fromLegacy
}

// drop forgets a machine of which there is nothing to remember.
func (f *Tracker) Drop(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	if m != nil {
		maps.DeleteFunc(m.identities, m.unneeded)
	}
	if m == nil || len(m.identities) > 0 || len(m.inLedger) > 0 || m.state.ledger == nil || m.state.ledger.Stored() {
		return m == nil
	}
	delete(f.machines, key)
	return true
}
