package iptables

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/podidentity/podidentity/internal/netnstest"
	"github.com/podidentity/podidentity/internal/nodelink"
)

// sendOtherTraffic sends packets from the pod that are not TCP connections to the metadata port.
func (w *testNetwork) sendOtherTraffic() {
	w.t.Helper()
	w.wantNoGreeting("pod", "169.254.169.254:443")
	netnstest.OnThreadIn(w.t, "pod", func() {
		for network, address := range map[string]string{"udp4": "169.254.169.254:80", "ip4:icmp": "169.254.169.254", "ip4:132": "169.254.169.254"} {
			conn, err := net.Dial(network, address)
			if err != nil {
				w.t.Error(err)
				return
			}
			// An ICMP echo request; for the other protocols arbitrary bytes.
			if _, err := conn.Write([]byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}); err != nil {
				w.t.Errorf("%s: %v", network, err)
			}
			conn.Close()
		}
	})
}

func TestTrafficOfPodsIsCapturedButNotOfTheNode(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		// Check that the network works, so that packets that are missing later were blocked by our rules.
		w.wantGreeting("pod", "169.254.169.254:80", "azure "+podIP)
		w.wantGreeting("", "169.254.169.254:80", "azure "+nodeIP)
		before := w.podPackets()
		w.sendOtherTraffic()
		// On a busy computer the kernel delivers packets some time after the system call that sends them.
		sent := 0
		for deadline := time.Now().Add(longTimeout); sent < 4 && time.Now().Before(deadline); {
			sent = w.podPackets() - before
		}
		if sent < 4 {
			t.Fatalf("only %d packets of the pod arrived before installation; this test would prove nothing", sent)
		}

		w.install()
		before = w.podPackets()
		w.wantGreeting("pod", "169.254.169.254:80", "nmi "+podIP)
		w.sendOtherTraffic()
		w.wantGreeting("", "169.254.169.254:80", "azure "+nodeIP)
		w.wantGreeting("", testListen.String(), "nmi "+testListen.Addr().String())
		if leaked := w.podPackets() - before; leaked != 0 {
			t.Errorf("%d packets of the pod reached Azure", leaked)
		}
	})
}

func TestOnlyCapturedConnectionsReachTheListener(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		if err := w.capture.EnsureLink(context.Background()); err != nil {
			t.Fatal(err)
		}
		listener := serve(t, "nmi", testListen.String())
		w.wantGreeting("outside", testListen.String(), "nmi "+outsideIP) // Without rules the address is open to neighbors.
		w.wantGreeting("pod", testListen.String(), "nmi "+podIP)
		listener.listener.Close()

		w.install()
		w.wantNoGreeting("outside", testListen.String())
		w.wantNoGreeting("pod", testListen.String())
		if accepted, _ := w.nmi.counts(); accepted != 0 {
			t.Errorf("the listener accepted %d connections", accepted)
		}
		// A neighbor that sends the node a request for the metadata service is captured too, with its own address.
		w.wantGreeting("outside", "169.254.169.254:80", "nmi "+outsideIP)
	})
}

func TestAConnectionOpenedBeforeInstallationIsCutOff(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		// The kernel tracks connections only if a rule requires it, like those of kube-proxy on a node.
		w.iptables("-t", "nat", "-A", "POSTROUTING", "-s", "192.0.2.0/24", "-j", "MASQUERADE")
		var fromPod, fromNode net.Conn
		dial := func() net.Conn {
			conn, err := net.DialTimeout("tcp4", "169.254.169.254:80", longTimeout)
			if err != nil {
				t.Error(err)
				return nil
			}
			conn.SetDeadline(time.Now().Add(longTimeout))
			bufio.NewReader(conn).ReadString('\n')
			return conn
		}
		netnstest.OnThreadIn(t, "pod", func() { fromPod = dial() })
		fromNode = dial()
		if fromPod == nil || fromNode == nil {
			t.FailNow()
		}
		defer fromPod.Close()
		defer fromNode.Close()
		direct := func(source string) int {
			return tracked(t, func(f *netlink.ConntrackFlow) bool {
				return f.Forward.SrcIP.String() == source && f.Reverse.SrcIP.String() == testMetadata.Addr().String()
			})
		}
		if direct(podIP) != 1 || direct(nodeIP) != 1 {
			t.Fatal("the connections are not tracked; this test would prove nothing")
		}

		w.install()
		if direct(podIP) != 0 || direct(nodeIP) != 1 {
			t.Errorf("after installation %d connections of the pod and %d of the node are still tracked, want 0 and 1", direct(podIP), direct(nodeIP))
		}
		before := w.podPackets()
		_, received := w.azure.counts()
		if _, err := fromPod.Write([]byte("token please\n")); err != nil {
			t.Fatal(err)
		}
		// The connection ends at once, not by timeout.
		if _, err := fromPod.Read(make([]byte, 100)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("reading on the old connection: %v, want a reset", err)
		}
		if _, now := w.azure.counts(); now != received || w.podPackets() != before {
			t.Errorf("the old connection still reaches Azure: %d bytes, %d packets", now-received, w.podPackets()-before)
		}
		if _, err := fromNode.Write([]byte("hello\n")); err != nil {
			t.Fatal(err)
		}
		if _, err := fromNode.Read(make([]byte, 100)); err != nil {
			t.Errorf("the node's own connection: %v", err)
		}
		w.wantGreeting("pod", "169.254.169.254:80", "nmi "+podIP)
	})
}

func TestRepairsUnderLoadLoseNoConnectionAndLeakNoPacket(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		w.install()
		before := w.podPackets()
		load := startConnecting(t)
		// Each command makes the repair take another path. No command by itself lets packets bypass the capture.
		tamper := [][]string{
			{"-t", "nat", "-I", "PREROUTING", "1", "-s", "192.0.2.1", "-j", "RETURN"},
			{"-I", "FORWARD", "1", "-s", "192.0.2.1", "-j", "RETURN"},
			{"-I", "INPUT", "1", "-s", "192.0.2.1", "-j", "RETURN"},
			{"-t", "nat", "-A", "PODIDENTITY-NAT-?", "-s", "192.0.2.1", "-j", "RETURN"},
			{"-A", "PODIDENTITY-FWD-?", "-s", "192.0.2.1", "-j", "RETURN"},
			{"-I", "PODIDENTITY-IN-?", "1", "-s", "192.0.2.1", "-j", "RETURN"},
		}
		// Two Captures find the same damage at the same time, like the old and the new NMI during an upgrade.
		second := w.newCapture(testListen)
		deadline := time.Now().Add(3 * time.Second)
		repairs := 0
		for ; repairs < 30 || time.Now().Before(deadline); repairs++ {
			command := w.withCurrentChains(tamper[repairs%len(tamper)])
			w.iptables(command...)
			var others []string
			var both sync.WaitGroup
			both.Go(func() {
				var err error
				if others, err = second.Sync(context.Background()); err != nil {
					t.Error(err)
				}
			})
			repaired := w.sync()
			both.Wait()
			if len(repaired)+len(others) != 1 {
				t.Errorf("after %v the Sync of one Capture repaired %v, and that of the other %v; want one repair in total", command, repaired, others)
			}
		}
		load.stop()
		w.verify()
		t.Logf("%d repairs, %d connections greeted, %d failed", repairs, load.greeted.Load(), load.failed.Load())
		if load.greeted.Load() < int64(repairs) {
			t.Error("there was not enough load for this test to mean anything")
		}
		if leaked := w.podPackets() - before; leaked != 0 {
			t.Errorf("%d packets of the pod reached Azure", leaked)
		}
		if accepted, _ := w.azure.counts(); accepted != 0 {
			t.Errorf("Azure accepted %d connections", accepted)
		}
	})
}

// connectionLoad is three goroutines that connect from the pod to the metadata address and expect NMI's greeting.
type connectionLoad struct {
	greeted, failed atomic.Int64
	cancel          context.CancelFunc
	group           sync.WaitGroup
}

func startConnecting(t *testing.T) *connectionLoad {
	ctx, cancel := context.WithCancel(context.Background())
	l := &connectionLoad{cancel: cancel}
	for range 3 {
		l.group.Go(func() {
			netnstest.OnThreadIn(t, "pod", func() {
				// Paced, so that the repairs get CPU time on a small computer.
				for pace := time.NewTicker(2 * time.Millisecond); ctx.Err() == nil; <-pace.C {
					if err := greetOnce(); err != nil {
						l.failed.Add(1)
						t.Errorf("connecting during a repair: %v", err)
						return
					}
					l.greeted.Add(1)
				}
			})
		})
	}
	return l
}

func (l *connectionLoad) stop() {
	l.cancel()
	l.group.Wait()
}

func greetOnce() error {
	conn, err := net.DialTimeout("tcp4", "169.254.169.254:80", longTimeout)
	if err != nil {
		return err
	}
	conn.SetDeadline(time.Now().Add(longTimeout))
	greeting, err := bufio.NewReader(conn).ReadString('\n')
	// Reset the connection, so that the load does not use up the ports with connections in TIME_WAIT.
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
	if err == nil && greeting != "nmi "+podIP+"\n" {
		err = fmt.Errorf("received %q", greeting)
	}
	return err
}

// current returns the name of the active chain with a prefix: the first generation that exists. Call it after a repair,
// when only one exists.
func (w *testNetwork) current(prefix string) string {
	w.t.Helper()
	for _, generation := range generations {
		if strings.Contains(w.dump(), ":"+prefix+generation+" ") {
			return prefix + generation
		}
	}
	w.t.Fatalf("there is no chain %s*", prefix)
	return ""
}

// withCurrentChains replaces each word of a command that ends with ? by the active chain with that prefix.
func (w *testNetwork) withCurrentChains(command []string) []string {
	w.t.Helper()
	command = slices.Clone(command)
	for i, word := range command {
		if prefix, ok := strings.CutSuffix(word, "?"); ok {
			command[i] = w.current(prefix)
		}
	}
	return command
}

func TestManualChangesAreDetectedAndRepaired(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		w.install()
		for _, damage := range []struct {
			name     string
			commands string
			repaired []string
		}{
			{"all of nat flushed", "-t nat -F", []string{"nat jump", "nat chain"}},
			{"all of filter flushed", "-F", []string{"forward jump", "forward chain", "input jump", "input chain"}},
			{"all of nat flushed and its chains deleted", "-t nat -F\n-t nat -X", []string{"nat jump", "nat chain"}},
			{"jump deleted", "-t nat -D PREROUTING 1", []string{"nat jump"}},
			{"earlier accept in forward", "-I FORWARD 1 -j ACCEPT", []string{"forward jump"}},
			{"earlier accept in input", "-I INPUT 1 -j ACCEPT", []string{"input jump"}},
			{"earlier foreign redirection", "-t nat -I PREROUTING 1 -d 169.254.169.254 -p tcp --dport 80 -j DNAT --to-destination 10.88.0.1", []string{"nat jump"}},
			{"drop deleted from our chain", "-D PODIDENTITY-FWD-? 1", []string{"forward chain"}},
			{"rule added to our chain", "-A PODIDENTITY-IN-? -j ACCEPT", []string{"input chain"}},
			{"redirection led elsewhere", "-t nat -R PODIDENTITY-NAT-? 1 -d 169.254.169.254 -p tcp -j DNAT --to-destination 10.88.0.1", []string{"nat chain"}},
			{"another chain leads to ours", "-I FORWARD 1 -j ACCEPT\n-A OUTPUT -j PODIDENTITY-FWD-?", []string{"forward jump"}},
		} {
			t.Run(damage.name, func(t *testing.T) {
				for line := range strings.Lines(damage.commands) {
					words := strings.Fields(line)
					for i, word := range words {
						if prefix, ok := strings.CutSuffix(word, "?"); ok {
							words[i] = w.current(prefix)
						}
					}
					w.iptables(words...)
				}
				if err := w.capture.Verify(context.Background()); !errors.Is(err, ErrDrift) {
					t.Errorf("Verify: %v", err)
				}
				if repaired := w.sync(); !slices.Equal(repaired, damage.repaired) {
					t.Errorf("Sync repaired %q, want %q", repaired, damage.repaired)
				}
				w.verify()
				if again := w.sync(); len(again) != 0 {
					t.Errorf("a second Sync repaired %q", again)
				}
				before := w.podPackets()
				w.wantGreeting("pod", "169.254.169.254:80", "nmi "+podIP)
				w.wantNoGreeting("pod", "169.254.169.254:443")
				w.wantNoGreeting("outside", testListen.String())
				if leaked := w.podPackets() - before; leaked != 0 {
					t.Errorf("%d packets of the pod reached Azure", leaked)
				}
			})
		}
	})
}

func TestWithoutAListenerPodsGetNoResponse(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		w.install()
		w.nmi.listener.Close()
		before := w.podPackets()
		if _, err := w.connect("pod", "169.254.169.254:80", longTimeout); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v, want the connection refused at once", err)
		}
		// If the link is deleted too, the route added here leads redirected packets off the node. They must be dropped.
		netnstest.Run(t, "ip", "link", "del", nodelink.Name)
		netnstest.Run(t, "ip", "route", "add", "169.254.25.79/32", "via", "10.88.0.1")
		w.wantNoGreeting("pod", "169.254.169.254:80")
		if leaked := w.podPackets() - before; leaked != 0 {
			t.Errorf("%d packets of the pod left the node", leaked)
		}
	})
}

func TestTheListenAddressChangesWithoutAGap(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		w.install()
		w.nmi.listener.Close()
		next := testListen.Addr().Next().String() + ":2580"
		w.capture = w.newCapture(netip.MustParseAddrPort(next))
		before := w.podPackets()
		if err := w.capture.EnsureLink(context.Background()); err != nil {
			t.Fatal(err)
		}
		serve(t, "next", next)
		if err := w.capture.Install(context.Background()); err != nil {
			t.Fatal(err)
		}
		w.verify()
		w.wantGreeting("pod", "169.254.169.254:80", "next "+podIP)
		if leaked := w.podPackets() - before; leaked != 0 {
			t.Errorf("%d packets of the pod reached Azure", leaked)
		}
		if addresses := netnstest.Run(t, "ip", "-o", "-4", "addr", "show", "dev", nodelink.Name); strings.Contains(addresses, testListen.Addr().String()+"/") {
			t.Errorf("the former address is still there: %s", addresses)
		}
	})
}

func TestUninstallRestoresTheNode(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		for _, rule := range []string{
			"-t nat -N KUBE-SERVICES", "-t nat -A PREROUTING -m comment --comment portals -j KUBE-SERVICES",
			"-t nat -A POSTROUTING -s 10.77.0.0/16 -d 192.0.2.0/24 -j MASQUERADE",
			"-N KUBE-FORWARD", "-A FORWARD -j KUBE-FORWARD", "-A INPUT -p tcp --dport 22 -j ACCEPT", "-t mangle -N KUBE-IPTABLES-HINT",
		} {
			w.iptables(strings.Fields(rule)...)
		}
		rulesBefore, linksBefore := w.dump(), links(t)

		w.install()
		w.wantGreeting("pod", "169.254.169.254:80", "nmi "+podIP)
		var kept net.Conn
		netnstest.OnThreadIn(t, "pod", func() {
			var err error
			if kept, err = net.DialTimeout("tcp4", "169.254.169.254:80", longTimeout); err != nil {
				t.Error(err)
			}
		})
		if kept != nil {
			defer kept.Close()
		}
		redirected := func(f *netlink.ConntrackFlow) bool { return f.Reverse.SrcIP.String() == testListen.Addr().String() }
		if tracked(t, redirected) == 0 {
			t.Fatal("no captured connection is tracked; this test would prove nothing")
		}
		if w.dump() == rulesBefore || links(t) == linksBefore {
			t.Fatal("installation changed nothing; this test would prove nothing")
		}
		for range 2 {
			if err := w.capture.Uninstall(context.Background()); err != nil {
				t.Fatal(err)
			}
			if got := w.dump(); got != rulesBefore {
				t.Errorf("rules are now\n%s\nwere\n%s", got, rulesBefore)
			}
			if got := links(t); got != linksBefore {
				t.Errorf("links are now\n%s\nwere\n%s", got, linksBefore)
			}
		}
		if left := tracked(t, redirected); left != 0 {
			t.Errorf("%d captured connections are still tracked", left)
		}
		w.wantGreeting("pod", "169.254.169.254:80", "azure "+podIP)
		// The capture can be installed again.
		w.nmi.listener.Close()
		w.install()
		w.wantGreeting("pod", "169.254.169.254:80", "nmi "+podIP)
	})
}

// tracked returns the number of matching entries in the conntrack table.
func tracked(t *testing.T, match func(*netlink.ConntrackFlow) bool) (n int) {
	t.Helper()
	// The kernel reports an interrupted dump when the table changes during it.
	all, err := nodelink.RetryInterrupted(func() ([]*netlink.ConntrackFlow, error) {
		return netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if match(f) {
			n++
		}
	}
	return n
}

func TestAForeignChainIsNotChanged(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		w.iptables("-N", "PODIDENTITY-FWD-B")
		w.iptables("-A", "PODIDENTITY-FWD-B", "-s", "192.0.2.1", "-j", "ACCEPT")
		w.iptables("-t", "nat", "-S") // Creates the legacy table, as Install does when it lists our chains.
		before := w.dump()
		for doing, err := range map[string]error{
			"Install":   w.capture.Install(context.Background()),
			"Uninstall": w.capture.Uninstall(context.Background()),
		} {
			if !errors.Is(err, ErrForeignChain) {
				t.Errorf("%s: %v", doing, err)
			}
		}
		if got := w.dump(); got != before {
			t.Errorf("rules are now\n%s\nwere\n%s", got, before)
		}
		// An empty chain with our name counts as a leftover of NMI.
		w.iptables("-F", "PODIDENTITY-FWD-B")
		w.install()
	})
}

func TestVerifyAndSyncAreFast(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		took := func(what string, times int, do func()) {
			start := time.Now()
			for range times {
				do()
			}
			t.Logf("%s %s: %v", w.backend, what, (time.Since(start) / time.Duration(times)).Round(100*time.Microsecond))
		}
		took("first installation", 1, w.install)
		took("Verify", 20, w.verify)
		took("Sync without anything to repair", 20, func() { w.sync() })
		took("Sync with one repair", 10, func() {
			w.iptables("-t", "nat", "-D", "PREROUTING", "1")
			w.sync()
		})
	})
}

// Package bpf redirects pods to this port, so their packets reach it without a redirection by our rules.
func TestPodsReachTheIdentifiedPortDirectly(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		identified := netip.AddrPortFrom(testListen.Addr(), 2578)
		capture, err := New(Config{
			MetadataIP: testMetadata.Addr(), MetadataPort: testMetadata.Port(), Listen: testListen, IdentifiedPort: identified.Port(), Backend: w.backend,
		})
		if err != nil {
			t.Fatal(err)
		}
		w.capture = capture
		w.install()
		serve(t, "identified", identified.String())
		w.wantGreeting("pod", identified.String(), "identified "+podIP)
		w.wantGreeting("pod", testMetadata.String(), "nmi "+podIP)
		w.wantNoGreeting("pod", testListen.String())
	})
}
