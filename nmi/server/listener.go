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

// limitedListener closes connections beyond the limits as soon as they are made, so that one pod cannot take the
// listener from the others.
type limitedListener struct {
	net.Listener
	limiter *limit.Limiter
	refused prometheus.Counter
}

func newLimitedListener(l net.Listener, refused prometheus.Counter) *limitedListener {
	return &limitedListener{Listener: l, limiter: limit.New(limit.MaxConnections, limit.MaxConnectionsPerSource), refused: refused}
}

// Accept returns the next connection within the limits.
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

type limitedConn struct {
	net.Conn
	release func()
}

// Close gives the place back.
func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// Listeners are what NMI listens on. profile is nil unless it is switched on.
type Listeners struct{ probes, metrics, profile, pods net.Listener }

// Close closes those that are open.
func (l *Listeners) Close() {
	for _, one := range []net.Listener{l.probes, l.metrics, l.profile, l.pods} {
		if one != nil {
			_ = one.Close()
		}
	}
}

// Listen opens them, those of the pods last: until then nothing has been changed on the node. ensureLink makes the link
// that has the listen address.
func Listen(ctx context.Context, cfg Config, ensureLink func(context.Context) error) (*Listeners, error) {
	l := &Listeners{}
	var err error
	if l.probes, err = listen("127.0.0.1", cfg.ProbePort, "--http-probe-port"); err != nil {
		return l, err
	}
	if l.metrics, err = listen("", cfg.PrometheusPort, "--prometheus-port"); err != nil {
		return l, err
	}
	if cfg.Profile {
		if l.profile, err = listen("127.0.0.1", ProfilePort, "--enable-profile"); err != nil {
			return l, err
		}
	}
	l.pods, err = listenForPods(ctx, cfg.Listen, ensureLink)
	return l, err
}

func listen(host string, port int, flag string) (net.Listener, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return nil, inUse(flag, err)
	}
	return l, nil
}

func inUse(flag string, err error) error {
	return fmt.Errorf("%s: %w; is another NMI running on this node, or something else on that port?", flag, err)
}

// listenForPods listens on the listen address, and then makes the link that has it. In this order a port that is in use
// is found out while nothing has been changed on the node.
func listenForPods(ctx context.Context, address netip.AddrPort, ensureLink func(context.Context) error) (net.Listener, error) {
	early := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) })
		return errors.Join(err, failed)
	}}
	l, err := early.Listen(ctx, "tcp4", address.String())
	if err != nil {
		return nil, inUse("--nmi-port", err)
	}
	if err := ensureLink(ctx); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
