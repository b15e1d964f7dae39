// Package limit bounds how many connections and waiting requests NMI admits, in total and from one source. It protects
// the pods of a node against one pod that opens so many connections that none are left for the others.
package limit

import (
	"net/netip"
	"sync"
)

// Limits of concurrent connections, in total and from one source. A client library needs one or two; a pod with many
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

// Source is whose connections and requests are counted together: those of one pod, or of one address if NMI does not know
// the pod from the connection.
type Source struct {
	PodUID  string
	Address netip.Addr // the zero value if PodUID is set: all pods in the host network have the same address
}

// Limiter counts the connections or requests in use, in total and by source. It is safe for concurrent use.
type Limiter struct {
	max, maxPerSource int

	mu       sync.Mutex
	inUse    int
	bySource map[Source]int
}

// New returns a limiter with these limits.
func New(maxTotal, maxPerSource int) *Limiter {
	return &Limiter{max: maxTotal, maxPerSource: maxPerSource, bySource: map[Source]int{}}
}

// Acquire reserves one connection or request for the source. It returns false if a limit is reached. Otherwise the
// caller must call Release once.
func (l *Limiter) Acquire(source Source) bool {
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
func (l *Limiter) Release(source Source) {
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
