package cluster

import (
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/resourceversion"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// WriteTTL is the longest time for which AssignmentsOf returns the response to a write of this process instead of the
// object in the cache. The watch may never deliver a written object, for example if the object was deleted while the
// watch was disconnected.
const WriteTTL = 30 * time.Second

// ownWrites has the AzureAssignedIdentity objects from the responses to writes of this process. It keeps each object
// until the watch delivers the same version or a newer one, so that each reconcile of a pod sees the writes before it.
type ownWrites struct {
	mu      sync.Mutex
	byPod   map[string][]*ownWrite
	deleted []deletedAssignment // assignments that the watch recently reported as deleted, oldest first
	// released has the UIDs of assignments whose last finalizer this process removed, and which the watch has not
	// reported as deleted yet.
	released map[string]struct{}
}

// deletedAssignment is an assignment that the watch reported as deleted.
type deletedAssignment struct {
	key, resourceVersion string
	at                   time.Time
}

// ownWrite is an assignment from the response to a write.
type ownWrite struct {
	*Assignment
	expires time.Time
}

func newOwnWrites() ownWrites {
	return ownWrites{byPod: map[string][]*ownWrite{}, released: map[string]struct{}{}}
}

// overlay returns the assignments of a pod. observed are those that the watch delivered. overlay adds each ownWrite
// that has not expired, or replaces an older version in observed by it. It leaves out the assignments in released.
func (w *ownWrites) overlay(pod string, observed []*Assignment) []*Assignment {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	observed = slices.DeleteFunc(observed, func(a *Assignment) bool {
		_, released := w.released[a.UID]
		return released
	})
	for _, own := range w.byPod[pod] {
		i := slices.IndexFunc(observed, func(a *Assignment) bool { return a.Key() == own.Key() })
		switch {
		case now.After(own.expires):
		case i < 0:
			observed = append(observed, own.Assignment)
		case newer(own.ResourceVersion, observed[i].ResourceVersion):
			observed[i] = own.Assignment
		}
	}
	return observed
}

// recordReleased records that this process removed the last finalizer of an assignment that is being deleted, unless
// the watch has already reported the assignment as deleted.
func (w *ownWrites) recordReleased(a *Assignment) {
	w.drop(a.Pod, a.Key(), "")
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.ContainsFunc(w.deleted, func(d deletedAssignment) bool { return d.key == a.Key() }) {
		w.released[a.UID] = struct{}{}
	}
}

// record records o, the response to a write, unless the watch has delivered the same version or a newer one, or has
// reported the assignment as deleted. observed is the object that the watch delivered last, or nil. record returns the
// written assignment in any case.
func (w *ownWrites) record(o *v1.AzureAssignedIdentity, observed *Assignment) *Assignment {
	a := trimAssignment(o)
	w.drop(a.Pod, a.Key(), "")
	w.mu.Lock()
	defer w.mu.Unlock()
	deleted := slices.ContainsFunc(w.deleted, func(d deletedAssignment) bool {
		return d.key == a.Key() && !newer(a.ResourceVersion, d.resourceVersion)
	})
	if !deleted && (observed == nil || newer(a.ResourceVersion, observed.ResourceVersion)) {
		w.byPod[a.Pod] = append(w.byPod[a.Pod], &ownWrite{a, time.Now().Add(WriteTTL)})
	}
	return a
}

// observe handles an event of the watch for a. It drops the ownWrite of this assignment, unless the ownWrite is newer
// than a. If deleted is true, it drops the ownWrite in any case.
func (w *ownWrites) observe(a *Assignment, deleted bool) {
	version := a.ResourceVersion
	if deleted {
		version = ""
		w.recordDeleted(a)
	}
	w.drop(a.Pod, a.Key(), version)
}

// recordDeleted remembers for at least WriteTTL that the watch reported an assignment as deleted. The response to a
// write before the deletion may arrive after this event, and record must ignore that response.
func (w *ownWrites) recordDeleted(a *Assignment) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	recent := slices.IndexFunc(w.deleted, func(d deletedAssignment) bool { return now.Sub(d.at) < WriteTTL })
	if recent < 0 {
		recent = len(w.deleted)
	}
	w.deleted = append(slices.Delete(w.deleted, 0, recent), deletedAssignment{a.Key(), a.ResourceVersion, now})
	delete(w.released, a.UID)
}

// unobserved reports whether this process wrote assignments of a pod that the watch has not delivered yet.
func (w *ownWrites) unobserved(pod string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.byPod[pod]) > 0
}

// drop removes the ownWrite of an assignment, unless the ownWrite is newer than version. If version is "", drop removes
// it in any case.
func (w *ownWrites) drop(pod, key, version string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	writes, ok := w.byPod[pod]
	if !ok {
		return
	}
	writes = slices.DeleteFunc(writes, func(own *ownWrite) bool { return own.Key() == key && !newer(own.ResourceVersion, version) })
	if len(writes) == 0 {
		delete(w.byPod, pod)
	} else {
		w.byPod[pod] = writes
	}
}

// newer reports whether resourceVersion a is newer than b. It returns false if either is "" or cannot be compared.
func newer(a, b string) bool {
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order > 0
}
