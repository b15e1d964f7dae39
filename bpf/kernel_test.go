package bpf

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/internal/netnstest"
)

var (
	testMetadata = netip.MustParseAddrPort("169.254.169.254:80")
	testListen   = netip.MustParseAddrPort("169.254.25.79:2578")
)

// testNode is a node with one pod's network, and a server at the metadata address beyond the node.
//
//	pod 10.77.1.2 -- 10.77.1.1 node 10.88.0.2 -- 10.88.0.1, 169.254.169.254 azure
//
// The test itself is in the network namespace of the node. Which pod a client belongs to depends on its cgroup alone.
type testNode struct {
	t       *testing.T
	cgroup  string // of all pods
	pins    string
	capture *Capture
}

// onNode runs body on a new node.
func onNode(t *testing.T, body func(n *testNode)) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		n := &testNode{t: t}
		n.createNetwork()
		n.createCgroups()
		n.mountPins()
		body(n)
	})
}

func (n *testNode) createNetwork() {
	n.t.Helper()
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		n.t.Fatal(err)
	}
	netnstest.Run(n.t, "sh", "-e", "-c", `
ip link set lo up
for ns in pod azure; do ip netns add $ns; ip -n $ns link set lo up; done
ip link add pod0 type veth peer name eth0 netns pod
ip link add out0 type veth peer name eth0 netns azure
ip addr add 10.77.1.1/24 dev pod0
ip link set pod0 up
ip addr add 10.88.0.2/24 dev out0
ip link set out0 up
ip link add podidentity0 type bridge
ip addr add 169.254.25.79/32 dev podidentity0 scope link
ip link set podidentity0 up
ip -n pod addr add 10.77.1.2/24 dev eth0
ip -n pod link set eth0 up
ip -n pod route add default via 10.77.1.1
ip -n azure addr add 10.88.0.1/24 dev eth0
ip -n azure addr add 169.254.169.254/32 dev eth0
ip -n azure link set eth0 up
ip -n azure route add 10.77.1.0/24 via 10.88.0.2
ip route add 169.254.169.254/32 via 10.88.0.1
echo 1 > /proc/sys/net/ipv4/ip_forward
`)
	netnstest.OnThreadIn(n.t, "azure", func() {
		netnstest.Run(n.t, "iptables-nft", "-t", "raw", "-A", "PREROUTING", "-d", "169.254.169.254/32")
		n.serve(testMetadata, func(net.Conn) string { return "azure" })
		n.serve(netip.MustParseAddrPort("10.88.0.1:80"), func(net.Conn) string { return "other server" })
	})
}

// createCgroups creates the cgroup of all pods, at the second level as with --cgroup-root of a kubelet.
func (n *testNode) createCgroups() {
	n.t.Helper()
	hierarchy, err := findHierarchy("/sys/fs/cgroup")
	if err != nil {
		n.t.Fatal(err)
	}
	top := filepath.Join(hierarchy, fmt.Sprintf("podidentity-test-%d", os.Getpid()))
	n.cgroup = filepath.Join(top, "kubepods")
	n.makeCgroup("")
	n.t.Cleanup(func() { removeCgroups(n.t, top) })
}

// removeCgroups removes a cgroup and those below it. A cgroup can be removed a moment after its last process has ended.
func removeCgroups(t *testing.T, top string) {
	var folders []string
	_ = filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			folders = append(folders, path)
		}
		return nil
	})
	for i := len(folders) - 1; i >= 0; i-- {
		err := unix.Rmdir(folders[i])
		for deadline := time.Now().Add(5 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); err = unix.Rmdir(folders[i]) {
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil {
			t.Errorf("removing the cgroup %s: %v", folders[i], err)
		}
	}
}

// makeCgroup creates a cgroup below that of all pods.
func (n *testNode) makeCgroup(path string) {
	n.t.Helper()
	if err := os.MkdirAll(filepath.Join(n.cgroup, path), 0o755); err != nil {
		n.t.Fatal(err)
	}
}

func (n *testNode) mountPins() {
	n.t.Helper()
	dir := n.t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	n.pins = filepath.Join(dir, "podidentity")
}

// listen opens a port in the namespace of the calling thread. It returns nil and fails the test if it cannot.
func (n *testNode) listen(address netip.AddrPort) net.Listener {
	n.t.Helper()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_SAVE_SYN, 1) })
		return errors.Join(err, failed)
	}}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), "tcp4", address.String())
	if err != nil {
		n.t.Errorf("starting the server at %s: %v", address, err)
		return nil
	}
	n.t.Cleanup(func() { listener.Close() })
	return listener
}

// serve accepts connections at an address in the namespace of the calling thread. It sends each client one line, and the
// line again for each byte that it receives.
func (n *testNode) serve(address netip.AddrPort, line func(net.Conn) string) {
	n.t.Helper()
	listener := n.listen(address)
	if listener == nil {
		return
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			text := line(conn)
			go func() {
				defer conn.Close()
				for b := []byte{0}; ; {
					fmt.Fprintln(conn, text)
					if _, err := io.ReadFull(conn, b); err != nil {
						return
					}
				}
			}()
		}
	}()
}

func (n *testNode) newCapture(change func(*Config)) *Capture {
	n.t.Helper()
	cfg := Config{PodsCgroup: n.cgroup, PinDir: n.pins, Metadata: testMetadata, Listen: testListen}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(c.Close)
	return c
}

// install starts the server of NMI, which tells each client the pod that it belongs to, and installs the capture.
func (n *testNode) install(change func(*Config)) {
	n.t.Helper()
	n.capture = n.newCapture(change)
	n.serve(testListen, func(conn net.Conn) string {
		owner, err := n.capture.Owner(conn)
		if err != nil {
			return err.Error()
		}
		return "nmi " + owner.PodUID + " " + owner.ContainerID
	})
	if err := n.capture.Install(context.Background()); err != nil {
		n.t.Fatal(err)
	}
}

// installWithListener installs the capture and returns the listener of NMI, from which the test accepts connections itself.
func (n *testNode) installWithListener() net.Listener {
	n.t.Helper()
	n.capture = n.newCapture(nil)
	if err := n.capture.Install(context.Background()); err != nil {
		n.t.Fatal(err)
	}
	listener := n.listen(testListen)
	if listener == nil {
		n.t.FailNow()
	}
	return listener
}

// client starts a client in a network namespace ("" is the node's) and in a cgroup below that of all pods.
func (n *testNode) client(namespace, cgroup, action string) *exec.Cmd {
	n.t.Helper()
	n.makeCgroup(cgroup)
	return n.clientAt(namespace, filepath.Join(n.cgroup, cgroup), action)
}

func (n *testNode) clientAt(namespace, cgroup, action string) *exec.Cmd {
	n.t.Helper()
	folder, err := os.Open(cgroup)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { folder.Close() })
	command := exec.Command("/proc/self/exe")
	command.Env = append(os.Environ(), clientAction+"="+action)
	command.Stderr = os.Stderr
	command.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(folder.Fd())}
	return command
}

// ask runs a client until it ends and returns its result.
func (n *testNode) ask(namespace, cgroup, action string) string {
	n.t.Helper()
	command := n.client(namespace, cgroup, action)
	var out []byte
	var err error
	run := func() { out, err = command.Output() }
	if namespace == "" {
		run()
	} else {
		netnstest.OnThreadIn(n.t, namespace, run)
	}
	if err != nil {
		n.t.Errorf("client %q in cgroup %s: %v", action, cgroup, err)
	}
	return string(out)
}

func (n *testNode) want(namespace, cgroup, action, want string) {
	n.t.Helper()
	if got := n.ask(namespace, cgroup, action); got != want {
		n.t.Errorf("client %q in namespace %q and cgroup %s: got %q, want %q", action, namespace, cgroup, got, want)
	}
}

// azurePackets returns how many packets arrived at the metadata address.
func (n *testNode) azurePackets() (total int) {
	n.t.Helper()
	netnstest.OnThreadIn(n.t, "azure", func() {
		for line := range strings.Lines(netnstest.Run(n.t, "iptables-nft", "-t", "raw", "-L", "PREROUTING", "-v", "-x", "-n")) {
			var count int
			if _, err := fmt.Sscan(line, &count); err == nil {
				total += count
			}
		}
	})
	return total
}

const podCgroupName = "burstable/pod" + testUID

func TestConnectionsOfPodsReachNMIWithTheirOwner(t *testing.T) {
	onNode(t, func(n *testNode) {
		cgroup := podCgroupName + "/" + testContainer
		n.want("pod", cgroup, "connect", "azure") // before the installation
		before := n.azurePackets()
		n.install(nil)

		owner := "nmi " + testUID + " " + testContainer
		n.want("pod", cgroup, "connect", owner)
		n.want("pod", cgroup, "connect mapped", owner)
		n.want("pod", cgroup, "fast open", owner)
		n.want("pod", cgroup, "peer", "169.254.169.254:80")
		n.want("pod", cgroup, "peer mapped", "169.254.169.254:80")
		n.want("pod", cgroup, "listener", owner) // as a proxy in the pod does
		n.want("pod", cgroup+"/nested/pod11111111-1111-4abc-8000-000000000000", "connect", owner)
		n.want("pod", "pod"+testStaticUID+"/crio-"+testContainer, "connect", "nmi "+testStaticUID+" "+testContainer)
		n.want("pod", cgroup, "multipath", owner)
		n.want("pod", cgroup, "other server", "other server")

		for _, action := range []string{"other port", "udp connect", "udp sendto", "udp mapped", "raw", "ping"} {
			n.want("pod", cgroup, action, "EPERM")
		}
		if got := n.azurePackets(); got != before {
			t.Errorf("%d packets arrived at the metadata address after the installation", got-before)
		}
		n.want("", cgroup, "connect", "azure") // a pod in the host network
	})
}

func TestASocketConnectedBeforeTheInstallationIsCutOff(t *testing.T) {
	onNode(t, func(n *testNode) {
		for _, c := range []struct{ namespace, want string }{{"pod", "timeout"}, {"", "azure"}} {
			cgroup := podCgroupName + "/" + testContainer
			command := n.client(c.namespace, cgroup, "wait")
			in, _ := command.StdinPipe()
			out, _ := command.StdoutPipe()
			start := func() {
				if err := command.Start(); err != nil {
					t.Error(err)
				}
			}
			if c.namespace == "" {
				start()
			} else {
				netnstest.OnThreadIn(t, c.namespace, start)
			}
			reader := bufio.NewReader(out)
			if line, err := reader.ReadString('\n'); line != "azure\n" {
				t.Fatalf("before the installation: %q, %v", line, err)
			}
			if n.capture == nil {
				n.install(nil)
			} else if err := n.capture.Install(context.Background()); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(in)
			rest, err := io.ReadAll(reader)
			if err := errors.Join(err, command.Wait()); err != nil || string(rest) != c.want {
				t.Errorf("a socket of namespace %q after the installation: %q, %v; want %q", c.namespace, rest, err, c.want)
			}
			if err := Uninstall(context.Background(), n.pins); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// Docker in a pod gives containers addresses that other pods may have, and translates them to that of the pod.
func TestAContainerBehindNATInAPodBelongsToThePod(t *testing.T) {
	onNode(t, func(n *testNode) {
		n.install(nil)
		netnstest.Run(t, "sh", "-e", "-c", `
ip netns add nested
ip -n nested link set lo up
ip -n pod link add nested0 type veth peer name eth0 netns nested
ip -n pod addr add 10.55.0.1/24 dev nested0
ip -n pod link set nested0 up
ip -n nested addr add 10.55.0.2/24 dev eth0
ip -n nested link set eth0 up
ip -n nested route add default via 10.55.0.1
ip netns exec pod sysctl -q -w net.ipv4.ip_forward=1
ip netns exec pod iptables-nft -t nat -A POSTROUTING -s 10.55.0.0/24 -j MASQUERADE
`)
		n.want("nested", podCgroupName+"/"+testContainer+"/nested", "connect", "nmi "+testUID+" "+testContainer)
	})
}

// A pod that may configure its own network can connect to itself from the address of another pod to that of NMI.
func TestAPodCannotForgeTheOwnerOfAnotherPodsConnection(t *testing.T) {
	onNode(t, func(n *testNode) {
		listener := n.installWithListener()
		netnstest.Run(t, "sh", "-e", "-c", `
ip netns add evil
ip -n evil link set lo up
ip -n evil addr add 10.77.1.2/32 dev lo
ip -n evil addr add 169.254.25.79/32 dev lo
`)
		netnstest.OnThreadIn(t, "evil", func() { n.serve(testListen, func(net.Conn) string { return "itself" }) })
		forge := func(port string) { n.want("evil", "pod"+testStaticUID+"/"+testContainer, "from "+port, "itself") }
		for port, first := range map[string]bool{"40000": true, "40001": false} {
			before := n.records()
			if first {
				forge(port)
			}
			victim := n.client("pod", podCgroupName+"/"+testContainer, "from "+port)
			netnstest.OnThreadIn(t, "pod", func() {
				if err := victim.Start(); err != nil {
					t.Error(err)
				}
			})
			conn, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if !first {
				forge(port)
			}
			if got := n.records() - before; got != 2 {
				t.Errorf("port %s: %d new records; want those of the forged connection and of the other one, or this test proves nothing", port, got)
			}
			if owner, err := n.capture.Owner(conn); err != nil || owner.PodUID != testUID {
				t.Errorf("port %s: owner %+v, %v; want pod %s", port, owner, err, testUID)
			}
			conn.Close()
			_ = victim.Wait() // it got no greeting
		}
	})
}

// records returns how many connections to NMI the kernel has a record of.
func (n *testNode) records() (count int) {
	n.t.Helper()
	var key uint64
	var value programsConnectionRecord
	entries := n.capture.loaded.Maps[programsMapConnections].Iterate()
	for entries.Next(&key, &value) {
		count++
	}
	if err := entries.Err(); err != nil {
		n.t.Fatal(err)
	}
	return count
}
