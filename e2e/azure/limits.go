package azure

import (
	"sync"
	"time"
)

// limiter enforces the limits that the real IMDS has for each virtual machine: 20 token
// requests a second, 5 concurrent token requests, and 5 other requests a second.
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
	tokenRequestsPerSecond  = 20
	concurrentTokenRequests = 5
	otherRequestsPerSecond  = 5
)

func newLimiter(now func() time.Time) *limiter {
	return &limiter{now: now, nodes: map[string]*nodeLimits{}}
}

// admit counts a request against the limits of the node. If enforce is true and the
// request exceeds a limit, admit refuses the request: ok is false, and the request does
// not count. admit counts also while enforce is false, so that the counts are right when a
// test enables the limits later. The caller must call release after the request.
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
	if enforce && (n.running >= concurrentTokenRequests || n.token.count(now) >= tokenRequestsPerSecond) {
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
