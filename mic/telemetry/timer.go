package telemetry

import (
	"sync"
	"time"
)

// AssignmentTimer measures how long scheduled pods wait for their identities. It ignores pods that were scheduled
// before Start, because MIC does not know how long they have waited. The zero value is ready for use.
type AssignmentTimer struct {
	mu    sync.Mutex
	since map[string]time.Time // by pod
}

// Start starts to measure pods that are scheduled from now on.
func (t *AssignmentTimer) Start() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.since = map[string]time.Time{}
}

// Scheduled records that a pod was scheduled now.
func (t *AssignmentTimer) Scheduled(pod string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.since != nil {
		t.since[pod] = time.Now()
	}
}

// Done forgets a pod. If it has its identities, and its wait was measured, Done calls observe with the wait.
func (t *AssignmentTimer) Done(pod string, assigned bool, observe func(time.Duration)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	since, ok := t.since[pod]
	delete(t.since, pod)
	if ok && assigned {
		observe(time.Since(since))
	}
}
