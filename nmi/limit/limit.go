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
	MaxWaiting          = MaxConnections / 2
	MaxWaitingPerSource = MaxConnectionsPerSource / 2
)

// Places is a number of places, of which one source may take some. Who has one gives it back once.
type Places struct {
	most, mostPerSource int

	mu    sync.Mutex
	taken int
	from  map[netip.Addr]int
}

// NewPlaces returns so many places.
func NewPlaces(most, mostPerSource int) *Places {
	return &Places{most: most, mostPerSource: mostPerSource, from: map[netip.Addr]int{}}
}

// Take reports whether there was one left.
func (p *Places) Take(a netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken >= p.most || p.from[a] >= p.mostPerSource {
		return false
	}
	p.taken++
	p.from[a]++
	return true
}

// GiveBack gives a place back that Take gave.
func (p *Places) GiveBack(a netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken--
	if p.from[a]--; p.from[a] == 0 {
		delete(p.from, a)
	}
}

// Taken is how many places are taken, and by how many sources.
func (p *Places) Taken() (places, sources int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken, len(p.from)
}
