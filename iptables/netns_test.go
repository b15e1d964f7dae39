package iptables

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/internal/netnstest"
	"github.com/podidentity/podidentity/internal/nodelink"
)

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
	netnstest.Run(t, "sh", "-e", "-c", script)
	// Count packets of pods that arrive at Azure, and packets to the metadata address that are not from the node.
	netnstest.OnThreadIn(t, "azure", func() {
		netnstest.Run(t, "iptables-nft", "-t", "raw", "-A", "PREROUTING", "-s", "10.77.1.0/24")
		netnstest.Run(t, "iptables-nft", "-t", "raw", "-A", "PREROUTING", "-d", "169.254.169.254/32", "!", "-s", nodeIP)
	})
}

// links describes each link of this namespace with its addresses. What the kernel changes by itself, after the command
// that causes it has returned, is left out: carrier and operational state, duplicate address detection ("tentative"),
// lifetimes, and the link-local IPv6 addresses that it adds once there is a carrier.
func links(t *testing.T) string {
	t.Helper()
	all, err := nodelink.RetryInterrupted(netlink.LinkList)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, link := range all {
		a := link.Attrs()
		fmt.Fprintf(&text, "%d: %s: kind %s, up %t, master %d, peer or parent %d, MTU %d, MAC %s, alias %q\n",
			a.Index, a.Name, link.Type(), a.Flags&net.FlagUp != 0, a.MasterIndex, a.ParentIndex, a.MTU, a.HardwareAddr, a.Alias)
		addresses, err := nodelink.RetryInterrupted(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
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
