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

// fairListener closes connections beyond the limits as soon as they are made, so that one pod cannot take the
// listener from the others.
type fairListener struct {
	net.Listener
	refused prometheus.Counter

	mu    sync.Mutex
	total int
	from  map[netip.Addr]int
}

func newFairListener(l net.Listener, refused prometheus.Counter) *fairListener {
	return &fairListener{Listener: l, refused: refused, from: map[netip.Addr]int{}}
}

// Accept returns the next connection within the limits.
func (l *fairListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer, err := netip.ParseAddrPort(conn.RemoteAddr().String())
		if err != nil || !l.admit(peer.Addr()) {
			l.refused.Inc()
			_ = conn.Close()
			continue
		}
		return &fairConn{Conn: conn, leave: sync.OnceFunc(func() { l.leave(peer.Addr()) })}, nil
	}
}

func (l *fairListener) admit(a netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= maxConnections || l.from[a] >= maxConnectionsPerSource {
		return false
	}
	l.total++
	l.from[a]++
	return true
}

func (l *fairListener) leave(a netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.from[a]--; l.from[a] == 0 {
		delete(l.from, a)
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
