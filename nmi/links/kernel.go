package links

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/internal/nodelink"
)

const (
	// receiveBuffer is the size of the queue of events. The start of a hundred pods at once needs less than a tenth.
	receiveBuffer = 4 << 20
	// maxEvent is the highest size of a datagram of events; the kernel sends one event in each, with at most a few pages.
	maxEvent = 64 << 10
	// subscribed are the groups of events.
	subscribed = 1<<(unix.RTNLGRP_LINK-1) | 1<<(unix.RTNLGRP_NEIGH-1) | 1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV4_RULE-1) | 1<<(unix.RTNLGRP_IPV4_IFADDR-1)
)

// kernel is the network of the network namespace in which start is called.
type kernel struct {
	handle *netlink.Handle // for requests; nil before start
	buffer []byte

	mu     sync.Mutex // protects the fields below
	fd     int        // belongs to file
	file   *os.File   // nil before start and after close
	closed bool       // by interrupt
}

func (k *kernel) start() (state, error) {
	k.close()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return state{}, fmt.Errorf("opening a netlink socket: %w", err)
	}
	// Exceeding the limit of the node requires CAP_NET_ADMIN, which both captures also need. Without it the queue
	// is smaller.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: subscribed}); err != nil {
		unix.Close(fd)
		return state{}, fmt.Errorf("subscribing to changes of network links: %w", err)
	}
	k.mu.Lock()
	k.fd, k.file = fd, os.NewFile(uintptr(fd), "netlink")
	k.mu.Unlock()
	if k.handle == nil {
		if k.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return state{}, fmt.Errorf("opening a netlink socket for requests: %w", err)
		}
	}
	if k.buffer == nil {
		k.buffer = make([]byte, maxEvent)
	}
	return k.read()
}

func (k *kernel) read() (state, error) {
	var s state
	links, err := nodelink.RetryInterrupted(k.handle.LinkList)
	if err != nil {
		return s, fmt.Errorf("listing the network links of the node: %w", err)
	}
	for _, l := range links {
		s.links = append(s.links, linkEventOf(l))
	}
	neighbors, err := nodelink.RetryInterrupted(func() ([]netlink.Neigh, error) { return k.handle.NeighList(0, netlink.FAMILY_V4) })
	if err != nil {
		return s, fmt.Errorf("listing the neighbors of the node: %w", err)
	}
	for i := range neighbors {
		if e, ok := neighborEventOf(&neighbors[i], false).(neighborEvent); ok {
			s.neighbors = append(s.neighbors, e)
		}
	}
	forwards, err := nodelink.RetryInterrupted(func() ([]netlink.Neigh, error) { return k.handle.NeighList(0, unix.AF_BRIDGE) })
	if err != nil {
		return s, fmt.Errorf("listing the forwarding tables of the bridges of the node: %w", err)
	}
	for i := range forwards {
		if e, ok := neighborEventOf(&forwards[i], false).(forwardEvent); ok {
			s.forwards = append(s.forwards, e)
		}
	}
	return s, nil
}

// maxPending bounds the events that one call of pending returns, and so how long it holds up a request.
const maxPending = 100_000

func (k *kernel) pending() ([]event, error) {
	var events []event
	for len(events) < maxPending {
		n, from, err := unix.Recvfrom(k.fd, k.buffer, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return events, nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, fmt.Errorf("reading changes of network links: %w", err)
		case n > len(k.buffer):
			return nil, fmt.Errorf("reading changes of network links: an event has %d bytes", n)
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // not from the kernel
		}
		if events, err = appendEvents(events, k.buffer[:n]); err != nil {
			return nil, fmt.Errorf("reading changes of network links: %w", err)
		}
	}
	return nil, fmt.Errorf("reading changes of network links: more than %d at once", maxPending)
}

func appendEvents(events []event, datagram []byte) ([]event, error) {
	messages, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		switch m.Header.Type {
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			// Messages of family AF_BRIDGE are about a link as a port. RTM_DELLINK says there that it is no port any more.
			if len(m.Data) < unix.SizeofIfInfomsg || nl.DeserializeIfInfomsg(m.Data).Family != unix.AF_UNSPEC {
				continue
			}
			l, err := netlink.LinkDeserialize((*unix.NlMsghdr)(&m.Header), m.Data)
			if err != nil {
				return nil, err
			}
			e := linkEventOf(l)
			e.gone = m.Header.Type == unix.RTM_DELLINK
			events = append(events, e)
		case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
			if len(m.Data) < unix.SizeofNdMsg {
				continue
			}
			n, err := netlink.NeighDeserialize(m.Data)
			if err != nil {
				return nil, err
			}
			if e := neighborEventOf(n, m.Header.Type == unix.RTM_DELNEIGH); e != nil {
				events = append(events, e)
			}
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE, unix.RTM_NEWRULE, unix.RTM_DELRULE, unix.RTM_NEWADDR, unix.RTM_DELADDR:
			events = append(events, routeEvent{})
		}
	}
	return events, nil
}

func linkEventOf(l netlink.Link) linkEvent {
	a := l.Attrs()
	return linkEvent{key: key{Index: a.Index, Name: a.Name, MAC: a.HardwareAddr.String(), Peer: a.ParentIndex}, kind: l.Type(), master: a.MasterIndex}
}

// neighborEventOf returns a neighborEvent, a forwardEvent, or nil for an entry that is neither.
func neighborEventOf(n *netlink.Neigh, gone bool) event {
	mac := n.HardwareAddr.String()
	switch n.Family {
	case unix.AF_BRIDGE:
		if n.MasterIndex == 0 || mac == "" { // not an entry of a bridge
			return nil
		}
		e := forwardEvent{forwardKey: forwardKey{hardware{n.MasterIndex, mac}, n.Vlan}, port: n.LinkIndex}
		if gone {
			e.port = 0
		}
		return e
	case unix.AF_INET:
		address, ok := netip.AddrFromSlice(n.IP)
		if !ok {
			return nil
		}
		e := neighborEvent{neighborKey: neighborKey{bridge: n.LinkIndex, address: address.Unmap()}, mac: mac}
		if gone || n.State&(netlink.NUD_INCOMPLETE|netlink.NUD_FAILED) != 0 || n.State == netlink.NUD_NONE {
			e.mac = ""
		}
		return e
	}
	return nil
}

func (k *kernel) route(address netip.Addr) (int, error) {
	routes, err := k.handle.RouteGet(address.AsSlice())
	switch {
	case err != nil:
		return 0, err
	case len(routes) != 1:
		return 0, fmt.Errorf("%d routes", len(routes))
	}
	r := routes[0]
	switch {
	case r.Type == unix.RTN_LOCAL:
		return 0, errors.New("the address is one of the node")
	case r.Type != unix.RTN_UNICAST:
		return 0, fmt.Errorf("the route has type %d", r.Type)
	case r.Gw != nil || r.Via != nil || len(r.MultiPath) > 0 || r.Encap != nil || r.MPLSDst != nil:
		return 0, errors.New("the route has a gateway")
	}
	return r.LinkIndex, nil
}

func (k *kernel) wait(timeout time.Duration) {
	k.mu.Lock()
	file, fd := k.file, k.fd
	if file == nil || k.closed || file.SetReadDeadline(time.Now().Add(timeout)) != nil {
		k.mu.Unlock()
		return
	}
	k.mu.Unlock()
	conn, err := file.SyscallConn()
	if err != nil {
		return
	}
	// The error is that of the deadline, or of a closed file. The caller looks for events in any case.
	_ = conn.Read(func(uintptr) bool {
		var none [1]byte
		_, _, err := unix.Recvfrom(fd, none[:], unix.MSG_DONTWAIT|unix.MSG_PEEK)
		return !errors.Is(err, unix.EAGAIN)
	})
}

// interrupt makes wait return at once from now on.
func (k *kernel) interrupt() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	if k.file != nil {
		_ = k.file.SetReadDeadline(time.Unix(1, 0))
	}
}

func (k *kernel) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.file != nil {
		k.file.Close()
		k.file = nil
	}
}
