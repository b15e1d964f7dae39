package links

import (
	"net/netip"
	"time"
)

// network is the network of the node. kernel implements it; tests use a fake. Its methods are not called concurrently, except
// wait and interrupt.
type network interface {
	// start subscribes to events, ends an earlier subscription, and returns the current state.
	start() (state, error)
	// pending returns the events since the last call, in their order, without waiting. After an error the subscription is
	// broken, and events are lost.
	pending() ([]event, error)
	// wait returns when there is an event, after the timeout, or after a call of interrupt.
	wait(timeout time.Duration)
	interrupt()
	// route returns the index of the link to which the node sends packets for the address, if there is no gateway.
	route(netip.Addr) (index int, err error)
	// close ends the subscription.
	close()
}

// state is the state of the network.
type state struct {
	links     []linkEvent
	neighbors []neighborEvent
	forwards  []forwardEvent
}

// event is a linkEvent, a neighborEvent, a forwardEvent or a routeEvent.
type event any

// linkEvent says that a link exists, or with gone that it does not.
type linkEvent struct {
	key
	kind   string
	master int
	gone   bool
}

// neighborEvent says that the neighbor has the MAC; "" if it has none any more.
type neighborEvent struct {
	neighborKey
	mac string
}

// forwardEvent says that the MAC is behind the port; 0 if the bridge does not know any more.
type forwardEvent struct {
	forwardKey
	port int
}

// routeEvent says that routes, routing rules or addresses of the node changed.
type routeEvent struct{}

// processEvents brings the table up to date. The caller holds t.mu.
func (t *Table) processEvents() error {
	if t.failure != nil {
		return t.failure
	}
	before := t.clock.sinceBoot()
	events, err := t.net.pending()
	if err != nil {
		t.failure = err
		return err
	}
	for _, e := range events {
		t.apply(e)
	}
	t.current = before
	return nil
}

// apply applies an event.
func (t *Table) apply(e event) {
	switch e := e.(type) {
	case linkEvent:
		// Also an event that does not change the table clears t.resolved: the kernel reports no end of the routes of a link
		// that goes down.
		if e.gone {
			t.remove(e.Index)
		} else {
			t.update(e)
		}
	case neighborEvent:
		// The neighbors on other links are not needed, and there may be many.
		if bridge := t.links[e.bridge]; bridge == nil || bridge.kind != "bridge" || t.bridges.neighbors[e.neighborKey] == e.mac {
			return
		}
		t.bridges.setNeighbor(e.neighborKey, e.mac)
		t.observeNeighbor(e.neighborKey)
	case forwardEvent:
		addresses := t.bridges.setForward(e)
		if len(addresses) == 0 {
			return
		}
		for address := range addresses {
			t.observeNeighbor(neighborKey{e.bridge, address})
		}
	}
	clear(t.resolved)
	if t.cfg.OnChange != nil {
		t.cfg.OnChange()
	}
}

// observeNeighbor notices that an address moved to another port of its bridge, although no request may come from there.
func (t *Table) observeNeighbor(neighbor neighborKey) {
	port, ok := t.bridges.port(neighbor)
	if l := t.links[port]; ok && l != nil && (l.kind == "veth" || l.kind == "netkit") {
		_, _ = t.observe(neighbor.address, l)
	}
}

// update adds a link, or updates it if it exists: the kernel reports the end of a link before it uses its index again.
func (t *Table) update(e linkEvent) {
	l := t.links[e.Index]
	if l != nil && l.kind == e.kind {
		t.dirty = t.dirty || l.key != e.key
		l.key, l.master = e.key, e.master
		return
	}
	t.remove(e.Index)
	t.add(e, creation{From: t.current, To: t.clock.sinceBoot(), Offset: t.clock.offset()})
}

func (t *Table) add(e linkEvent, created creation) *link {
	l := &link{key: e.key, kind: e.kind, master: e.master, created: created}
	t.links[e.Index], t.dirty = l, true
	return l
}

// remove removes a link and all that depends on it.
func (t *Table) remove(index int) {
	l := t.links[index]
	if l == nil {
		return
	}
	delete(t.links, index)
	t.dirty = true
	for address, rec := range t.records {
		if rec.link == l {
			delete(t.records, address)
		}
	}
	t.bridges.remove(index)
}

// read replaces what the table knows of the network by its current state. A link that exists unchanged since it was known
// keeps its creation and its records. remembered has the links of an earlier NMI, for the first call.
func (t *Table) read(now state, remembered *savedTable) {
	known := make(map[int]bool, len(now.links))
	for _, e := range now.links {
		known[e.Index] = true
		if l := t.links[e.Index]; l != nil && (l.key != e.key || l.kind != e.kind) {
			t.remove(e.Index) // perhaps deleted and created again while events were lost
		}
		if t.links[e.Index] == nil && remembered != nil {
			t.restore(e, remembered)
		}
		t.update(e)
	}
	for index := range t.links {
		if !known[index] {
			t.remove(index)
		}
	}
	t.bridges = newBridges()
	for _, e := range now.forwards {
		t.apply(e)
	}
	for _, e := range now.neighbors {
		t.apply(e)
	}
	clear(t.resolved)
}
