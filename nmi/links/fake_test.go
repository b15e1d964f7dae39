package links

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
)

// FakeNetwork is a network that a test changes.
type FakeNetwork struct {
	mu     sync.Mutex
	state  map[int]linkEvent
	routes map[netip.Addr]int
	queue  []event
	broken error // of the next call of pending
	failed error // of start
	event  chan struct{}
	starts int
	next   int
}

// NewFakeNetwork returns a network with one bridge, of index 1, and its address range.
func NewFakeNetwork() *FakeNetwork {
	n := &FakeNetwork{state: map[int]linkEvent{}, routes: map[netip.Addr]int{}, event: make(chan struct{}, 1), next: 1}
	n.add("br0", "bridge", 0)
	return n
}

func (n *FakeNetwork) start() (state, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.starts++
	n.queue, n.broken = nil, nil
	var s state
	for _, l := range n.state {
		s.links = append(s.links, l)
	}
	return s, n.failed
}

func (n *FakeNetwork) pending() ([]event, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	events := n.queue
	n.queue = nil
	return events, n.broken
}

func (n *FakeNetwork) wait(timeout time.Duration) {
	select {
	case <-n.event:
	case <-time.After(timeout):
	}
}

func (n *FakeNetwork) interrupt() {
	select {
	case n.event <- struct{}{}:
	default:
	}
}

func (n *FakeNetwork) close() {}

func (n *FakeNetwork) route(address netip.Addr) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if index, ok := n.routes[address]; ok {
		return index, nil
	}
	return 0, errors.New("no route")
}

func (n *FakeNetwork) emit(e event) {
	n.mu.Lock()
	n.queue = append(n.queue, e)
	n.mu.Unlock()
	n.interrupt()
}

func (n *FakeNetwork) add(name, kind string, master int) (index int) {
	n.mu.Lock()
	index = n.next
	n.next++
	e := linkEvent{key: key{Index: index, Name: name, MAC: fmt.Sprintf("02:00:00:00:00:%02x", index%256)}, kind: kind, master: master}
	n.state[index] = e
	n.mu.Unlock()
	n.emit(e)
	return index
}

// AddPod adds a link with a route of the address.
func (n *FakeNetwork) AddPod(address netip.Addr) (index int) {
	n.mu.Lock()
	name := fmt.Sprintf("veth%d", n.next)
	n.mu.Unlock()
	index = n.add(name, "veth", 0)
	n.setRoute(address, index)
	return index
}

func (n *FakeNetwork) setRoute(address netip.Addr, index int) {
	n.mu.Lock()
	n.routes[address] = index
	n.mu.Unlock()
	n.emit(routeEvent{})
}

// Remove removes a link. The kernel reports no end of its routes.
func (n *FakeNetwork) Remove(index int) {
	n.mu.Lock()
	e := n.state[index]
	delete(n.state, index)
	for address, i := range n.routes {
		if i == index {
			delete(n.routes, address)
		}
	}
	n.mu.Unlock()
	e.gone = true
	n.emit(e)
}

// neighbor puts an address with a MAC behind a port of the bridge.
func (n *FakeNetwork) neighbor(address netip.Addr, mac string, port int) {
	n.mu.Lock()
	n.routes[address] = 1
	n.mu.Unlock()
	n.emit(forwardEvent{forwardKey{hardware{1, mac}, 0}, port})
	n.emit(neighborEvent{neighborKey{1, address}, mac})
}

// NewFakeTable returns a table of a fake network, with the clock of the bubble of the test.
func NewFakeTable(network *FakeNetwork, file string, onChange func()) *Table {
	boot := time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC) // before the time of a bubble
	c := clock{boot: "boot", read: func() (time.Time, time.Duration) {
		now := time.Now()
		return now, now.Sub(boot)
	}}
	return newTable(Config{File: file, Log: zap.NewNop(), OnChange: onChange}, network, c)
}

var (
	x         = netip.MustParseAddr("10.0.0.1")
	testStart = time.Unix(1_800_000_000, 0)
)

// node is a table with a clock and a network that the test controls, without Run.
type node struct {
	*Table
	t       *testing.T
	network *FakeNetwork
	elapsed time.Duration // since testStart, which is 1000 s after the boot
	shift   time.Duration // by which the clock was set
	boot    string
}

const testUptime = 1000 * time.Second

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, network: NewFakeNetwork(), boot: "this boot"}
	n.restart(filepath.Join(t.TempDir(), FileName))
	return n
}

// restart starts another table, as a restart of NMI does.
func (n *node) restart(file string) {
	n.t.Helper()
	n.Table = newTable(Config{File: file, Log: zap.NewNop()}, n.network, clock{boot: n.boot, read: func() (time.Time, time.Duration) {
		return testStart.Add(n.elapsed + n.shift), testUptime + n.elapsed
	}})
	if err := n.ensureStarted(true); err != nil {
		n.t.Fatal(err)
	}
}

// save writes the file, as Run does.
func (n *node) saveNow() {
	n.t.Helper()
	var w writer
	n.saveIfDue(&w, true)
	if w.err != nil {
		n.t.Fatal(w.err)
	}
}

// poll processes the events at a time.
func (n *node) poll(at time.Duration) {
	n.t.Helper()
	n.elapsed = at
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.processEvents(); err != nil {
		n.t.Fatal(err)
	}
}

// claim says that a pod has address x, that the kubelet acknowledged it, and that its newest container started then. The
// times are seconds after testStart.
func claim(uid string, acknowledged, started int) Claim {
	at := func(seconds int) time.Time { return testStart.Add(time.Duration(seconds) * time.Second) }
	return Claim{Address: x, UID: uid, Acknowledged: at(acknowledged), Started: at(started)}
}

func (n *node) want(what string, c Claim, cause Cause) {
	n.t.Helper()
	var got Cause
	reason := n.Confirm(c)
	if reason != nil {
		got = reason.Cause
	}
	if got != cause {
		n.t.Errorf("%s: got %q (%v), want %q", what, got, reason, cause)
	}
}
