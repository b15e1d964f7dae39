package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Addresses. They are constants, because they exist only inside namespaces that are isolated from everything else.
const (
	controlPlaneIP = "10.10.0.1"
	azureIP        = "10.10.0.254"
	imdsIP         = "169.254.169.254"
	hostBits       = 24

	serviceCIDR = "10.96.0.0/16"
	serviceIP   = "10.96.0.1" // of the Service kubernetes.default, the first address of serviceCIDR
	apiPort     = "443"
)

// The network namespaces of the control plane and of the fake Azure, and the bridge in the first of them that connects all
// namespaces. ip -n takes the names.
var (
	ControlPlaneNetns  = namePrefix + "cp"
	ControlPlaneBridge = namePrefix + "br0"
	azureNetns         = namePrefix + "azure"
)

// nodeSpec is the name and the addresses of a node.
type nodeSpec struct {
	Name    string
	IP      string
	PodCIDR string
}

var nodeSpecs = []nodeSpec{
	{Name: "node1", IP: "10.10.0.11", PodCIDR: "10.244.1.0/24"},
	{Name: "node2", IP: "10.10.0.12", PodCIDR: "10.244.2.0/24"},
}

func (n nodeSpec) netns() string { return namePrefix + n.Name }

func netnsPath(name string) string { return filepath.Join(netnsDir, name) }

// makeNetwork creates the four namespaces, the bridge between them and their routes:
//
//	podid-cp     10.10.0.1 on the bridge, 10.96.0.1 on lo
//	podid-nodeN  10.10.0.1N on eth0, pods in 10.244.N.0/24
//	podid-azure  10.10.0.254 on eth0, 169.254.169.254 on lo
//
// Every node routes the metadata address to podid-azure. If no rule on the node captures a pod's packet, the node
// forwards the packet, and it arrives in podid-azure with the pod's own source address.
//
// The API server listens on port 443 of podid-cp. That namespace also has the address of the Service
// kubernetes.default, and nodes route the service range there. This replaces kube-proxy for the one Service that
// in-cluster clients need, without NAT rules that could interfere with the rules under test.
func makeNetwork() error {
	if err := prepareNetnsDir(); err != nil {
		return err
	}
	names := []string{ControlPlaneNetns, azureNetns}
	for _, n := range nodeSpecs {
		names = append(names, n.netns())
	}
	for _, name := range names {
		if err := createNetns(name); err != nil {
			return err
		}
	}

	cp, err := openNetns(ControlPlaneNetns)
	if err != nil {
		return err
	}
	defer cp.close()
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: ControlPlaneBridge}}
	if err := cp.LinkAdd(bridge); err != nil {
		return fmt.Errorf("adding bridge %s in %s: %w", ControlPlaneBridge, cp.name, err)
	}
	if err := cp.configure(ControlPlaneBridge, controlPlaneIP, hostBits); err != nil {
		return err
	}
	if err := cp.configure("lo", serviceIP, 32); err != nil {
		return err
	}
	if err := cp.connect(azureNetns, azureIP, bridge); err != nil {
		return err
	}
	for _, n := range nodeSpecs {
		if err := cp.connect(n.netns(), n.IP, bridge); err != nil {
			return err
		}
	}

	azure, err := openNetns(azureNetns)
	if err != nil {
		return err
	}
	defer azure.close()
	if err := azure.configure("lo", imdsIP, 32); err != nil {
		return err
	}
	for _, n := range nodeSpecs {
		if err := errors.Join(cp.route(n.PodCIDR, n.IP), azure.route(n.PodCIDR, n.IP)); err != nil {
			return err
		}
		if err := n.routes(); err != nil {
			return err
		}
	}
	return nil
}

func (n nodeSpec) routes() error {
	ns, err := openNetns(n.netns())
	if err != nil {
		return err
	}
	defer ns.close()
	if err := errors.Join(ns.route(imdsIP+"/32", azureIP), ns.route(serviceCIDR, controlPlaneIP)); err != nil {
		return err
	}
	for _, other := range nodeSpecs {
		if other.Name != n.Name {
			if err := ns.route(other.PodCIDR, other.IP); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeNetwork removes the names of all network namespaces of the cluster. The kernel deletes a namespace and its
// links when no process is left in the namespace.
func removeNetwork() error {
	paths, err := filepath.Glob(netnsPath(namePrefix + "*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range paths {
		// EINVAL: a file without a mount, from an interrupted start.
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", path, err))
			continue
		}
		errs = append(errs, os.Remove(path))
	}
	// Only if the folder is empty: then no other program uses the folder and the mount on it.
	if left, err := os.ReadDir(netnsDir); err == nil && len(left) == 0 {
		_ = unix.Unmount(netnsDir, unix.MNT_DETACH)
		os.Remove(netnsDir)
	}
	return errors.Join(errs...)
}

// prepareNetnsDir makes the folder of named namespaces a shared mount, as `ip netns add` does at its first use. If a
// user ran that command later, its mount would cover the mounts in this folder, and removeNetwork could not unmount
// them.
func prepareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	const shared = unix.MS_SHARED | unix.MS_REC
	err := unix.Mount("", netnsDir, "none", shared, "")
	if errors.Is(err, unix.EINVAL) { // no mount yet
		if err = unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = unix.Mount("", netnsDir, "none", shared, "")
		}
	}
	if err != nil {
		return fmt.Errorf("making %s a shared mount: %w", netnsDir, err)
	}
	return nil
}

// insideNewNetns runs f in a new network namespace. The kernel deletes the namespace afterwards, unless f mounts it on
// a file or opens it.
func insideNewNetns(f func() error) error {
	return onThrowawayThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making a network namespace (needs CAP_SYS_ADMIN): %w", err)
		}
		return f()
	})
}

// AddNetns creates one more network namespace, for programs of a test or a benchmark. It adds the cluster's prefix to
// the name, and returns the whole name. The namespace is removed with the cluster.
func (NetworkNamespaces) AddNetns(name string) (string, error) {
	return namePrefix + name, createNetns(namePrefix + name)
}

func createNetns(name string) error {
	path := netnsPath(name)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("making network namespace %s: %w", name, err)
	}
	file.Close()
	return insideNewNetns(func() error {
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("making network namespace %s: binding it to %s: %w", name, path, err)
		}
		if err := refuseHostNetns(path); err != nil {
			return err
		}
		// /proc/sys/net shows the namespace of the thread that opens it.
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644); err != nil {
			return fmt.Errorf("enabling IP forwarding in %s: %w", name, err)
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			return fmt.Errorf("setting the link lo up in network namespace %s: %w", name, err)
		}
		return nil
	})
}

// netnsHandle configures one network namespace through netlink.
type netnsHandle struct {
	*netlink.Handle
	name string
	ns   netns.NsHandle
}

func openNetns(name string) (*netnsHandle, error) {
	if err := refuseHostNetns(netnsPath(name)); err != nil {
		return nil, err
	}
	ns, err := netns.GetFromPath(netnsPath(name))
	if err != nil {
		return nil, fmt.Errorf("opening network namespace %s: %w", name, err)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("opening a netlink socket in network namespace %s: %w", name, err)
	}
	return &netnsHandle{Handle: h, name: name, ns: ns}, nil
}

func (h *netnsHandle) close() {
	h.Close()
	h.ns.Close()
}

// connect adds a pair of links between the bridge, which is in h, and the namespace name. Inside the namespace name,
// the link is eth0 and has the address ip.
func (h *netnsHandle) connect(name, ip string, bridge netlink.Link) error {
	other, err := openNetns(name)
	if err != nil {
		return err
	}
	defer other.close()
	port := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: name},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsFd(other.ns),
	}
	if err := h.LinkAdd(port); err != nil {
		return fmt.Errorf("connecting %s with %s: %w", h.name, name, err)
	}
	if err := errors.Join(h.LinkSetMaster(port, bridge), h.LinkSetUp(port)); err != nil {
		return fmt.Errorf("connecting %s with %s: %w", h.name, name, err)
	}
	return other.configure("eth0", ip, hostBits)
}

func (h *netnsHandle) configure(link, ip string, bits int) error {
	l, err := h.LinkByName(link)
	if err != nil {
		return fmt.Errorf("finding the link %s in network namespace %s: %w", link, h.name, err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(ip).To4(), Mask: net.CIDRMask(bits, 32)}}
	if err := errors.Join(h.AddrAdd(l, addr), h.LinkSetUp(l)); err != nil {
		return fmt.Errorf("configuring %s in %s with the address %s: %w", link, h.name, ip, err)
	}
	return nil
}

func (h *netnsHandle) route(cidr, via string) error {
	prefix := netip.MustParsePrefix(cidr)
	dst := &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), 32)}
	if err := h.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via).To4()}); err != nil {
		return fmt.Errorf("adding the route to %s via %s in %s: %w", cidr, via, h.name, err)
	}
	return nil
}

// DialFrom returns a function that connects from within the network namespace at path, and from the address local
// unless local is nil. The caller can use the connection outside of the namespace, because a socket stays in the
// namespace in which it was created.
func DialFrom(path string, local net.Addr) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		if host, _, splitErr := net.SplitHostPort(address); splitErr != nil || !isAddress(host) {
			// The resolver would look up a host name in other goroutines, outside of the namespace.
			return nil, fmt.Errorf("connecting to %q inside network namespace %s: the address must be IP:PORT, without a host name", address, path)
		}
		err = insideNetns(path, func() error {
			conn, err = (&net.Dialer{LocalAddr: local}).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil
}
