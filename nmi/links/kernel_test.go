package links

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/internal/netnstest"
)

// kernelNode is a node in a network namespace of its own. Its pods are network namespaces, behind a veth or behind a veth
// that is a port of bridge br0.
type kernelNode struct {
	t     *testing.T
	file  string
	table *Table
	stop  func()
	state atomic.Value // the last error of OnState, in a slice
}

// onKernel runs body in a new network: with veth links with routes, and with a bridge.
func onKernel(t *testing.T, body func(t *testing.T, n *kernelNode, bridge bool)) {
	for _, kind := range []string{"veth", "bridge"} {
		t.Run(kind, func(t *testing.T) {
			netnstest.RunIsolated(t, func(t *testing.T) {
				if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("tmpfs", "/run", "tmpfs", 0, "")); err != nil {
					t.Fatal(err)
				}
				netnstest.Run(t, "sh", "-e", "-c", `
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.1.1/24 dev br0
ip link set br0 up`)
				n := &kernelNode{t: t, file: filepath.Join(t.TempDir(), FileName)}
				n.start()
				body(t, n, kind == "bridge")
				n.stop()
			})
		})
	}
}

// start starts the table, as NMI does.
func (n *kernelNode) start() {
	n.t.Helper()
	n.state.Store([]error{errNotRead})
	n.table = New(Config{File: n.file, Log: zap.NewNop(), OnState: func(err error) { n.state.Store([]error{err}) }})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { n.table.Run(ctx); close(ended) }()
	n.stop = func() { cancel(); <-ended }
	for deadline := time.Now().Add(10 * time.Second); n.state.Load().([]error)[0] != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatal(n.state.Load())
		}
	}
}

// addPod adds a pod as a network plugin does.
func (n *kernelNode) addPod(name, address string, bridge bool, attributes ...string) {
	n.t.Helper()
	attach := fmt.Sprintf(`
ip addr add 169.254.1.1/32 dev veth-%[1]s scope link
ip route add %[2]s/32 dev veth-%[1]s
ip -n %[1]s addr add %[2]s/32 dev eth0
ip -n %[1]s route add 10.77.1.1 dev eth0`, name, address)
	if bridge {
		attach = fmt.Sprintf("ip link set veth-%[1]s master br0\nip -n %[1]s addr add %[2]s/24 dev eth0", name, address)
	}
	netnstest.Run(n.t, "sh", "-e", "-c", fmt.Sprintf(`
ip netns add %[1]s
ip link add veth-%[1]s %[2]s type veth peer name eth0 netns %[1]s
ip link set veth-%[1]s up
ip -n %[1]s link set eth0 up
`, name, strings.Join(attributes, " "))+attach)
	n.connect(name, address)
}

func (n *kernelNode) deletePod(name string) {
	n.t.Helper()
	// The end of a namespace is asynchronous; a network plugin deletes the link itself.
	netnstest.Run(n.t, "sh", "-e", "-c", fmt.Sprintf("ip link del veth-%[1]s\nip netns del %[1]s", name))
}

// connect opens a connection from the pod to the node, so that the node knows where the address is.
func (n *kernelNode) connect(name, address string) {
	n.t.Helper()
	listener, err := net.Listen("tcp4", "10.77.1.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	defer listener.Close()
	netnstest.OnThreadIn(n.t, name, func() {
		dialer := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
		conn, err := dialer.Dial("tcp4", listener.Addr().String())
		if err != nil {
			n.t.Errorf("pod %s: %v", name, err)
			return
		}
		conn.Close()
	})
}

// started returns a claim of a pod one of whose containers starts now, and the next moment at which another could.
func (n *kernelNode) started(uid, address string, acknowledged time.Time) Claim {
	// A start in the same second as the link is confirmed by a list; see the other tests. Here the second has ended.
	time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second)))
	now := time.Now().Truncate(time.Second)
	return Claim{Address: netip.MustParseAddr(address), UID: uid, Acknowledged: acknowledged.Truncate(time.Second), Started: now}
}

func (n *kernelNode) want(what string, c Claim, causes ...Cause) {
	n.t.Helper()
	var got Cause
	reason := n.table.Confirm(c)
	if reason != nil {
		got = reason.Cause
	}
	for _, cause := range causes {
		if got == cause {
			return
		}
	}
	n.t.Errorf("%s: got %q (%v), want %q", what, got, reason, causes)
	n.table.mu.Lock()
	defer n.table.mu.Unlock()
	n.t.Logf("neighbors %v, forwards %v\n%s", n.table.bridges.neighbors, n.table.bridges.forwards, netnstest.Run(n.t, "sh", "-c", "ip neigh; bridge fdb; ip route"))
}

const podAddress = "10.77.1.2"

func TestTheFormerPodOfAnAddressIsNotConfirmed(t *testing.T) {
	onKernel(t, func(t *testing.T, n *kernelNode, bridge bool) {
		begin := time.Now()
		n.addPod("a", podAddress, bridge)
		a := n.started("a", podAddress, begin)
		n.want("the first pod", a, "")
		n.deletePod("a")
		time.Sleep(1100 * time.Millisecond)
		n.want("nobody has the address", a, NoLink) // which also brings the table up to date
		n.addPod("b", podAddress, bridge)
		n.want("the first pod, without its link", a, PodTooOld)
		n.want("the second pod, before its container is reported", Claim{Address: a.Address, UID: "b"}, NotStarted)
		b := n.started("b", podAddress, begin)
		n.want("the second pod", b, "")
		n.want("the first pod, later", a, PodTooOld)

		// With the same name, MAC and index only the events tell the links apart.
		key := n.keyOf("veth-b")
		n.deletePod("b")
		time.Sleep(1100 * time.Millisecond)
		n.want("nobody has the address", b, NoLink)
		n.addPod("b", podAddress, bridge, "index", fmt.Sprint(key.Index), "address", key.MAC)
		n.want("the second pod, with a new link like the former one", b, PodTooOld)
		if again := n.keyOf("veth-b"); again.Index != key.Index || again.MAC != key.MAC {
			t.Errorf("the link is %v, not like %v", again, key)
		}
	})
}

func (n *kernelNode) keyOf(name string) key {
	n.t.Helper()
	n.table.mu.Lock()
	defer n.table.mu.Unlock()
	for _, l := range n.table.links {
		if l.Name == name {
			return l.key
		}
	}
	n.t.Fatalf("there is no link %s", name)
	return key{}
}

func TestNMIRestartsWhileAnAddressMoves(t *testing.T) {
	onKernel(t, func(t *testing.T, n *kernelNode, bridge bool) {
		begin := time.Now()
		n.addPod("a", podAddress, bridge)
		a := n.started("a", podAddress, begin)
		n.want("the first pod", a, "")
		n.stop()
		n.start()
		n.want("the first pod, after a restart", a, "")
		time.Sleep(1100 * time.Millisecond)
		n.stop() // saves that the table is up to date
		n.deletePod("a")
		n.addPod("b", podAddress, bridge)
		n.start()
		n.connect("b", podAddress)
		n.want("the first pod, after its address moved", a, PodTooOld)
		b := n.started("b", podAddress, begin)
		n.want("the second pod", b, "")
	})
}

func TestAnAddressThatMovesToAnOlderLinkIdentifiesNobody(t *testing.T) {
	onKernel(t, func(t *testing.T, n *kernelNode, bridge bool) {
		begin := time.Now()
		n.addPod("attacker", "10.77.1.66", bridge)
		n.addPod("a", podAddress, bridge)
		a := n.started("a", podAddress, begin)
		n.want("the pod", a, "")
		if bridge { // by gratuitous ARP: adding an address with arp_notify sends one
			netnstest.Run(t, "ip", "netns", "exec", "attacker", "sh", "-e", "-c", `
echo 1 > /proc/sys/net/ipv4/conf/eth0/arp_notify
ip addr add 10.77.1.2/24 dev eth0
ip link set eth0 down
ip link set eth0 up`)
			netnstest.Run(t, "ip", "neigh", "del", podAddress, "dev", "br0") // as if it had expired
			netnstest.Run(t, "ip", "-n", "a", "link", "set", "eth0", "down") // so that only the attacker answers
			n.connect("attacker", podAddress)
		} else {
			netnstest.Run(t, "sh", "-e", "-c", "ip route replace 10.77.1.2/32 dev veth-attacker\nip -n attacker addr add 10.77.1.2/32 dev eth0")
			n.connect("attacker", podAddress)
		}
		n.want("the address is behind another link", a, Claimed)
		later := n.started("a", podAddress, begin)
		n.want("a container of the pod restarted", later, Claimed)
	})
}

func TestTheTableSurvivesLostEvents(t *testing.T) {
	onKernel(t, func(t *testing.T, n *kernelNode, bridge bool) {
		begin := time.Now()
		n.addPod("a", podAddress, bridge)
		a := n.started("a", podAddress, begin)
		n.want("the pod", a, "")
		k := n.table.net.(*kernel)
		n.table.mu.Lock() // nothing is read meanwhile
		if err := unix.SetsockoptInt(k.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
			t.Error(err)
		}
		for range 20 {
			netnstest.Run(t, "sh", "-e", "-c", "ip link add x0 type bridge\nip link del x0")
		}
		n.table.mu.Unlock()
		n.want("after events were lost", a, NotWatching, "")
		for deadline := time.Now().Add(10 * time.Second); n.table.Confirm(a) != nil; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%v", n.table.Confirm(a))
			}
		}
	})
}

// The kernel does not report that the routes of a link end when the link goes down.
func TestAPodWhoseLinkIsDownIsNotConfirmed(t *testing.T) {
	onKernel(t, func(t *testing.T, n *kernelNode, bridge bool) {
		begin := time.Now()
		n.addPod("a", podAddress, bridge)
		a := n.started("a", podAddress, begin)
		n.want("the pod", a, "")
		if bridge {
			netnstest.Run(t, "ip", "link", "set", "br0", "down")
		} else {
			netnstest.Run(t, "ip", "link", "set", "veth-a", "down")
		}
		n.want("without a route", a, NoLink)
	})
}

func TestLinksOfTheNodeIdentifyNobody(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		netnstest.Run(t, "sh", "-e", "-c", `
ip link set lo up
ip link add up0 type bridge
ip addr add 10.88.0.2/24 dev up0
ip link set up0 up
ip route add 10.99.0.0/16 via 10.88.0.1
ip route add unreachable 10.98.0.0/16`)
		n := &kernelNode{t: t, file: filepath.Join(t.TempDir(), FileName)}
		n.start()
		defer n.stop()
		for _, address := range []string{"10.88.0.7", "10.88.0.2", "10.99.0.1", "10.98.0.1", "127.0.0.1", "10.97.0.1"} {
			n.want(address, Claim{Address: netip.MustParseAddr(address), UID: "a", Started: time.Now().Add(time.Hour)}, NoLink)
		}
	})
}

// NMI can confirm addresses without the file until it restarts, so it stays ready.
func TestAFileThatCannotBeWrittenIsLogged(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		core, logged := observer.New(zap.ErrorLevel)
		states := make(chan error, 10)
		table := New(Config{File: "/proc/none/" + FileName, Log: zap.New(core), OnState: func(err error) { states <- err }})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			table.Run(ctx)
		}()
		if err := <-states; err != nil {
			t.Errorf("the state is %v; want nil", err)
		}
		cancel()
		<-ended
		if n := logged.FilterMessageSnippet("make the folder of --state-dir writable").Len(); n != 1 {
			t.Errorf("the error was logged %d times; want once", n)
		}
	})
}

// BenchmarkConfirm measures Confirm for a confirmed pod: without changes of the network, and if each request has to read the
// route again.
func BenchmarkConfirm(b *testing.B) {
	for _, changing := range []bool{false, true} {
		b.Run(map[bool]string{false: "unchanged", true: "route read again"}[changing], func(b *testing.B) {
			runtime.LockOSThread() // never unlocked: the thread and its namespace end with the benchmark
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				b.Fatal(err)
			}
			address, index := addBenchmarkLinks(b)
			table := New(Config{File: filepath.Join(b.TempDir(), FileName), Log: zap.NewNop()})
			if err := table.ensureStarted(true); err != nil {
				b.Fatal(err)
			}
			defer table.net.close()
			claim := Claim{Address: address, UID: "a", Started: time.Now().Add(time.Hour)}
			if reason := table.Confirm(claim); reason != nil {
				b.Fatal(reason, index)
			}
			for b.Loop() {
				if changing {
					clear(table.resolved)
				}
				if table.Confirm(claim) != nil {
					b.Fatal("not confirmed")
				}
			}
		})
	}
}

// addBenchmarkLinks adds 250 veth links with a route each to the namespace of the thread.
func addBenchmarkLinks(b *testing.B) (address netip.Addr, index int) {
	b.Helper()
	for i := range 250 {
		address = netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("veth%d", i)}, PeerName: fmt.Sprintf("peer%d", i)}
		if err := errors.Join(netlink.LinkAdd(veth), netlink.LinkSetUp(veth)); err != nil {
			b.Fatal(err)
		}
		link, err := netlink.LinkByName(veth.Name)
		if err != nil {
			b.Fatal(err)
		}
		index = link.Attrs().Index
		route := &netlink.Route{LinkIndex: index, Scope: netlink.SCOPE_LINK, Dst: netlink.NewIPNet(address.AsSlice())}
		if err := netlink.RouteAdd(route); err != nil {
			b.Fatal(err)
		}
	}
	return address, index
}
