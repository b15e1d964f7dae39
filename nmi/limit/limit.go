// Package limit bounds how many connections and how many waiting requests NMI admits, over all pods and from one
// address. It protects against one pod that takes the listener of the node from the others.
package limit

import (
	"net/netip"
	"sync"
)

// Connections that may be open at the same time: over all pods, and from one address. A client library needs one or
// two; a pod with many processes may need dozens. Each carries one request at a time, so this bounds requests, too.
const (
	MaxConnections          = 4096
	MaxConnectionsPerSource = 64
)

// Requests that wait for an assignment at the same time: over all pods, and from one address. It is half of the
// connections that there may be, so that those who have nothing to wait for find a place in the other half. Beyond
// that, clients are told to come again.
const (
	MaxWaits          = MaxConnections / 2
	MaxWaitsPerSource = MaxConnectionsPerSource / 2
)

// Limiter is a number of places, of which one source may take some. Who has one gives it back once.
type Limiter struct {
	max, maxPerSource int

	mu       sync.Mutex
	inUse    int
	bySource map[netip.Addr]int
}

// New returns so many places.
func New(max, maxPerSource int) *Limiter {
	return &Limiter{max: max, maxPerSource: maxPerSource, bySource: map[netip.Addr]int{}}
}

// Acquire reports whether there was one left.
func (l *Limiter) Acquire(a netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.inUse >= l.max || l.bySource[a] >= l.maxPerSource {
		return false
	}
	l.inUse++
	l.bySource[a]++
	return true
}

// Release gives a place back that Acquire gave.
func (l *Limiter) Release(a netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.inUse--
	if l.bySource[a]--; l.bySource[a] == 0 {
		delete(l.bySource, a)
	}
}

// InUse is how many places are taken, and by how many sources.
func (l *Limiter) InUse() (places, sources int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.inUse, len(l.bySource)
}
