// Package limit bounds how many connections and waiting requests NMI admits, in total and from one address. It protects
// the pods of a node against one pod that opens so many connections that none are left for the others.
package limit

import (
	"net/netip"
	"sync"
)

// Limits of concurrent connections, in total and from one address. A client library needs one or two; a pod with many
// processes may need dozens. A connection carries one request at a time, so these limits also bound the requests.
const (
	MaxConnections          = 4096
	MaxConnectionsPerSource = 64
)

// Limits of concurrent requests that wait for an assignment. They are half of the limits of connections, so that NMI
// still admits requests that need not wait. Instead of exceeding these limits, NMI responds at once that the client
// must retry.
const (
	MaxWaits          = MaxConnections / 2
	MaxWaitsPerSource = MaxConnectionsPerSource / 2
)

// Limiter counts the connections or requests in use, in total and by source address. It is safe for concurrent use.
type Limiter struct {
	max, maxPerSource int

	mu       sync.Mutex
	inUse    int
	bySource map[netip.Addr]int
}

// New returns a limiter with these limits.
func New(maxTotal, maxPerSource int) *Limiter {
	return &Limiter{max: maxTotal, maxPerSource: maxPerSource, bySource: map[netip.Addr]int{}}
}

// Acquire reserves one connection or request for the source. It returns false if a limit is reached. Otherwise the
// caller must call Release once.
func (l *Limiter) Acquire(source netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.inUse >= l.max || l.bySource[source] >= l.maxPerSource {
		return false
	}
	l.inUse++
	l.bySource[source]++
	return true
}

// Release frees one connection or request that Acquire reserved for the source.
func (l *Limiter) Release(source netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.inUse--
	if l.bySource[source]--; l.bySource[source] == 0 {
		delete(l.bySource, source)
	}
}

// InUse returns the number of reservations, and the number of sources that have at least one.
func (l *Limiter) InUse() (total, sources int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.inUse, len(l.bySource)
}
