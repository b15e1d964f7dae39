package iptables

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// LinkName is the link that has the listen address and nothing else.
const LinkName = "podidentity0"

// dumpAttempts is how often a listing is tried again that the kernel says changed while it was read.
const dumpAttempts = 5

// ownLink is the link with the listen address. It is a dummy link, or on the rare kernel without that driver a bridge
// that has no ports: to the one address on it the two are the same.
//
// Sockets bound to the address live on when link and address disappear, and work again when they return; so a repair
// does not concern the listener.
type ownLink struct {
	address netip.Addr
}

// linkState is what is there of the link. link is nil when there is none.
type linkState struct {
	link    netlink.Link
	up      bool
	address bool
	others  []netlink.Addr // Addresses of a former configuration.
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
			return state, fmt.Errorf("%w: %v is an address of another link (index %d); configure another listen address", ErrForeignLink, ip, a.LinkIndex)
		case !onOurs:
		case ip == l.address && ones == 32:
			state.address = true
		default:
			state.others = append(state.others, a)
		}
	}
	return state, nil
}

// checkOwn refuses a link with our name that cannot be one of ours.
func checkOwn(link netlink.Link) error {
	foreign := func(is string) error {
		return fmt.Errorf("%w: link %s %s; nothing was changed: find out who made it, then rename or delete it", ErrForeignLink, LinkName, is)
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
			return changed, fmt.Errorf("link %s was deleted while it was being set up", LinkName)
		}
	}
	if !state.address {
		// Scope link keeps it from being the source of anything that goes elsewhere.
		wanted := &netlink.Addr{IPNet: netlink.NewIPNet(net.IP(l.address.AsSlice())), Scope: unix.RT_SCOPE_LINK}
		if err := netlink.AddrAdd(state.link, wanted); err != nil && !errors.Is(err, unix.EEXIST) {
			return changed, fmt.Errorf("adding %v to link %s: %w", l.address, LinkName, err)
		}
		changed = true
	}
	for _, other := range state.others {
		if err := netlink.AddrDel(state.link, &other); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return changed, fmt.Errorf("removing the former address %v from link %s: %w", other.IPNet, LinkName, err)
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
		texts = append(texts, fmt.Sprintf("%s lacks %v", LinkName, l.address))
	}
	for _, other := range state.others {
		texts = append(texts, fmt.Sprintf("%s has %v", LinkName, other.IPNet))
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

// retryInterrupted repeats a listing while the kernel reports that it changed under the reader.
func retryInterrupted[T any](list func() (T, error)) (result T, err error) {
	for range dumpAttempts {
		if result, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return result, err
}
