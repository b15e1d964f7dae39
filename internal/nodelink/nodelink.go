// Package nodelink manages the network link of NMI on a node. The link has only the address at which NMI listens for the
// requests of pods. The documentation of package iptables says why NMI has a link of its own.
package nodelink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Name is the name of the link.
const Name = "podidentity0"

// ErrForeign means that another program owns the link with NMI's name, or that another link has NMI's listen address. NMI
// changes neither.
var ErrForeign = errors.New("the link or the listen address of NMI belongs to another program")

// dumpAttempts is the maximum number of attempts at a dump that the kernel reports as interrupted by a change.
const dumpAttempts = 5

// Link is the link with the listen address. It is a dummy link, or on the rare kernel without that driver a
// bridge without ports, which works the same for a local address.
//
// Sockets bound to the address survive when the link is deleted, and work again when it is created again. So a repair
// does not affect the listener.
type Link struct {
	Address netip.Addr
}

// linkState is the current state of the link. link is nil if there is none.
type linkState struct {
	link    netlink.Link
	up      bool
	address bool
	others  []netlink.Addr // Other IPv4 addresses of the link, such as the listen address of an earlier configuration.
}

func (l Link) inspect() (linkState, error) {
	var state linkState
	link, err := netlink.LinkByName(Name)
	if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
		return state, fmt.Errorf("looking for link %s: %w", Name, err)
	}
	if err == nil {
		if err := checkOwn(link); err != nil {
			return state, err
		}
		state.link = link
		state.up = link.Attrs().Flags&net.FlagUp != 0
	}
	addresses, err := RetryInterrupted(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return state, fmt.Errorf("listing the addresses of the node: %w", err)
	}
	for _, a := range addresses {
		ip, _ := netip.AddrFromSlice(a.IP.To4())
		ones, _ := a.Mask.Size()
		switch onOurs := state.link != nil && a.LinkIndex == state.link.Attrs().Index; {
		case !onOurs && ip == l.Address:
			return state, fmt.Errorf("%w: %v is an address of another link (index %d); set --nmi-listen-address to another address, or remove this address from that link", ErrForeign, ip, a.LinkIndex)
		case !onOurs:
		case ip == l.Address && ones == 32:
			state.address = true
		default:
			state.others = append(state.others, a)
		}
	}
	return state, nil
}

// checkOwn returns an error if a link with our name cannot be ours.
func checkOwn(link netlink.Link) error {
	foreign := func(is string) error {
		return fmt.Errorf("%w: link %s %s; NMI did not change the link: find out which program created the link, then rename or delete the link", ErrForeign, Name, is)
	}
	switch kind := link.Type(); kind {
	case "dummy":
		return nil
	case "bridge":
		links, err := RetryInterrupted(netlink.LinkList)
		if err != nil {
			return fmt.Errorf("listing the links of the node: %w", err)
		}
		for _, port := range links {
			if port.Attrs().MasterIndex == link.Attrs().Index {
				return foreign("is a bridge with ports")
			}
		}
		return nil
	default:
		return foreign("is of kind " + kind)
	}
}

// Ensure creates the link, or repairs what differs from the expected state, and reports whether it changed anything.
func (l Link) Ensure() (changed bool, err error) {
	state, err := l.inspect()
	if err != nil {
		return false, err
	}
	if state.link == nil {
		if err := createLink(); err != nil {
			return false, err
		}
		changed = true
		if state, err = l.inspect(); err != nil {
			return changed, err
		}
		if state.link == nil {
			return changed, fmt.Errorf("another program deleted link %s while NMI set it up", Name)
		}
	}
	if !state.address {
		// With scope link the kernel never chooses the address as the source of other traffic.
		address := &netlink.Addr{IPNet: netlink.NewIPNet(net.IP(l.Address.AsSlice())), Scope: unix.RT_SCOPE_LINK}
		if err := netlink.AddrAdd(state.link, address); err != nil && !errors.Is(err, unix.EEXIST) {
			return changed, fmt.Errorf("adding %v to link %s: %w", l.Address, Name, err)
		}
		changed = true
	}
	for _, other := range state.others {
		if err := netlink.AddrDel(state.link, &other); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return changed, fmt.Errorf("removing the unexpected address %v from link %s: %w", other.IPNet, Name, err)
		}
		changed = true
	}
	if !state.up {
		if err := netlink.LinkSetUp(state.link); err != nil {
			return changed, fmt.Errorf("setting link %s up: %w", Name, err)
		}
		changed = true
	}
	return changed, nil
}

func createLink() error {
	attributes := netlink.NewLinkAttrs()
	attributes.Name = Name
	err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: attributes})
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attributes})
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("creating link %s: %w", Name, err)
	}
	return nil
}

// Differences describes what differs from the expected state.
func (l Link) Differences() ([]string, error) {
	state, err := l.inspect()
	if err != nil {
		return nil, err
	}
	if state.link == nil {
		return []string{"there is no " + Name}, nil
	}
	var texts []string
	if !state.up {
		texts = append(texts, Name+" is down")
	}
	if !state.address {
		texts = append(texts, fmt.Sprintf("%s does not have the address %v", Name, l.Address))
	}
	for _, other := range state.others {
		texts = append(texts, fmt.Sprintf("%s has the additional address %v", Name, other.IPNet))
	}
	return texts, nil
}

// Remove deletes the link. Idempotent.
func (l Link) Remove() error {
	link, err := netlink.LinkByName(Name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for link %s: %w", Name, err)
	}
	if err := checkOwn(link); err != nil {
		return err
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("deleting link %s: %w", Name, err)
	}
	return nil
}

// RetryInterrupted calls list, which dumps objects of the kernel, until no change interrupts the dump, at most dumpAttempts
// times. It returns what the last call returned.
func RetryInterrupted[T any](list func() (T, error)) (result T, err error) {
	for range dumpAttempts {
		if result, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return result, err
}
