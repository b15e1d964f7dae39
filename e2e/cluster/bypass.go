package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// podBridge is the bridge of each node to which the network plugin connects the pods.
const podBridge = "cni0"

// BypassNetfilter makes packets between pods and the metadata address bypass the netfilter rules of a node, as with eBPF host
// routing: a program at the ingress of the pods' bridge sends requests to the uplink, and one at the ingress of the uplink
// sends responses to the bridge. restore removes the programs.
func (n NetworkNamespaces) BypassNetfilter(ctx context.Context, node string) (restore func(context.Context) error, err error) {
	if err := n.setBridgeNetfilter(ctx, node, "0"); err != nil {
		return nil, err
	}
	remove, err := attachBypass(node)
	if err != nil {
		return nil, errors.Join(err, n.setBridgeNetfilter(ctx, node, "1"))
	}
	return func(ctx context.Context) error { return errors.Join(remove(), n.setBridgeNetfilter(ctx, node, "1")) }, nil
}

// setBridgeNetfilter sets whether packets meet the rules already in the bridge, where the kernel can do that.
func (n NetworkNamespaces) setBridgeNetfilter(ctx context.Context, node, value string) error {
	_, err := n.InNode(ctx, node, "sysctl", "-e", "-q", "-w", "net.bridge.bridge-nf-call-iptables="+value)
	return err
}

// attachBypass attaches both programs on a node. remove removes them.
func attachBypass(node string) (remove func() error, err error) {
	ns, err := openNetns(namePrefix + node)
	if err != nil {
		return nil, err
	}
	defer ns.close()
	if err := ns.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: podBridge}}); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("adding bridge %s on %s: %w", podBridge, node, err)
	}
	bridge, err := ns.LinkByName(podBridge)
	if err != nil {
		return nil, fmt.Errorf("finding bridge %s on %s: %w", podBridge, node, err)
	}
	uplink, err := ns.LinkByName("eth0")
	if err != nil {
		return nil, fmt.Errorf("finding the uplink of %s: %w", node, err)
	}
	i := slices.IndexFunc(nodeSpecs, func(n nodeSpec) bool { return n.Name == node })
	imds, pods := netip.PrefixFrom(netip.MustParseAddr(imdsIP), 32), netip.MustParsePrefix(nodeSpecs[i].PodCIDR)
	err = errors.Join(
		redirectPackets(ns, bridge, uplink, pods, imds),
		redirectPackets(ns, uplink, bridge, imds, pods),
	)
	remove = func() error {
		ns, err := openNetns(namePrefix + node)
		if err != nil {
			return err
		}
		defer ns.close()
		return errors.Join(ns.QdiscDel(clsact(bridge)), ns.QdiscDel(clsact(uplink)))
	}
	if err != nil {
		return nil, errors.Join(err, remove())
	}
	return remove, nil
}

// clsact is the queueing discipline to which programs at a link are attached.
func clsact(link netlink.Link) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
}

// redirectPackets sends IPv4 packets that arrive on a link, and have such a source and destination, to another link.
func redirectPackets(ns *netnsHandle, from, to netlink.Link, source, destination netip.Prefix) error {
	program, err := redirectProgram(to.Attrs().Index, source, destination)
	if err != nil {
		return err
	}
	defer program.Close() // the filter keeps it
	if err := ns.QdiscAdd(clsact(from)); err != nil {
		return fmt.Errorf("adding the hooks of link %s: %w", from.Attrs().Name, err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs:  netlink.FilterAttrs{LinkIndex: from.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_IP, Priority: 1},
		Fd:           program.FD(),
		Name:         "bypass_netfilter",
		DirectAction: true,
	}
	if err := ns.FilterAdd(filter); err != nil {
		return fmt.Errorf("attaching a program to link %s: %w", from.Attrs().Name, err)
	}
	return nil
}

// redirectProgram returns a program that sends packets with such a source and destination to the link with the index, and
// accepts all others.
func redirectProgram(index int, source, destination netip.Prefix) (*ebpf.Program, error) {
	const sourceOffset, destinationOffset = 14 + 12, 14 + 16 // behind the Ethernet header
	instructions := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	instructions = append(instructions, acceptUnless(sourceOffset, source)...)
	instructions = append(instructions, acceptUnless(destinationOffset, destination)...)
	instructions = append(instructions,
		asm.Mov.Imm(asm.R1, int32(index)),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnRedirectNeigh.Call(),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("accept"), // TC_ACT_OK
		asm.Return(),
	)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bypass_netfilter", Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: instructions})
	if err != nil {
		return nil, fmt.Errorf("loading the program that bypasses netfilter: %w", err)
	}
	return program, nil
}

// acceptUnless accepts the packet unless its address at the offset is in the prefix.
func acceptUnless(offset int32, prefix netip.Prefix) asm.Instructions {
	address := prefix.Masked().Addr().As4()
	return asm.Instructions{
		asm.LoadAbs(offset, asm.Word), // into R0, in host byte order
		asm.RSh.Imm32(asm.R0, int32(32-prefix.Bits())),
		asm.JNE.Imm32(asm.R0, int32(binary.BigEndian.Uint32(address[:])>>(32-prefix.Bits())), "accept"),
	}
}
