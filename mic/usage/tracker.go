package usage

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// Tracker records which pod uses which identity on which machine, and what is attached to the machines as far as Azure
// reported it. Its methods and those of its Machines send no requests, and may be called concurrently.
type Tracker struct {
	mu          sync.Mutex
	machines    map[string]*Machine // by key
	demands     map[string][]Key    // by pod (namespace/name)
	adoptedUIDs map[string]struct{} // UIDs of assignments of AAD Pod Identity that were adopted
	requeue     Requeue
}

// Requeue has the functions that requeue a pod or a machine. The Tracker calls them while it holds its lock, so they
// must not call into the Tracker.
type Requeue struct {
	Pod     func(pod string)
	Machine func(machine string, after time.Duration)
}

// Key is one identity on one machine.
type Key struct {
	Machine  string // its key
	Identity string // its folded resource ID
}

// Demand is one identity that a pod needs on one machine.
type Demand struct {
	Key
	Resource azure.Resource // the machine
	ID       string         // the resource ID as the AzureIdentity spells it
}

// identityUse is what is known of one identity on one machine.
type identityUse struct {
	id          string              // the resource ID as first seen
	users       map[string]struct{} // pods that need it
	waiters     map[string]struct{} // pods to requeue when anything about it changes
	unusedSince time.Time           // zero while a pod needs it, or if it is not set yet
	detaching   bool                // an update that detaches it is in progress
	fromLegacy  bool                // see AdoptLegacy; false once the ledger contains the identity
	refusal     *Refusal            // nil unless Azure refused it
}

// Refusal records that Azure refused to attach or detach an identity.
type Refusal struct {
	Message    string
	Times      int       // how many times in a row
	RetryAfter time.Time // no attempt before this time
}

// New returns a Tracker without machines.
func New(r Requeue) *Tracker {
	return &Tracker{machines: map[string]*Machine{}, demands: map[string][]Key{}, adoptedUIDs: map[string]struct{}{}, requeue: r}
}

// Updates wait until no new demand has come for quietTime, but at most maxGatherTime, so that one update contains the
// identities of all pods that are created together.
const quietTime, maxGatherTime = 250 * time.Millisecond, 2 * time.Second

// at returns a machine and creates it if necessary. The caller holds the lock.
func (t *Tracker) at(key string, r azure.Resource) *Machine {
	m := t.machines[key]
	if m == nil {
		m = &Machine{Key: key, Resource: r, tracker: t, identities: map[string]*identityUse{}}
		t.machines[key] = m
	}
	return m
}

// requeueWaiters requeues all pods that wait for a change of an identity. The caller holds the lock.
func (t *Tracker) requeueWaiters(u *identityUse) {
	for pod := range u.waiters {
		t.requeue.Pod(pod)
	}
	clear(u.waiters)
}

// Add adds a machine unless the Tracker already has it.
func (t *Tracker) Add(key string, r azure.Resource) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.at(key, r)
}

// Machine returns a machine, or nil.
func (t *Tracker) Machine(key string) *Machine {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.machines[key]
}

// Keys returns the keys of all machines.
func (t *Tracker) Keys() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Sorted(maps.Keys(t.machines))
}

// SetAsideCount returns how many identities are set aside because Azure refused them, over all machines.
func (t *Tracker) SetAsideCount() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range t.machines {
		for _, u := range m.identities {
			if u.refusal != nil {
				n++
			}
		}
	}
	return n
}

// RetryRefused makes MIC retry an identity that Azure refused. It ends the delay of the identity, and the delays of the
// machines on which Azure refused it. identity is a folded resource ID. RetryRefused is called when an AzureIdentity
// with this resource ID was edited.
func (t *Tracker) RetryRefused(identity string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, m := range t.machines {
		if u := m.identities[identity]; u != nil && u.refusal != nil {
			u.refusal.RetryAfter, m.retryAfter = time.Time{}, time.Time{}
			t.requeue.Machine(key, quietTime)
		}
	}
}
