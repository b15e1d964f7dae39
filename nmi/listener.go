package nmi

import (
	"net"
	"net/netip"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// Connections that may be open at the same time: over all pods, and from one address. A client library needs one or
// two; a pod with many processes may need dozens. Each carries one request at a time, so this bounds requests, too.
const (
	maxConnections          = 4096
	maxConnectionsPerSource = 64
)

// places is a number of places, of which one source may take some. Who has one gives it back once.
type places struct {
	most, mostPerSource int

	mu    sync.Mutex
	taken int
	from  map[netip.Addr]int
}

func newPlaces(most, mostPerSource int) *places {
	return &places{most: most, mostPerSource: mostPerSource, from: map[netip.Addr]int{}}
}

// take reports whether there was one left.
func (p *places) take(a netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken >= p.most || p.from[a] >= p.mostPerSource {
		return false
	}
	p.taken++
	p.from[a]++
	return true
}

func (p *places) giveBack(a netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken--
	if p.from[a]--; p.from[a] == 0 {
		delete(p.from, a)
	}
}

// fairListener closes connections beyond the limits as soon as they are made, so that one pod cannot take the
// listener from the others.
type fairListener struct {
	net.Listener
	places  *places
	refused prometheus.Counter
}

func newFairListener(l net.Listener, refused prometheus.Counter) *fairListener {
	return &fairListener{Listener: l, places: newPlaces(maxConnections, maxConnectionsPerSource), refused: refused}
}

// Accept returns the next connection within the limits.
func (l *fairListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer, err := netip.ParseAddrPort(conn.RemoteAddr().String())
		if err != nil || !l.places.take(peer.Addr()) {
			l.refused.Inc()
			_ = conn.Close()
			continue
		}
		return &fairConn{Conn: conn, leave: sync.OnceFunc(func() { l.places.giveBack(peer.Addr()) })}, nil
	}
}

type fairConn struct {
	net.Conn
	leave func()
}

// Close gives the place back.
func (c *fairConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
