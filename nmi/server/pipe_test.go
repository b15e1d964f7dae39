package server

import (
	"context"
	"net"
	"net/netip"
	"sync"
)

// pipeListener is an in-memory listener. All of its connections come from one address.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
	from   net.Addr
}

func newPipeListener(from string) *pipeListener {
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{}), from: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from))}
	l.close = sync.OnceFunc(func() { close(l.closed) })
	return l
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.close(); return nil }
func (l *pipeListener) Addr() net.Addr { return l.from }

func (l *pipeListener) dial(context.Context, string, string) (net.Conn, error) {
	near, far := net.Pipe()
	l.conns <- pipeConn{far, l.from}
	return near, nil
}

type pipeConn struct {
	net.Conn
	from net.Addr
}

func (c pipeConn) RemoteAddr() net.Addr { return c.from }
