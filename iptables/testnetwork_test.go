package iptables

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/podidentity/podidentity/internal/netnstest"
)

// shortTimeout bounds waiting for a packet that must not arrive; longTimeout for one that must.
const (
	shortTimeout = 300 * time.Millisecond
	longTimeout  = 30 * time.Second
)

// testNetwork is the network that buildNetwork builds, with its servers. Tests run in the namespace of the node.
type testNetwork struct {
	t       *testing.T
	backend Backend
	azure   *server
	nmi     *server
	capture *Capture
}

// onBothBackends runs body for each back end, each in a new network in which nothing is installed yet.
func onBothBackends(t *testing.T, body func(t *testing.T, w *testNetwork)) {
	for _, backend := range []Backend{BackendNFT, BackendLegacy} {
		t.Run(string(backend), func(t *testing.T) {
			netnstest.RunIsolated(t, func(t *testing.T) {
				buildNetwork(t)
				w := &testNetwork{t: t, backend: backend}
				netnstest.OnThreadIn(t, "azure", func() { w.azure = serve(t, "azure", testMetadata.String()) })
				w.capture = w.newCapture(testListen)
				body(t, w)
			})
		})
	}
}

func (w *testNetwork) newCapture(listen netip.AddrPort) *Capture {
	w.t.Helper()
	c, err := New(Config{MetadataIP: testMetadata.Addr(), MetadataPort: testMetadata.Port(), Listen: listen, Backend: w.backend})
	if err != nil {
		w.t.Fatal(err)
	}
	// Some tests use two Captures at the same time. On a busy computer a repair can take longer than lockTimeout. A
	// Capture that waited that long would continue without the lock and disturb the repair, so this lock waits longer.
	c.lock = func(ctx context.Context, log *zap.Logger, _ time.Duration) (func(), error) {
		return acquireLock(ctx, log, 2*time.Minute)
	}
	return c
}

// install does what NMI does at its start: link, listener, rules.
func (w *testNetwork) install() {
	w.t.Helper()
	if err := w.capture.EnsureLink(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	w.nmi = serve(w.t, "nmi", testListen.String())
	if err := w.capture.Install(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	w.verify()
}

func (w *testNetwork) verify() {
	w.t.Helper()
	if err := w.capture.Verify(context.Background()); err != nil {
		w.t.Error(err)
	}
}

func (w *testNetwork) sync() []string {
	w.t.Helper()
	repaired, err := w.capture.Sync(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	return repaired
}

func (w *testNetwork) iptables(args ...string) string {
	w.t.Helper()
	return netnstest.Run(w.t, "iptables-"+string(w.backend), args...)
}

var (
	dumpComment  = regexp.MustCompile(`(?m)^#.*\n`)
	dumpCounters = regexp.MustCompile(`\[\d+:\d+\]`)
)

// dump is what iptables-save prints, without times and counters.
func (w *testNetwork) dump() string {
	w.t.Helper()
	text := netnstest.Run(w.t, "iptables-"+string(w.backend)+"-save")
	return dumpCounters.ReplaceAllString(dumpComment.ReplaceAllString(text, ""), "[0:0]")
}

// podPackets returns the sum of the two counters of buildNetwork. It is greater than 0 if a packet arrived at Azure
// from a pod, or for the metadata address from any sender except the node. A packet to which both apply counts twice.
func (w *testNetwork) podPackets() (total int) {
	w.t.Helper()
	netnstest.OnThreadIn(w.t, "azure", func() {
		for line := range strings.Lines(netnstest.Run(w.t, "iptables-nft", "-t", "raw", "-L", "PREROUTING", "-v", "-x", "-n")) {
			fields := strings.Fields(line)
			if n, err := strconv.Atoi(fields[0]); err == nil {
				total += n
			}
		}
	})
	return total
}

// connect connects from a namespace ("" is the node) and returns the greeting of the server: its name and the client's
// address.
func (w *testNetwork) connect(from, to string, timeout time.Duration) (greeting string, err error) {
	w.t.Helper()
	dial := func() {
		var conn net.Conn
		if conn, err = net.DialTimeout("tcp4", to, timeout); err != nil {
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(timeout))
		greeting, err = bufio.NewReader(conn).ReadString('\n')
	}
	if from == "" {
		dial()
	} else {
		netnstest.OnThreadIn(w.t, from, dial)
	}
	return strings.TrimSpace(greeting), err
}

func (w *testNetwork) wantGreeting(from, to, want string) {
	w.t.Helper()
	if got, err := w.connect(from, to, longTimeout); err != nil || got != want {
		w.t.Errorf("from %q to %s: got %q, %v; want %q", from, to, got, err, want)
	}
}

func (w *testNetwork) wantNoGreeting(from, to string) {
	w.t.Helper()
	if got, err := w.connect(from, to, shortTimeout); err == nil {
		w.t.Errorf("from %q to %s: got %q; want no answer", from, to, got)
	}
}

// server greets each connection with its own name and the client's address, and then echoes what it receives.
type server struct {
	listener net.Listener
	mu       sync.Mutex
	accepted int
	received int
}

func serve(t *testing.T, name, address string) *server {
	t.Helper()
	listener, err := net.Listen("tcp4", address)
	if err != nil {
		t.Errorf("starting %s: %v", name, err)
		return &server{}
	}
	t.Cleanup(func() { listener.Close() })
	s := &server{listener: listener}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.accepted++
			s.mu.Unlock()
			go func() {
				defer conn.Close()
				host, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
				fmt.Fprintf(conn, "%s %s\n", name, host)
				io.Copy(io.MultiWriter(conn, s), conn)
			}()
		}
	}()
	return s
}

// Write counts the received bytes.
func (s *server) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.received += len(p)
	return len(p), nil
}

func (s *server) counts() (accepted, received int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.accepted, s.received
}
