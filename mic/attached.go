package mic

import (
	"maps"
	"slices"
	"time"

	"github.com/podidentity/podidentity/internal/retry"
	"github.com/podidentity/podidentity/mic/azure"
)

// What the reconcile of a machine tells the fleet, and asks of it.

// refusalBackoff is how long MIC does not try an identity that Azure refused.
var refusalBackoff = retry.Backoff{Initial: 30 * time.Second, Max: 15 * time.Minute}

// rest has a machine left alone for a while, whatever wakes it. 0 ends that.
func (f *Tracker) SetRetryAfter(key string, d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.machines[key]; m != nil {
		m.retryAfter = time.Now().Add(d)
	}
}

// resting is how long that still is.
func (f *Tracker) RetryDelay(key string) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return time.Until(f.machines[key].retryAfter)
}

// gathering is how long is to be waited for more needs before a machine is changed.
func (f *Tracker) GatherDelay(key string) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	return min(time.Until(m.lastDemand.Add(quietTime)), time.Until(m.firstDemand.Add(maxGatherTime)))
}

// gathered notes that an update begins, or that none is needed.
func (f *Tracker) ResetGather(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	m.firstDemand, m.lastDemand = time.Time{}, time.Time{}
}

func (f *Tracker) Known(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.machines[key].known
}

// unclear notes that nobody knows for the moment what is attached.
func (f *Tracker) MarkUnknown(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.machines[key].known = false
}

// saw notes what is attached to a machine, and wakes the pods for which that is news. While Azure is changing the
// machine, what is new may still be on its way, and does not count.
func (f *Tracker) Observe(key string, now map[string]azure.Identity, changing bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	news := !m.known || m.problem != ""
	before := m.attached
	if changing && m.known {
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
		if is {
			u.refusal = f.keptRefusal(u)
		}
		if was && !is {
			for pod := range u.users { // somebody else took it away, and they still have it in writing
				f.requeuePod(pod)
			}
		}
		if news || was != is || u.detaching {
			f.requeueWaiters(u)
		}
		u.detaching = false
	}
}

// pardon forgets a refusal to attach what is attached; one to detach stays.
func (f *Tracker) keptRefusal(u *identityUse) *Refusal {
	if len(u.users) > 0 {
		return nil
	}
	return u.refusal
}

// setOurs notes what the ledger says, and wakes the pods for which that is news.
func (f *Tracker) SetLedger(key string, attached map[string]string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	before := m.inLedger
	m.inLedger = make(map[string]bool, len(attached))
	for id, spelled := range attached {
		m.inLedger[id] = true
		u := m.use(id, spelled)
		u.fromLegacy = false
		if len(u.users) == 0 && u.unusedSince.IsZero() {
			u.unusedSince = time.Now()
		}
	}
	for id, u := range m.identities {
		if before == nil || before[id] != m.inLedger[id] {
			f.requeueWaiters(u)
		}
	}
}

// setProblem notes why Azure does nothing for a machine, for those who wait.
func (f *Tracker) SetProblem(key, problem string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	if m == nil || m.problem == problem {
		return
	}
	m.problem = problem
	for _, u := range m.identities {
		f.requeueWaiters(u)
	}
}

// adopted returns what has to be entered into the ledger of a machine, as spelled.
func (f *Tracker) Adopted(key string) map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	found := map[string]string{}
	for id, u := range f.machines[key].identities {
		if u.fromLegacy {
			found[id] = u.id
		}
	}
	return found
}

// leave marks identities as leaving, but for those that a pod wants, and returns them. From then on no pod takes them
// for attached.
func (f *Tracker) StartDetaching(key string, remove []string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	return slices.DeleteFunc(slices.Clone(remove), func(id string) bool {
		u := m.identities[azure.Fold(id)]
		if u == nil {
			return false
		}
		u.detaching = len(u.users) == 0
		return !u.detaching
	})
}

// refuse sets an identity aside.
func (f *Tracker) SetAside(key, id, message string) (until time.Time, times int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	u := f.machines[key].use(id, id)
	r := &Refusal{Message: message, Times: 1}
	if u.refusal != nil {
		r.Times = u.refusal.Times + 1
	}
	r.RetryAfter = time.Now().Add(refusalBackoff.After(r.Times))
	u.refusal = r
	f.requeueWaiters(u)
	return r.RetryAfter, r.Times
}
