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
	"github.com/podidentity/podidentity/nmi/request"
)

// Listeners are the open ports of NMI. profile is nil unless profiling is enabled, identified unless Config.Identified is
// set.
type Listeners struct{ probes, metrics, profile, pods, identified net.Listener }

// Listen opens the ports. Then it calls ensureLink, which creates the network link with the listen address: a port that is
// in use is an error before anything is changed on the node. If Listen fails, it closes the ports
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
	// For arrivedOn.
	if l.pods, err = listenForPods(ctx, cfg.Listen, "--nmi-port", socketOption{unix.SOL_IP, unix.IP_PKTINFO}); err != nil {
		return err
	}
	if cfg.Identified.IsValid() {
		// For IdentifyCaller.
		if l.identified, err = listenForPods(ctx, cfg.Identified, "--nmi-bpf-port", socketOption{unix.IPPROTO_TCP, unix.TCP_SAVE_SYN}); err != nil {
			return err
		}
	}
	return ensureLink(ctx)
}

// Close closes the ports that are open.
func (l *Listeners) Close() {
	for _, listener := range []net.Listener{l.probes, l.metrics, l.profile, l.pods, l.identified} {
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

// socketOption is a socket option that is on or off.
type socketOption struct{ level, name int }

// listenForPods opens a port for pods whose connections have the option. IP_FREEBIND permits listening on an address that
// does not exist yet.
func listenForPods(ctx context.Context, address netip.AddrPort, flag string, option socketOption) (net.Listener, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			failed = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1), unix.SetsockoptInt(int(fd), option.level, option.name, 1))
		})
		return errors.Join(err, failed)
	}}
	// With Multipath TCP the packets of a connection can have several addresses, and the kernel saves no SYN.
	config.SetMultipathTCP(false)
	l, err := config.Listen(ctx, "tcp4", address.String())
	if err != nil {
		return nil, listenError(flag, err)
	}
	return l, nil
}

// limitedListener closes connections beyond the limits at once, so that one pod cannot use up the connections of the others.
// If identify is set, it also closes connections that identify does not identify.
type limitedListener struct {
	net.Listener
	limiter      *limit.Limiter
	refused      prometheus.Counter
	identify     func(net.Conn) (request.Caller, error) // may be nil
	unidentified prometheus.Counter
}

// limited returns the listener with the limits of limiter. identify may be nil.
func (s *Server) limited(l net.Listener, limiter *limit.Limiter, identify func(net.Conn) (request.Caller, error)) *limitedListener {
	return &limitedListener{Listener: l, limiter: limiter, refused: s.metrics.RefusedConnections, identify: identify, unidentified: s.metrics.Unidentified}
}

func newConnectionLimiter() *limit.Limiter {
	return limit.New(limit.MaxConnections, limit.MaxConnectionsPerSource)
}

// Accept returns the next connection that is identified, if it must be, and within the limits.
func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		caller, err := l.callerOf(conn)
		if err != nil {
			l.unidentified.Inc()
			_ = conn.Close()
			continue
		}
		source := caller.Source()
		if !l.limiter.Acquire(source) {
			l.refused.Inc()
			_ = conn.Close()
			continue
		}
		return &limitedConn{Conn: conn, caller: caller, release: sync.OnceFunc(func() { l.limiter.Release(source) })}, nil
	}
}

func (l *limitedListener) callerOf(conn net.Conn) (request.Caller, error) {
	if l.identify != nil {
		return l.identify(conn)
	}
	peer, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return request.Caller{}, err
	}
	return request.Caller{Address: peer.Addr().Unmap(), Interface: arrivedOn(conn)}, nil
}

// arrivedOn returns the index of the network interface on which the connection was opened, or -1 if the kernel does not
// say.
func arrivedOn(conn net.Conn) (index int) {
	index = -1
	tcp, ok := conn.(syscall.Conn)
	if !ok {
		return index
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return index
	}
	_ = raw.Control(func(fd uintptr) {
		// For a TCP socket IP_PKTOPTIONS has the control message of IP_PKTINFO: 16 bytes with its length, level and type, and
		// a struct in_pktinfo, which begins with the index. Package unix reads an option of this size only as this type.
		message, err := unix.GetsockoptICMPv6Filter(int(fd), unix.SOL_IP, unix.IP_PKTOPTIONS)
		if err == nil && message.Data[2] == unix.SOL_IP && message.Data[3] == unix.IP_PKTINFO && message.Data[4] != 0 {
			index = int(message.Data[4])
		}
	})
	return index
}

// limitedConn is a connection that counts against the limits until it is closed.
type limitedConn struct {
	net.Conn
	caller  request.Caller
	release func()
}

// callerKey is the key of the Caller in the context of a connection.
type callerKey struct{}

// withCaller adds the Caller of the connection to ctx. It is an http.Server's ConnContext.
func withCaller(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, callerKey{}, conn.(*limitedConn).caller)
}

// Close closes the connection. It may be called several times; only the first call reduces the counts of open connections.
func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
