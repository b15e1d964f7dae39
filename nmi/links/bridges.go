package links

import "net/netip"

// maxForwards bounds the MACs without a known address: a pod can send from any number of them.
const maxForwards = 1 << 14

// bridges has the neighbors of the node on its bridges, and the forwarding tables of the bridges.
type bridges struct {
	neighbors map[neighborKey]string
	addresses map[hardware]map[netip.Addr]struct{} // the reverse of neighbors
	forwards  map[forwardKey]int                   // port of the bridge, by index
	vlans     map[int]struct{}                     // of the keys of forwards, now or earlier
}

func newBridges() bridges {
	return bridges{map[neighborKey]string{}, map[hardware]map[netip.Addr]struct{}{}, map[forwardKey]int{}, map[int]struct{}{}}
}

// neighborKey is an address on a bridge. The value is its MAC.
type neighborKey struct {
	bridge  int
	address netip.Addr
}

// hardware is a MAC on a bridge.
type hardware struct {
	bridge int
	mac    string
}

// forwardKey is a MAC in a VLAN of a bridge. The value is the index of the port behind which it is.
type forwardKey struct {
	hardware
	vlan int
}

// port returns the port of the bridge behind which the neighbor is.
func (b *bridges) port(neighbor neighborKey) (index int, ok bool) {
	mac := b.neighbors[neighbor]
	if mac == "" {
		return 0, false
	}
	for vlan := range b.vlans {
		port := b.forwards[forwardKey{hardware{neighbor.bridge, mac}, vlan}]
		switch {
		case port == 0:
		case ok && port != index: // in different VLANs
			return 0, false
		default:
			index, ok = port, true
		}
	}
	return index, ok
}

// setNeighbor sets the MAC of an address on a bridge, or deletes the address if mac is "".
func (b *bridges) setNeighbor(neighbor neighborKey, mac string) {
	if old := b.neighbors[neighbor]; old != "" {
		h := hardware{neighbor.bridge, old}
		delete(b.addresses[h], neighbor.address)
		if len(b.addresses[h]) == 0 {
			delete(b.addresses, h)
		}
	}
	if mac == "" {
		delete(b.neighbors, neighbor)
		return
	}
	b.neighbors[neighbor] = mac
	h := hardware{neighbor.bridge, mac}
	if b.addresses[h] == nil {
		b.addresses[h] = map[netip.Addr]struct{}{}
	}
	b.addresses[h][neighbor.address] = struct{}{}
}

// setForward sets the port of a MAC, or deletes the MAC if the port is 0. It returns the addresses that this affects.
func (b *bridges) setForward(e forwardEvent) map[netip.Addr]struct{} {
	old, addresses := b.forwards[e.forwardKey], b.addresses[e.hardware]
	switch {
	case old == e.port:
		return nil
	case e.port == 0:
		delete(b.forwards, e.forwardKey)
	case old != 0 || len(addresses) > 0 || len(b.forwards) < maxForwards:
		b.forwards[e.forwardKey], b.vlans[e.vlan] = e.port, struct{}{}
	}
	return addresses
}

// remove removes what depends on a bridge, or on a port of one.
func (b *bridges) remove(index int) {
	for neighbor := range b.neighbors {
		if neighbor.bridge == index {
			b.setNeighbor(neighbor, "")
		}
	}
	for forward, port := range b.forwards {
		if forward.bridge == index || port == index {
			delete(b.forwards, forward)
		}
	}
}
