package links

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	// maxAddresses is the highest number of addresses of one link. A pod has one IPv4 address per network, and few networks.
	maxAddresses = 8
	// claimTime is how long an address identifies nobody after it was seen behind another link.
	claimTime = 10 * time.Second
)

// Config has the settings of a Table.
type Config struct {
	File string // where the table is remembered while NMI does not run
	Log  *zap.Logger
	// OnChange is called after a change that can confirm an address. It must not block or call the table.
	OnChange func()
	// OnState is called with nil when the table is up to date, and with the error when it is not.
	OnState func(error)
}

// Table knows the network links of the node, when each was created, and which addresses are behind it. It is safe for
// concurrent use.
type Table struct {
	cfg   Config
	net   network
	clock clock

	mu       sync.Mutex
	failure  error         // why the table is not up to date; nil if it is
	current  time.Duration // all events until this time are processed
	links    map[int]*link // by index
	bridges  bridges
	records  map[netip.Addr]*record
	resolved map[netip.Addr]result // cleared by each change of links, routes, neighbors and forwarding tables
	dirty    bool                  // changed since it was saved
}

// link is a link of the node.
type link struct {
	key
	kind      string
	master    int // index of the bridge that the link is a port of; 0 if none
	created   creation
	addresses int  // records of this link
	shared    bool // there were more than maxAddresses
}

// key identifies a link while it exists. The kernel may give the index of a deleted link to a new one.
type key struct {
	Index int    `json:"index"`
	Name  string `json:"name"`
	MAC   string `json:"mac"`  // of the node's end
	Peer  int    `json:"peer"` // index of the pod's end
}

// record is the link that an address is assigned to. It exists until the link is deleted, or observe replaces it
// because the address is behind another link.
type record struct {
	link *link
	pod  string // UID of the pod that is confirmed to be behind the link with this address; "" if none
	// claimed is when the address was last seen behind another link; 0 if never.
	claimed time.Duration
}

// result is the link behind an address, or why there is none.
type result struct {
	index int // of the interface to which the node sends packets: the link, or its bridge
	link  *link
	err   *Unconfirmed
}

// errNotRead is the failure of a table that Run has not read yet.
var errNotRead = errors.New("NMI has not read the network links of the node yet")

// New returns a Table of the links of the network namespace in which Run is called.
func New(cfg Config) *Table { return newTable(cfg, &kernel{}, systemClock()) }

func newTable(cfg Config, network network, clock clock) *Table {
	return &Table{
		cfg: cfg, net: network, clock: clock, failure: errNotRead,
		links: map[int]*link{}, bridges: newBridges(), records: map[netip.Addr]*record{}, resolved: map[netip.Addr]result{},
	}
}

// Confirm returns nil if the pod of the claim is behind the address.
func (t *Table) Confirm(claim Claim) *Unconfirmed {
	claim.Address = claim.Address.Unmap()
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.processEvents(); err != nil {
		return &Unconfirmed{Cause: NotWatching, text: err.Error()}
	}
	behind, ok := t.resolved[claim.Address]
	if !ok {
		behind = t.resolve(claim.Address)
		t.resolved[claim.Address] = behind
	}
	if behind.err != nil {
		return behind.err
	}
	switch claim.Interface {
	case 0, behind.index:
	case -1:
		return &Unconfirmed{Cause: OtherLink, text: "the kernel does not say on which network interface the connection was opened"}
	default:
		return &Unconfirmed{Cause: OtherLink, text: "the connection was opened on another network interface than the one to which the node sends packets for its address"}
	}
	rec, err := t.observe(claim.Address, behind.link)
	if err != nil || rec.pod == claim.UID {
		return err
	}
	if err := behind.link.created.check(claim, t.clock.offset()); err != nil {
		return err
	}
	rec.pod = claim.UID
	return nil
}

// resolve returns the link behind an address.
func (t *Table) resolve(address netip.Addr) result {
	noLink := func(format string, args ...any) result {
		return result{err: &Unconfirmed{Cause: NoLink, text: fmt.Sprintf(format, args...)}}
	}
	index, err := t.net.route(address)
	if err != nil {
		return noLink("the node has no direct route to the address: %v", err)
	}
	l := t.links[index]
	if l != nil && l.kind == "bridge" {
		port, ok := t.bridges.port(neighborKey{index, address})
		if !ok {
			return noLink("the address is not behind exactly one port of bridge %s", l.Name)
		}
		l = t.links[port]
	}
	switch {
	case l == nil: // the event of the link will clear t.resolved
		return noLink("the network link behind the address is changing")
	case l.kind != "veth" && l.kind != "netkit":
		return noLink("network link %s, behind which the address is, is not that of one pod", l.Name)
	}
	return result{index: index, link: l}
}

// observe returns the record of an address that is behind the link. If the address was assigned to another link,
// observe moves the record, or returns an error.
func (t *Table) observe(address netip.Addr, l *link) (*record, *Unconfirmed) {
	rec, known := t.records[address]
	switch {
	case known && rec.link == l:
		if rec.claimed != 0 && t.clock.sinceBoot()-rec.claimed < claimTime {
			return nil, claimed
		}
		rec.claimed = 0
		return rec, t.checkShared(l)
	case known && !movable(rec.link, l):
		if rec.claimed == 0 {
			t.cfg.Log.Warn("an address moved to another network link while its former link still exists; no pod gets tokens by this address until it is back",
				zap.Stringer("address", address), zap.String("link", l.Name), zap.String("former_link", rec.link.Name))
		}
		rec.claimed = max(t.clock.sinceBoot(), 1)
		return nil, claimed
	}
	t.dirty = true
	if l.addresses >= maxAddresses {
		l.shared = true
	}
	if err := t.checkShared(l); err != nil {
		return nil, err
	}
	if known {
		rec.link.addresses--
	}
	rec = &record{link: l}
	t.records[address] = rec
	l.addresses++
	return rec, nil
}

var claimed = &Unconfirmed{Cause: Claimed, text: "the address moved to another network link while its former link still exists: a pod may claim it by ARP or by its MAC, or a route of the node leads to a link that is not newer"}

func (t *Table) checkShared(l *link) *Unconfirmed {
	if !l.shared {
		return nil
	}
	return &Unconfirmed{Cause: SharedLink, text: fmt.Sprintf("network link %s has more than %d addresses, so several pods may be behind it", l.Name, maxAddresses)}
}

// movable reports whether the network plugin may have moved an address between two links that exist. See the package
// comment.
func movable(from, to *link) bool {
	sameBridge := from.master != 0 && from.master == to.master
	return !sameBridge && to.created.From >= from.created.To
}
