package mic

import (
	"maps"
	"slices"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// What the reconcile of a machine tells the fleet, and asks of it.

// Azure is asked again for an identity that it refused after asideFirst, then after twice as long each time.
const asideFirst, asideMost = 30 * time.Second, 15 * time.Minute

// rest has a machine left alone for a while, whatever wakes it. 0 ends that.
func (f *fleet) rest(key string, d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.machines[key]; m != nil {
		m.rested = time.Now().Add(d)
	}
}

// resting is how long that still is.
func (f *fleet) resting(key string) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return time.Until(f.machines[key].rested)
}

// gathering is how long is to be waited for more needs before a machine is changed.
func (f *fleet) gathering(key string) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	return min(time.Until(m.lastNeed.Add(burst)), time.Until(m.firstNeed.Add(gatherMost)))
}

// gathered notes that an update begins, or that none is needed.
func (f *fleet) gathered(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	m.firstNeed, m.lastNeed = time.Time{}, time.Time{}
}

func (f *fleet) isKnown(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.machines[key].known
}

// unclear notes that nobody knows for the moment what is attached.
func (f *fleet) unclear(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.machines[key].known = false
}

// saw notes what is attached to a machine, and wakes the pods for which that is news. While Azure is changing the
// machine, what is new may still be on its way, and does not count.
func (f *fleet) saw(key string, now map[string]azure.Identity, changing bool) {
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
	for id, u := range m.uses {
		_, was := before[id]
		_, is := now[id]
		if is {
			u.refused = f.pardon(u)
		}
		if was && !is {
			for pod := range u.users { // somebody else took it away, and they still have it in writing
				f.wakePod(pod)
			}
		}
		if news || was != is || u.leaving {
			f.wake(u)
		}
		u.leaving = false
	}
}

// pardon forgets a refusal to attach what is attached; one to detach stays.
func (f *fleet) pardon(u *use) *refusal {
	if len(u.users) > 0 {
		return nil
	}
	return u.refused
}

// setOurs notes what the ledger says, and wakes the pods for which that is news.
func (f *fleet) setOurs(key string, attached map[string]string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	before := m.ours
	m.ours = make(map[string]bool, len(attached))
	for id, spelled := range attached {
		m.ours[id] = true
		u := m.use(id, spelled)
		u.adopted = false
		if len(u.users) == 0 && u.unused.IsZero() {
			u.unused = time.Now()
		}
	}
	for id, u := range m.uses {
		if before == nil || before[id] != m.ours[id] {
			f.wake(u)
		}
	}
}

// setProblem notes why Azure does nothing for a machine, for those who wait.
func (f *fleet) setProblem(key, problem string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	if m == nil || m.problem == problem {
		return
	}
	m.problem = problem
	for _, u := range m.uses {
		f.wake(u)
	}
}

// adopted returns what has to be entered into the ledger of a machine, as spelled.
func (f *fleet) adopted(key string) map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	found := map[string]string{}
	for id, u := range f.machines[key].uses {
		if u.adopted {
			found[id] = u.id
		}
	}
	return found
}

// leave marks identities as leaving, but for those that a pod wants, and returns them. From then on no pod takes them
// for attached.
func (f *fleet) leave(key string, remove []string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[key]
	return slices.DeleteFunc(slices.Clone(remove), func(id string) bool {
		u := m.uses[azure.Fold(id)]
		if u == nil {
			return false
		}
		u.leaving = len(u.users) == 0
		return !u.leaving
	})
}

// refuse sets an identity aside.
func (f *fleet) refuse(key, id, message string) (until time.Time, times int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	u := f.machines[key].use(id, id)
	r := &refusal{message: message, times: 1}
	if u.refused != nil {
		r.times = u.refused.times + 1
	}
	r.until = time.Now().Add(backoff(r.times, asideFirst, asideMost))
	u.refused = r
	f.wake(u)
	return r.until, r.times
}
