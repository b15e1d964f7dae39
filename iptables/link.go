package iptables

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// LinkName is the name of the link that has only the listen address.
const LinkName = "podidentity0"

// dumpAttempts is the maximum number of attempts at a dump that the kernel reports as interrupted by a change.
const dumpAttempts = 5

// ownLink manages the link with the listen address. It is a dummy link, or on the rare kernel without that driver a
// bridge without ports, which works the same for a local address.
//
// Sockets bound to the address survive when the link is deleted, and work again when it is created again. So a repair
// does not affect the listener.
type ownLink struct {
	address netip.Addr
}

// linkState is the current state of the link. link is nil if there is none.
type linkState struct {
	link    netlink.Link
	up      bool
	address bool
	others  []netlink.Addr // Other IPv4 addresses of the link, such as the listen address of an earlier configuration.
}

func (l ownLink) inspect() (linkState, error) {
	var state linkState
	link, err := netlink.LinkByName(LinkName)
	if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
		return state, fmt.Errorf("looking for link %s: %w", LinkName, err)
	}
	if err == nil {
		if err := checkOwn(link); err != nil {
			return state, err
		}
		state.link = link
		state.up = link.Attrs().Flags&net.FlagUp != 0
	}
	addresses, err := retryInterrupted(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return state, fmt.Errorf("listing the addresses of the node: %w", err)
	}
	for _, a := range addresses {
		ip, _ := netip.AddrFromSlice(a.IP.To4())
		ones, _ := a.Mask.Size()
		switch onOurs := state.link != nil && a.LinkIndex == state.link.Attrs().Index; {
		case !onOurs && ip == l.address:
			return state, fmt.Errorf("%w: %v is an address of another link (index %d); set --nmi-listen-address to another address, or remove this address from that link", ErrForeignLink, ip, a.LinkIndex)
		case !onOurs:
		case ip == l.address && ones == 32:
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
		return fmt.Errorf("%w: link %s %s; NMI did not change the link: find out which program created the link, then rename or delete the link", ErrForeignLink, LinkName, is)
	}
	switch kind := link.Type(); kind {
	case "dummy":
		return nil
	case "bridge":
		links, err := retryInterrupted(netlink.LinkList)
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

func (l ownLink) ensure() (changed bool, err error) {
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
			return changed, fmt.Errorf("another program deleted link %s while NMI set it up", LinkName)
		}
	}
	if !state.address {
		// With scope link the kernel never chooses the address as the source of other traffic.
		address := &netlink.Addr{IPNet: netlink.NewIPNet(net.IP(l.address.AsSlice())), Scope: unix.RT_SCOPE_LINK}
		if err := netlink.AddrAdd(state.link, address); err != nil && !errors.Is(err, unix.EEXIST) {
			return changed, fmt.Errorf("adding %v to link %s: %w", l.address, LinkName, err)
		}
		changed = true
	}
	for _, other := range state.others {
		if err := netlink.AddrDel(state.link, &other); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return changed, fmt.Errorf("removing the unexpected address %v from link %s: %w", other.IPNet, LinkName, err)
		}
		changed = true
	}
	if !state.up {
		if err := netlink.LinkSetUp(state.link); err != nil {
			return changed, fmt.Errorf("setting link %s up: %w", LinkName, err)
		}
		changed = true
	}
	return changed, nil
}

func createLink() error {
	attributes := netlink.NewLinkAttrs()
	attributes.Name = LinkName
	err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: attributes})
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attributes})
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("creating link %s: %w", LinkName, err)
	}
	return nil
}

func (l ownLink) differences() ([]string, error) {
	state, err := l.inspect()
	if err != nil {
		return nil, err
	}
	if state.link == nil {
		return []string{"there is no " + LinkName}, nil
	}
	var texts []string
	if !state.up {
		texts = append(texts, LinkName+" is down")
	}
	if !state.address {
		texts = append(texts, fmt.Sprintf("%s does not have the address %v", LinkName, l.address))
	}
	for _, other := range state.others {
		texts = append(texts, fmt.Sprintf("%s has the additional address %v", LinkName, other.IPNet))
	}
	return texts, nil
}

func (l ownLink) remove() error {
	link, err := netlink.LinkByName(LinkName)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for link %s: %w", LinkName, err)
	}
	if err := checkOwn(link); err != nil {
		return err
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("deleting link %s: %w", LinkName, err)
	}
	return nil
}

// retryInterrupted calls list, which makes a dump, until no change interrupts the dump, at most dumpAttempts times.
func retryInterrupted[T any](list func() (T, error)) (result T, err error) {
	for range dumpAttempts {
		if result, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return result, err
}
