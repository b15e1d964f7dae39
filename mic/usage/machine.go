package usage

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/podidentity/podidentity/internal/retry"
	"github.com/podidentity/podidentity/mic/azure"
)

// Machine is one VM or VMSS. Its methods are for the reconcile of the machine. The lock of the Tracker guards the
// fields that are not exported.
type Machine struct {
	Key      string         // immutable
	Resource azure.Resource // immutable

	tracker    *Tracker
	identities map[string]*identityUse // by folded ID; kept as long as anything refers to the identity, see unneeded
	known      bool                    // attached was read from Azure after the last MarkUnknown
	attached   map[string]azure.Identity
	inLedger   map[string]bool // folded IDs; nil until the ledger is loaded
	problem    string          // why MIC cannot read or update the machine; for messages
	retryAfter time.Time       // no reconcile before this time
	// firstDemand and lastDemand are the times of the first and the last demand for an identity that was not known to
	// be attached. Only demands since the last ResetGather count; zero if there is none.
	firstDemand, lastDemand time.Time
}

// refusalBackoff is how long MIC waits before it retries an identity that Azure refused.
var refusalBackoff = retry.Backoff{Initial: 30 * time.Second, Max: 15 * time.Minute}

// lock locks the Tracker and returns the function that unlocks it.
func (m *Machine) lock() (unlock func()) {
	m.tracker.mu.Lock()
	return m.tracker.mu.Unlock
}

func (m *Machine) use(identity, id string) *identityUse {
	u := m.identities[identity]
	if u == nil {
		u = &identityUse{id: id, users: map[string]struct{}{}, waiters: map[string]struct{}{}}
		m.identities[identity] = u
	}
	return u
}

// has reports whether an identity is attached and no update in progress detaches it.
func (m *Machine) has(identity string) bool {
	_, ok := m.attached[identity]
	return ok && !(m.identities[identity] != nil && m.identities[identity].detaching)
}

// unneeded reports whether nothing refers to an identity any more.
func (m *Machine) unneeded(id string, u *identityUse) bool {
	return len(u.users) == 0 && len(u.waiters) == 0 && !m.inLedger[id] && !u.fromLegacy
}

// SetRetryAfter delays all reconciles of the machine until d has passed, even if an event requeues it. 0 removes the
// delay.
func (m *Machine) SetRetryAfter(d time.Duration) {
	defer m.lock()()
	m.retryAfter = time.Now().Add(d)
}

// RetryDelay returns how long the next reconcile must still wait. Zero or less means that it need not wait.
func (m *Machine) RetryDelay() time.Duration {
	defer m.lock()()
	return time.Until(m.retryAfter)
}

// GatherDelay returns how long an update must wait for further demands. Zero or less means that it need not wait.
func (m *Machine) GatherDelay() time.Duration {
	defer m.lock()()
	return min(time.Until(m.lastDemand.Add(quietTime)), time.Until(m.firstDemand.Add(maxGatherTime)))
}

// ResetGather ends the delay that GatherDelay returns. It is called when updates begin, and when none is needed.
func (m *Machine) ResetGather() {
	defer m.lock()()
	m.firstDemand, m.lastDemand = time.Time{}, time.Time{}
}

// Known reports whether it is known what is attached.
func (m *Machine) Known() bool {
	defer m.lock()()
	return m.known
}

// MarkUnknown records that it is not known what is attached, until the next Observe: an update failed, was not sent,
// or is still in progress.
func (m *Machine) MarkUnknown() {
	defer m.lock()()
	m.known = false
}

// Observe records which identities are attached, and requeues the pods that the change affects. now has these
// identities by folded ID. updating says that Azure is updating the machine. An identity that was not attached before
// the update may then not be usable yet, so Observe does not record it as attached. If it is not known what was
// attached before, Observe records all identities.
func (m *Machine) Observe(now map[string]azure.Identity, updating bool) {
	defer m.lock()()
	requeueAll := !m.known || m.problem != ""
	before := m.attached
	if updating && m.known {
		now = maps.Clone(now)
		maps.DeleteFunc(now, func(id string, _ azure.Identity) bool {
			_, was := before[id]
			return !was
		})
	}
	m.attached, m.known, m.problem = now, true, ""
	for id, u := range m.identities {
		_, was := before[id]
		_, is := now[id]
		if is && len(u.users) > 0 {
			u.refusal = nil // Azure attached it after all; a refusal to detach an unused identity stays
		}
		if was && !is {
			for pod := range u.users { // the assignments of these pods may still say Assigned
				m.tracker.requeue.Pod(pod)
			}
		}
		if requeueAll || was != is || u.detaching {
			m.tracker.requeueWaiters(u)
		}
		u.detaching = false
	}
}

// SetLedger records which identities are in the ledger, and requeues the pods that the change affects. attached has the
// resource IDs of these identities by folded ID.
func (m *Machine) SetLedger(attached map[string]string) {
	defer m.lock()()
	before := m.inLedger
	m.inLedger = make(map[string]bool, len(attached))
	for identity, id := range attached {
		m.inLedger[identity] = true
		u := m.use(identity, id)
		u.fromLegacy = false
		if len(u.users) == 0 && u.unusedSince.IsZero() {
			u.unusedSince = time.Now()
		}
	}
	for id, u := range m.identities {
		if before == nil || before[id] != m.inLedger[id] {
			m.tracker.requeueWaiters(u)
		}
	}
}

// SetProblem records why MIC cannot read or update the machine, and requeues the pods that wait for a change of an
// identity.
func (m *Machine) SetProblem(problem string) {
	defer m.lock()()
	if m.problem == problem {
		return
	}
	m.problem = problem
	for _, u := range m.identities {
		m.tracker.requeueWaiters(u)
	}
}

// Adopted returns the identities that AdoptLegacy recorded and that are not in the ledger yet: IDs by folded ID.
func (m *Machine) Adopted() map[string]string {
	defer m.lock()()
	found := map[string]string{}
	for identity, u := range m.identities {
		if u.fromLegacy {
			found[identity] = u.id
		}
	}
	return found
}

// StartDetaching returns the identities of remove that no pod needs, and marks them as being detached. Until the next
// Observe, Status does not report them as attached.
func (m *Machine) StartDetaching(remove []string) []string {
	defer m.lock()()
	return slices.DeleteFunc(slices.Clone(remove), func(id string) bool {
		u := m.identities[azure.Fold(id)]
		if u == nil {
			return false
		}
		u.detaching = len(u.users) == 0
		return !u.detaching
	})
}

// SetAside records that Azure refused an identity. It returns the time before which MIC does not try the identity
// again, and how many times in a row Azure has refused it.
func (m *Machine) SetAside(identity, message string) (retryAfter time.Time, times int) {
	defer m.lock()()
	u := m.use(identity, identity)
	r := &Refusal{Message: message, Times: 1}
	if u.refusal != nil {
		r.Times = u.refusal.Times + 1
	}
	r.RetryAfter = time.Now().Add(refusalBackoff.After(r.Times))
	u.refusal = r
	m.tracker.requeueWaiters(u)
	return r.RetryAfter, r.Times
}

// View returns a View for Decide that contains only Identities; the caller adds the other fields. The Tracker then
// forgets identities to which nothing refers any more.
func (m *Machine) View() View {
	defer m.lock()()
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

// Drop removes the machine from the Tracker if nothing refers to it, and reports whether it did. hasLedger says whether
// the machine has or may have a ledger.
func (m *Machine) Drop(hasLedger bool) bool {
	defer m.lock()()
	maps.DeleteFunc(m.identities, m.unneeded)
	if len(m.identities) > 0 || len(m.inLedger) > 0 || hasLedger {
		return false
	}
	delete(m.tracker.machines, m.Key)
	return true
}

// Users lists the pods that need an identity, or some of them if there are many, as text. It returns "" if there is
// none.
func (m *Machine) Users(identity string) string {
	defer m.lock()()
	u := m.identities[identity]
	if u == nil || len(u.users) == 0 {
		return ""
	}
	pods := slices.Sorted(maps.Keys(u.users))
	const maxPods = 5
	if n := len(pods); n > maxPods {
		return fmt.Sprintf("pods %s and %d more", strings.Join(pods[:maxPods], ", "), n-maxPods)
	}
	return "pod " + strings.Join(pods, ", ")
}
