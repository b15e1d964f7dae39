package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/nmi/limit"
)

// Listeners are the open ports of NMI. profile is nil unless profiling is enabled.
type Listeners struct{ probes, metrics, profile, pods net.Listener }

// Listen opens the ports. It opens the port for pods last, because this is the only port for which it changes the node:
// it calls ensureLink, which creates the network link with the listen address. If Listen fails, it closes the ports
// that it opened.
func Listen(ctx context.Context, cfg Config, ensureLink func(context.Context) error) (*Listeners, error) {
	l := &Listeners{}
	if err := l.open(ctx, cfg, ensureLink); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func (l *Listeners) open(ctx context.Context, cfg Config, ensureLink func(context.Context) error) (err error) {
	if l.probes, err = listen("127.0.0.1", cfg.ProbePort, "--http-probe-port"); err != nil {
		return err
	}
	if l.metrics, err = listen("", cfg.PrometheusPort, "--prometheus-port"); err != nil {
		return err
	}
	if cfg.Profile {
		if l.profile, err = listen("127.0.0.1", ProfilePort, "--enable-profile"); err != nil {
			return err
		}
	}
	l.pods, err = listenForPods(ctx, cfg.Listen, ensureLink)
	return err
}

// Close closes the ports that are open.
func (l *Listeners) Close() {
	for _, listener := range []net.Listener{l.probes, l.metrics, l.profile, l.pods} {
		if listener != nil {
			_ = listener.Close()
		}
	}
}

func listen(host string, port int, flag string) (net.Listener, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return nil, listenError(flag, err)
	}
	return l, nil
}

func listenError(flag string, err error) error {
	return fmt.Errorf("listening on the port of %s: %w; check whether another NMI runs on this node, or another program uses the port", flag, err)
}

// listenForPods opens the port for pods and then calls ensureLink, which creates the network link with the address. In
// this order, a port that is in use is an error before anything is changed on the node. IP_FREEBIND permits listening on
// an address that does not exist yet.
func listenForPods(ctx context.Context, address netip.AddrPort, ensureLink func(context.Context) error) (net.Listener, error) {
	beforeLink := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) })
		return errors.Join(err, failed)
	}}
	l, err := beforeLink.Listen(ctx, "tcp4", address.String())
	if err != nil {
		return nil, listenError("--nmi-port", err)
	}
	if err := ensureLink(ctx); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// limitedListener closes connections beyond the limits at once, so that one pod cannot use up the connections of the others.
type limitedListener struct {
	net.Listener
	limiter *limit.Limiter
	refused prometheus.Counter
}

func newLimitedListener(l net.Listener, refused prometheus.Counter) *limitedListener {
	return &limitedListener{Listener: l, limiter: limit.New(limit.MaxConnections, limit.MaxConnectionsPerSource), refused: refused}
}

// Accept returns the next connection that is within the limits.
func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer, err := netip.ParseAddrPort(conn.RemoteAddr().String())
		if err != nil || !l.limiter.Acquire(peer.Addr()) {
			l.refused.Inc()
			_ = conn.Close()
			continue
		}
		return &limitedConn{Conn: conn, release: sync.OnceFunc(func() { l.limiter.Release(peer.Addr()) })}, nil
	}
}

// limitedConn is a connection that counts against the limits until it is closed.
type limitedConn struct {
	net.Conn
	release func()
}

// Close closes the connection. It may be called several times; only the first call reduces the counts of open connections.
func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
