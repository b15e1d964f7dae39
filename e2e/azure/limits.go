package azure

import (
	"sync"
	"time"
)

// limiter keeps Azure's limits for one virtual machine each: 20 token requests
// a second and 5 at once, and 5 a second of everything else. What it refuses
// does not count against the next second.
type limiter struct {
	now   func() time.Time
	mu    sync.Mutex
	nodes map[string]*nodeLimits
}

type nodeLimits struct {
	token, other window
	running      int
}

const (
	tokenRequestsPerSecond = 20
	tokenRequestsAtOnce    = 5
	otherRequestsPerSecond = 5
)

func newLimiter(now func() time.Time) *limiter {
	return &limiter{now: now, nodes: map[string]*nodeLimits{}}
}

// admit takes a place for a request, whether or not limits are enforced, so
// that switching them on midway counts right. The place must be given back.
func (l *limiter) admit(node, class string, enforce bool) (release func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, found := l.nodes[node]
	if !found {
		n = &nodeLimits{}
		l.nodes[node] = n
	}
	now := l.now()
	if class != classToken {
		if enforce && n.other.count(now) >= otherRequestsPerSecond {
			return func() {}, false
		}
		n.other.add(now)
		return func() {}, true
	}
	if enforce && (n.running >= tokenRequestsAtOnce || n.token.count(now) >= tokenRequestsPerSecond) {
		return func() {}, false
	}
	n.token.add(now)
	n.running++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		n.running--
	}, true
}
