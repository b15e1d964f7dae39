package iptables

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Tests against a real kernel change rules and links, so they run in a child process with its own network namespace.
// parentNamespace is the environment variable with the inode of the parent's network namespace; it also marks the
// process as the child.
const parentNamespace = "PODIDENTITY_TEST_PARENT_NETNS"

// initialNamespace is the inode of the first network namespace since Linux 6.17.
const initialNamespace = 0xEFFFFFF9

// inNamespaces runs body in a child process with fresh network and mount namespaces. In the parent it starts the child
// and reports the child's result; in the child it runs body. If the computer does not allow namespaces, the test fails
// instead of being skipped: a test that did not run proves nothing.
func inNamespaces(t *testing.T, body func(t *testing.T)) {
	t.Helper()
	if os.Getenv(parentNamespace) != "" {
		if err := checkNamespace(); err != nil {
			t.Fatalf("refusing to run: %v", err)
		}
		body(t)
		return
	}
	own, err := namespaceInode("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	var pattern []string
	for part := range strings.SplitSeq(t.Name(), "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(part)+"$")
	}
	child := exec.Command("/proc/self/exe", "-test.run="+strings.Join(pattern, "/"), "-test.v", "-test.timeout=8m", "-test.count=1")
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%d", parentNamespace, own))
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is sent when the thread ends.
	defer runtime.UnlockOSThread()
	out, err := child.CombinedOutput()
	switch {
	case err != nil && len(out) == 0:
		t.Fatalf("this test cannot create the network namespaces that it needs (run as root with CAP_SYS_ADMIN and CAP_NET_ADMIN): %v", err)
	case err != nil:
		t.Fatalf("the test failed in its own network namespace: %v\n%s", err, out)
	case !bytes.Contains(out, []byte("--- PASS: "+t.Name()+" ")):
		t.Fatalf("the test did not run in its own network namespace:\n%s", out)
	default:
		t.Logf("%s", out)
	}
}

// checkNamespace checks, in three ways, that the process is not in the network namespace of the computer itself.
func checkNamespace() error {
	own, err := namespaceInode("/proc/self/ns/net")
	if err != nil {
		return err
	}
	if parent := os.Getenv(parentNamespace); parent == fmt.Sprint(own) {
		return fmt.Errorf("still in the network namespace of the parent (%s)", parent)
	}
	if own == initialNamespace {
		return errors.New("in the initial network namespace")
	}
	if first, err := namespaceInode("/proc/1/ns/net"); err == nil && first == own {
		return errors.New("in the network namespace of process 1")
	}
	return nil
}

func namespaceInode(path string) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return 0, fmt.Errorf("looking at %s: %w", path, err)
	}
	return stat.Ino, nil
}

// The network of these tests: a pod behind the node, and beyond the node one segment with a server at the
// metadata address ("azure"), which echoes what it receives, and a neighbor outside the cluster. None of the namespaces
// has a route to the network of the computer.
//
//	pod 10.77.1.2 -- 10.77.1.1 node 10.88.0.2 --+-- azure 10.88.0.1, 169.254.169.254
//	                                            +-- outside 10.88.0.3
const (
	podIP     = "10.77.1.2"
	nodeIP    = "10.88.0.2"
	outsideIP = "10.88.0.3"
)

func buildNetwork(t *testing.T) {
	t.Helper()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatalf("this test needs a mount namespace of its own: %v", err)
	}
	// /run holds the names of network namespaces and the lock of iptables. Each test gets its own.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	script := `
ip link set lo up
for ns in pod azure outside; do ip netns add $ns; ip -n $ns link set lo up; done
ip link add pod0 type veth peer name eth0 netns pod
ip link add out0 type veth peer name node0 netns azure
ip -n azure link add out1 type veth peer name eth0 netns outside
ip addr add 10.77.1.1/24 dev pod0
ip link set pod0 up
ip addr add 10.88.0.2/24 dev out0
ip link set out0 up
ip -n pod addr add 10.77.1.2/24 dev eth0
ip -n pod link set eth0 up
ip -n pod route add default via 10.77.1.1
ip -n azure link add br0 type bridge
ip -n azure link set node0 master br0 up
ip -n azure link set out1 master br0 up
ip -n azure addr add 10.88.0.1/24 dev br0
ip -n azure addr add 169.254.169.254/32 dev br0
ip -n azure link set br0 up
ip -n azure route add 10.77.1.0/24 via 10.88.0.2
ip -n outside addr add 10.88.0.3/24 dev eth0
ip -n outside link set eth0 up
ip -n outside route add 169.254.25.79/32 via 10.88.0.2
ip -n outside route add 169.254.169.254/32 via 10.88.0.2
ip route add 169.254.169.254/32 via 10.88.0.1
echo 1 > /proc/sys/net/ipv4/ip_forward
`
	run(t, "sh", "-e", "-c", script)
	// Count packets of pods that arrive at Azure, and packets to the metadata address that are not from the node.
	inNS(t, "azure", func() {
		run(t, "iptables-nft", "-t", "raw", "-A", "PREROUTING", "-s", "10.77.1.0/24")
		run(t, "iptables-nft", "-t", "raw", "-A", "PREROUTING", "-d", "169.254.169.254/32", "!", "-s", nodeIP)
	})
}

// inNS runs do on a thread in the named namespace: pod, azure or outside. Sockets opened there stay there.
func inNS(t *testing.T, name string, do func()) {
	t.Helper()
	failed := make(chan error)
	go func() {
		defer close(failed)
		runtime.LockOSThread() // Never unlocked: the thread ends with this goroutine.
		file, err := os.Open("/run/netns/" + name)
		if err != nil {
			failed <- err
			return
		}
		defer file.Close()
		if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
			failed <- fmt.Errorf("entering network namespace %s: %w", name, err)
			return
		}
		do()
	}()
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
}

// links describes each link of this namespace with its addresses. What the kernel changes by itself, after the command
// that causes it has returned, is left out: carrier and operational state, duplicate address detection ("tentative"),
// lifetimes, and the link-local IPv6 addresses that it adds once there is a carrier.
func links(t *testing.T) string {
	t.Helper()
	all, err := retryInterrupted(netlink.LinkList)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, link := range all {
		a := link.Attrs()
		fmt.Fprintf(&text, "%d: %s: kind %s, up %t, master %d, peer or parent %d, MTU %d, MAC %s, alias %q\n",
			a.Index, a.Name, link.Type(), a.Flags&net.FlagUp != 0, a.MasterIndex, a.ParentIndex, a.MTU, a.HardwareAddr, a.Alias)
		addresses, err := retryInterrupted(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
		if err != nil {
			t.Fatal(err)
		}
		for _, address := range addresses {
			if address.IP.To4() == nil && address.IP.IsLinkLocalUnicast() {
				continue
			}
			fmt.Fprintf(&text, "    %s, scope %d, broadcast %s, label %q\n", address.IPNet, address.Scope, address.Broadcast, address.Label)
		}
	}
	return text.String()
}

// run runs a command in the namespace of the calling thread and returns what it prints.
func run(t *testing.T, command string, args ...string) string {
	t.Helper()
	out, err := exec.Command(command, args...).CombinedOutput()
	if err != nil {
		// Not Fatal: this may be another goroutine than the test's.
		t.Errorf("%s %s: %v\n%s", command, strings.Join(args, " "), err, out)
	}
	return string(out)
}
