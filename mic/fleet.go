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
type fleet struct {
	mu       sync.Mutex
	machines map[string]*machine // by key
	wants    map[string][]want   // by pod (namespace/name); what it was counted for
	adoptees map[string]struct{} // UIDs of assignments of the predecessor that were taken over

	// wakePod and wakeMachine are told of what has to be looked at again. They must not call back.
	wakePod     func(pod string)
	wakeMachine func(machine string, after time.Duration)
}

// want is one identity that a pod wants on one machine.
type want struct{ machine, identity string } // keys; the identity's is its folded resource ID

// machine is one virtual machine or scale set. Its fields are the fleet's; see [machineState] for those that belong to
// the machine's reconcile alone.
type machine struct {
	resource azure.Resource
	uses     map[string]*use // by identity; also of identities that nobody wants any more but somebody waits for
	known    bool            // attached is what Azure said, and nothing has been asked of it since that ended unclear
	attached map[string]azure.Identity
	ours     map[string]bool // the ledger; nil until it is loaded
	problem  string          // why Azure does nothing for this machine; for messages
	rested   time.Time       // after a failure it is left alone until then
	// firstNeed and lastNeed are when pods came to want what is missing, since the last update.
	firstNeed, lastNeed time.Time
	state               machineState
}

// use is what is known of one identity on one machine.
type use struct {
	id      string              // as spelled where it was seen first
	users   map[string]struct{} // pods that want it
	waiting map[string]struct{} // pods to be woken when anything about it changes
	unused  time.Time           // since when no pod wants it; zero while one does
	leaving bool                // an update that takes it off is under way
	adopted bool                // an assignment of the predecessor says that it was attached for pods
	refused *refusal            // by Azure
}

// refusal is an identity set aside: Azure would not attach or detach it.
type refusal struct {
	message string
	times   int
	until   time.Time // it is not tried before
}

func newFleet(wakePod func(string), wakeMachine func(string, time.Duration)) *fleet {
	return &fleet{machines: map[string]*machine{}, wants: map[string][]want{}, adoptees: map[string]struct{}{}, wakePod: wakePod, wakeMachine: wakeMachine}
}

// Needs are gathered until none has come for burst, and for gatherMost at most, so that the pods of a burst are in one
// update.
const burst, gatherMost = 250 * time.Millisecond, 2 * time.Second

// at returns the machine, new if need be. The lock is held.
func (f *fleet) at(key string, r azure.Resource) *machine {
	m := f.machines[key]
	if m == nil {
		m = &machine{resource: r, uses: map[string]*use{}}
		f.machines[key] = m
	}
	return m
}

func (m *machine) use(identity, spelled string) *use {
	u := m.uses[identity]
	if u == nil {
		u = &use{id: spelled, users: map[string]struct{}{}, waiting: map[string]struct{}{}}
		m.uses[identity] = u
	}
	return u
}

// has reports whether an identity is on the machine and stays there.
func (m *machine) has(identity string) bool {
	_, ok := m.attached[identity]
	return ok && !(m.uses[identity] != nil && m.uses[identity].leaving)
}

// needed is a want with what a machine has to be known by.
type needed struct {
	want
	resource azure.Resource
	spelled  string
}

// set counts a pod for what it wants now, and for nothing else. Machines for which that changes anything are woken.
func (f *fleet) set(pod string, now []needed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := f.wants[pod]
	var wants []want
	for _, n := range now {
		wants = append(wants, n.want)
		if slices.Contains(before, n.want) {
			continue
		}
		m := f.at(n.machine, n.resource)
		u := m.use(n.identity, n.spelled)
		u.users[pod] = struct{}{}
		if !u.unused.IsZero() {
			u.unused = time.Time{}
			f.wake(u) // those that waited for it to go
		}
		if !m.known || !m.has(n.identity) {
			m.lastNeed = time.Now()
			if m.firstNeed.IsZero() {
				m.firstNeed = m.lastNeed
			}
			f.wakeMachine(n.machine, burst)
		}
	}
	for _, w := range before {
		if slices.Contains(wants, w) {
			continue
		}
		m := f.machines[w.machine]
		if m == nil || m.uses[w.identity] == nil {
			continue
		}
		u := m.uses[w.identity]
		delete(u.users, pod)
		delete(u.waiting, pod)
		if len(u.users) == 0 {
			u.unused = time.Now()
			f.wakeMachine(w.machine, burst) // which sees when it is to go, if it is
		}
	}
	if len(wants) == 0 {
		delete(f.wants, pod)
	} else {
		f.wants[pod] = wants
	}
}

// wake tells all pods that wait for news of an identity. The lock is held.
func (f *fleet) wake(u *use) {
	for pod := range u.waiting {
		f.wakePod(pod)
	}
	clear(u.waiting)
}

// standing is how things stand with an identity on a machine.
type standing int

const (
	unknown  standing = iota // Azure has not been asked yet
	missing                  // it is not there, or about to go
	attached                 // it is there
)

// standing says how things stand for a pod that wants an identity, and what is in the way, if anything is. Unless it is
// attached, the pod is woken when that changes.
func (f *fleet) standing(pod string, w want) (standing, string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[w.machine]
	if m == nil || m.uses[w.identity] == nil {
		return unknown, "" // the pod was never counted; its next reconcile does
	}
	u := m.uses[w.identity]
	if m.known && m.has(w.identity) {
		delete(u.waiting, pod)
		return attached, ""
	}
	u.waiting[pod] = struct{}{}
	message := m.problem
	if u.refused != nil {
		message = u.refused.message
	}
	if !m.known {
		return unknown, message
	}
	return missing, message
}

// adopt notes, once for each, what an assignment of the predecessor says: that an identity is on a machine for the sake
// of pods.
func (f *fleet) adopt(w want, r azure.Resource, uid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, done := f.adoptees[uid]; done {
		return
	}
	f.adoptees[uid] = struct{}{}
	m := f.at(w.machine, r)
	if m.ours[w.identity] {
		return
	}
	m.use(w.identity, w.identity).adopted = true
	f.wakeMachine(w.machine, burst)
}

// mayGo reports whether an assignment that its pod has no use for any more may go. It is kept as long as it is the last
// one for an identity that MIC has attached and has yet to detach. Otherwise its pod is woken when that changes.
func (f *fleet) mayGo(pod string, w want) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[w.machine]
	if m == nil {
		return true // nobody wants anything of it, and all that have a ledger are in the fleet
	}
	u := m.uses[w.identity]
	if u == nil || !u.adopted { // else the ledger does not have it yet
		if m.ours != nil && !m.ours[w.identity] || u != nil && len(u.users) > 0 {
			return true
		}
	}
	if u == nil {
		u = m.use(w.identity, w.identity)
		u.unused = time.Now()
	}
	u.waiting[pod] = struct{}{}
	if m.ours == nil || !m.known {
		f.wakeMachine(w.machine, burst)
	}
	return false
}

// absent reports whether a machine is known not to have an identity.
func (f *fleet) absent(w want) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[w.machine]
	if m == nil || !m.known {
		return false
	}
	_, there := m.attached[w.identity]
	return !there
}

// retry forgets that an identity was refused: somebody has edited what it stands for.
func (f *fleet) retry(identity string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for key, m := range f.machines {
		if u := m.uses[identity]; u != nil && u.refused != nil {
			u.refused.until, m.rested = time.Time{}, time.Time{}
			f.wakeMachine(key, burst)
		}
	}
}

// setAsideCount is how many identities are set aside, over all machines.
func (f *fleet) setAsideCount() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.machines {
		for _, u := range m.uses {
			if u.refused != nil {
				n++
			}
		}
	}
	return n
}

// keys returns the keys of all machines.
func (f *fleet) keys() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.machines))
}

// machine returns a machine, or nil.
func (f *fleet) machine(key string) *machine {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.machines[key]
}

// know makes the fleet have a machine.
func (f *fleet) know(key string, r azure.Resource) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.at(key, r)
}

// view copies what is known for the plan. Uses that mean nothing any more are forgotten.
func (f *fleet) view(key string) view {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	v := view{uses: map[string]viewedUse{}}
	for id, u := range m.uses {
		if len(u.users) == 0 && u.unused.IsZero() {
			u.unused = time.Now()
		}
		if m.over(id, u) {
			delete(m.uses, id)
			continue
		}
		v.uses[id] = viewedUse{u.id, len(u.users), u.unused, u.refused}
	}
	return v
}

// over reports whether nobody has to do with an identity any more.
func (m *machine) over(id string, u *use) bool {
	return len(u.users) == 0 && len(u.waiting) == 0 && !m.ours[id] && !u.adopted
}

// drop forgets a machine of which there is nothing to remember.
func (f *fleet) drop(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	if m != nil {
		maps.DeleteFunc(m.uses, m.over)
	}
	if m == nil || len(m.uses) > 0 || len(m.ours) > 0 || m.state.ledger == nil || m.state.ledger.Stored() {
		return m == nil
	}
	delete(f.machines, key)
	return true
}
