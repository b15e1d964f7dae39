package links

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

func TestAPodIsConfirmedIfItsNewestContainerIsNewerThanTheLink(t *testing.T) {
	// The link is created between 10.4 s and 10.6 s.
	for _, c := range []struct {
		name                  string
		acknowledged, started int
		read                  time.Duration // 0: by the watch
		cause                 Cause
	}{
		{"started later", 9, 11, 0, ""},
		{"started much later", -5000, 5000, 0, ""},
		{"started in the second before", 8, 9, 0, PodTooOld},
		{"started before the boot", -5000, -4000, 0, PodTooOld},
		{"started in the same second", 10, 10, 0, TooRecent},
		{"started in the same second, listed too early", 10, 10, 12500 * time.Millisecond, TooRecent},
		{"started in the same second, listed", 10, 10, 12600 * time.Millisecond, ""},
		{"started before, listed", 8, 9, time.Hour, PodTooOld},
		{"acknowledged in the same second", 10, 11, 0, ""},
		{"acknowledged after the link was created", 11, 12, 0, LinkTooOld},
		{"acknowledged after the link was created, listed", 11, 12, time.Hour, LinkTooOld},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			n.poll(10400 * time.Millisecond)
			n.network.AddPod(x)
			n.poll(10600 * time.Millisecond)
			claim := claim("a", c.acknowledged, c.started)
			if c.read != 0 {
				claim.Read = testStart.Add(c.read)
			}
			n.want(c.name, claim, c.cause)
			reason := n.Confirm(claim)
			if wantList := c.cause == TooRecent; wantList != (reason != nil && reason.ListAt.Equal(testStart.Add(12600*time.Millisecond))) {
				t.Errorf("a list can confirm: %+v", reason)
			}
		})
	}
	n := newNode(t)
	n.network.AddPod(x)
	n.want("without a start", Claim{Address: x, UID: "a"}, NotStarted)
	n.want("without a link", Claim{Address: netip.MustParseAddr("10.0.0.9"), UID: "a", Started: testStart}, NoLink)
}

func TestAConfirmedPodStaysConfirmedUntilTheLinkChanges(t *testing.T) {
	n := newNode(t)
	n.poll(10 * time.Second)
	link := n.network.AddPod(x)
	n.poll(10500 * time.Millisecond)
	listed := claim("a", 10, 10)
	listed.Read = testStart.Add(time.Minute)
	n.want("listed", listed, "")
	n.want("confirmed before", claim("a", 10, 10), "")
	n.want("another pod", claim("b", 10, 10), TooRecent)
	n.network.Remove(link)
	n.want("without a link", claim("a", 10, 10), NoLink)
	n.poll(20 * time.Second)
	n.network.AddPod(x)
	n.poll(20100 * time.Millisecond)
	n.want("the former pod", claim("a", 10, 10), PodTooOld)
	n.want("the former pod, listed", listed, PodTooOld)
	n.want("the new pod", claim("b", 20, 21), "")
}

// The kernel can use the index of a deleted link again, and nothing else may differ.
func TestALinkWithTheIndexOfADeletedOneIsNew(t *testing.T) {
	n := newNode(t)
	index := n.network.AddPod(x)
	n.poll(time.Second)
	n.want("before", claim("a", 0, 5), "")
	n.poll(10 * time.Second)
	e := n.network.state[index]
	n.network.Remove(index)
	n.network.emit(e)
	n.network.setRoute(x, index)
	n.poll(10100 * time.Millisecond)
	n.want("afterwards", claim("a", 0, 5), PodTooOld)
}

func TestANewNameOrMACIsNoNewLink(t *testing.T) {
	n := newNode(t)
	index := n.network.AddPod(x)
	n.poll(time.Second)
	n.want("before", claim("a", 0, 5), "")
	e := n.network.state[index]
	e.Name, e.MAC = "cali1", "ee:ee:ee:ee:ee:ee"
	n.network.emit(e)
	n.poll(10 * time.Second)
	n.want("afterwards", claim("a", 0, 5), "")
}

func TestAConnectionFromAnotherInterfaceIsNotConfirmed(t *testing.T) {
	n := newNode(t)
	index := n.network.AddPod(x)
	n.poll(time.Second)
	for number, cause := range map[int]Cause{0: "", index: "", index + 1: OtherLink, -1: OtherLink} {
		c := claim("a", 0, 5)
		c.Interface = number
		n.want("an interface", c, cause)
	}
	y := claim("b", 0, 5)
	y.Address = netip.MustParseAddr("10.0.0.2")
	port := n.network.add("veth-port", "veth", 1)
	n.network.neighbor(y.Address, "02:aa:00:00:00:01", port)
	for number, cause := range map[int]Cause{1: "", port: OtherLink} {
		y.Interface = number
		n.want("the bridge counts, not its port", y, cause)
	}
}

func TestAClockThatWasSetMakesTheOrderUnknownInsteadOfWrong(t *testing.T) {
	for _, shift := range []time.Duration{time.Hour, -time.Hour} {
		n := newNode(t)
		n.poll(10 * time.Second)
		n.network.AddPod(x)
		n.poll(10100 * time.Millisecond)
		n.shift = shift
		hour := int(shift / time.Second)
		n.want("started by the old clock", claim("a", 9, 12), map[bool]Cause{true: TooRecent, false: ""}[shift > 0])
		n.want("started by the new clock", claim("b", 9+hour, 12+hour), map[bool]Cause{true: "", false: TooRecent}[shift > 0])
	}
}

func TestOnlyLinksOfOnePodIdentify(t *testing.T) {
	n := newNode(t)
	n.poll(time.Second)
	uplink := n.network.add("eth0", "", 0)
	n.network.setRoute(x, uplink)
	n.want("the uplink", claim("a", 0, 5), NoLink)

	shared := n.network.AddPod(x)
	n.want("a veth", claim("a", 0, 5), "")
	for i := range maxAddresses - 1 {
		other := claim("other", 0, 5)
		other.Address = netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})
		n.network.setRoute(other.Address, shared)
		n.want("a veth with few addresses", other, "")
	}
	more := claim("other", 0, 5)
	more.Address = netip.MustParseAddr("10.0.2.1")
	n.network.setRoute(more.Address, shared)
	n.want("a veth with many addresses", more, SharedLink)
	n.want("the first address of a veth with many", claim("a", 0, 5), SharedLink)
}

func TestAnAddressThatMovesOnABridgeIdentifiesNobody(t *testing.T) {
	n := newNode(t)
	n.poll(time.Second)
	older := n.network.add("veth-older", "veth", 1)
	n.poll(2 * time.Second)
	owner := n.network.add("veth-owner", "veth", 1)
	n.poll(3 * time.Second)
	newer := n.network.add("veth-newer", "veth", 1)
	n.poll(4 * time.Second)
	a := claim("a", 0, 10) // a container of a restarted since
	n.network.neighbor(x, "02:aa:00:00:00:01", owner)
	n.poll(11 * time.Second) // no request, but the neighbor was seen
	for _, attacker := range []int{older, newer} {
		n.network.neighbor(x, "02:aa:00:00:00:02", attacker) // by ARP
		n.want("claimed by ARP", a, Claimed)
		n.network.neighbor(x, "02:aa:00:00:00:01", owner)
		n.want("just back", a, Claimed)
		n.elapsed += claimTime
		n.want("back", a, "")
		n.network.emit(forwardEvent{forwardKey{hardware{1, "02:aa:00:00:00:01"}, 0}, attacker}) // with the MAC of the owner
		n.network.emit(forwardEvent{forwardKey{hardware{1, "02:aa:00:00:00:01"}, 0}, owner})
		n.want("claimed by MAC, without a request meanwhile", a, Claimed)
		n.elapsed += claimTime
		n.want("back again", a, "")
	}
	n.network.neighbor(x, "02:aa:00:00:00:02", newer)
	n.want("the former link exists", a, Claimed)
	n.network.Remove(owner)
	n.want("the former link is gone", a, "")
}

func TestAMACInTwoVLANsOfABridgeIdentifiesNobody(t *testing.T) {
	n := newNode(t)
	n.poll(time.Second)
	one, other := n.network.add("veth-one", "veth", 1), n.network.add("veth-other", "veth", 1)
	n.network.neighbor(x, "02:aa:00:00:00:01", one)
	n.want("one", claim("a", 0, 5), "")
	n.network.emit(forwardEvent{forwardKey{hardware{1, "02:aa:00:00:00:01"}, 7}, one})
	n.want("both with the same port", claim("a", 0, 5), "")
	n.network.emit(forwardEvent{forwardKey{hardware{1, "02:aa:00:00:00:01"}, 7}, other})
	n.want("both", claim("a", 0, 5), NoLink)
	n.network.emit(forwardEvent{forwardKey{hardware{1, "02:aa:00:00:00:01"}, 7}, 0})
	n.want("one again", claim("a", 0, 5), "")
	n.network.emit(neighborEvent{neighborKey{1, x}, ""})
	n.want("no neighbor", claim("a", 0, 5), NoLink)
	if len(n.bridges.addresses) != 0 || len(n.bridges.neighbors) != 0 {
		t.Errorf("%v, %v", n.bridges.addresses, n.bridges.neighbors)
	}
}

func TestAPodThatSendsFromManyMACsUsesLittleMemory(t *testing.T) {
	n := newNode(t)
	port := n.network.add("veth-port", "veth", 1)
	for i := range 2 * maxForwards {
		n.network.emit(forwardEvent{forwardKey{hardware{1, fmt.Sprint(i)}, 0}, port})
	}
	n.network.neighbor(x, "02:aa:00:00:00:01", port) // the MAC is forgotten: its address came later
	n.poll(time.Second)
	n.want("the first packet", claim("a", 0, 5), NoLink)
	n.network.emit(forwardEvent{forwardKey{hardware{1, "02:aa:00:00:00:01"}, 0}, port})
	n.want("the next one", claim("a", 0, 5), "")
	if len(n.bridges.forwards) != maxForwards+1 {
		t.Errorf("%d MACs are known", len(n.bridges.forwards))
	}
}

func TestARouteMovesOnlyToANewerLink(t *testing.T) {
	n := newNode(t)
	n.poll(time.Second)
	older := n.network.add("veth-older", "veth", 0)
	n.poll(2 * time.Second)
	owner := n.network.AddPod(x)
	n.poll(3 * time.Second)
	newer := n.network.add("veth-newer", "veth", 0)
	n.poll(4 * time.Second)
	n.want("at first", claim("a", 0, 10), "")
	n.network.setRoute(x, older)
	n.want("an older link", claim("a", 0, 10), Claimed)
	n.network.setRoute(x, owner)
	n.elapsed += claimTime
	n.want("back", claim("a", 0, 10), "")
	n.network.setRoute(x, newer)
	n.want("a newer link", claim("a", 0, 2), PodTooOld)
	n.want("a newer link, and its pod", claim("b", 0, 10), "")
}

func TestLostEventsMakeEachNewLinkCountAsCreatedSinceThen(t *testing.T) {
	n := newNode(t)
	kept := n.network.AddPod(x)
	n.poll(time.Second)
	n.poll(10 * time.Second)
	y := netip.MustParseAddr("10.0.0.2")
	n.network.AddPod(y)
	n.network.broken = errors.New("no buffer space available")
	n.elapsed = 20 * time.Second
	n.want("before the links are read again", claim("a", 0, 5), NotWatching)
	if err := n.ensureStarted(false); err != nil || n.network.starts != 2 {
		t.Fatal(err, n.network.starts)
	}
	n.want("a link from before", claim("a", 0, 5), "")
	recent := claim("b", 0, 15)
	recent.Address = y
	n.want("a link from the time without events", recent, TooRecent)
	recent.Started = testStart.Add(9 * time.Second)
	n.want("a pod from before the time without events", recent, PodTooOld)

	n.network.Remove(kept)
	n.network.broken = errors.New("no buffer space available")
	n.want("before the links are read again", claim("a", 0, 5), NotWatching)
	n.network.failed = errors.New("no netlink")
	if err := n.ensureStarted(false); err == nil {
		t.Fatal("no error")
	}
	n.want("while the links cannot be read", claim("a", 0, 5), NotWatching)
	n.network.failed = nil
	if err := n.ensureStarted(false); err != nil {
		t.Fatal(err)
	}
	n.want("a link that is gone", claim("a", 0, 5), NoLink)
}

func TestTheNextNMIKnowsWhatTheLastOneSaved(t *testing.T) {
	n := newNode(t)
	file := n.cfg.File
	n.poll(10 * time.Second)
	n.network.AddPod(x)
	attacker := n.network.add("veth-attacker", "veth", 1)
	owner := n.network.add("veth-owner", "veth", 1)
	y := netip.MustParseAddr("10.0.0.2")
	n.network.neighbor(y, "02:aa:00:00:00:01", owner)
	n.poll(10100 * time.Millisecond)
	n.elapsed = 20 * time.Second
	n.saveNow()

	n.elapsed = 30 * time.Second
	z := netip.MustParseAddr("10.0.0.3")
	n.network.AddPod(z)
	n.network.neighbor(y, "02:aa:00:00:00:02", attacker)
	n.elapsed = 40 * time.Second
	n.restart(file)
	n.want("a link from before", claim("a", 9, 11), "")
	n.want("a link from before, and an older pod", claim("b", 5, 9), PodTooOld)
	for _, pod := range []struct {
		started int
		want    Cause
	}{{18, PodTooOld}, {25, TooRecent}, {40, ""}} {
		c := claim("c", 0, pod.started)
		c.Address = z
		n.want("a link of the time without NMI", c, pod.want)
	}
	n.network.neighbor(y, "02:aa:00:00:00:02", attacker)
	spoofed := claim("owner", 0, 35)
	spoofed.Address = y
	n.want("an address that was claimed meanwhile", spoofed, Claimed)
}

func TestAnUnusableFileMeansThatNothingIsKnown(t *testing.T) {
	n := newNode(t)
	n.poll(10 * time.Second)
	n.network.AddPod(x)
	n.poll(10100 * time.Millisecond)
	n.saveNow()
	good, err := os.ReadFile(n.cfg.File)
	if err != nil {
		t.Fatal(err)
	}
	change := func(change func(map[string]any)) string {
		var content map[string]any
		if err := json.Unmarshal(good, &content); err != nil {
			t.Fatal(err)
		}
		change(content)
		text, _ := json.Marshal(content)
		return string(text)
	}
	n.elapsed = time.Minute
	// Without the file the link may be as old as the boot, which was at -1000 s.
	for name, text := range map[string]string{
		"empty":         "",
		"cut off":       string(good[:len(good)/2]),
		"no JSON":       "\x00\xff",
		"another type":  `{"links": 7}`,
		"another boot":  change(func(c map[string]any) { c["boot"] = "another" }),
		"in the future": change(func(c map[string]any) { c["current"] = int64(time.Hour) * 24 }),
		"before 0":      change(func(c map[string]any) { c["current"] = -1 }),
		"reversed":      strings.ReplaceAll(string(good), `"From":`, `"From":1`),
		"bad address":   strings.ReplaceAll(string(good), `"links":[`, `"links":[{"addresses":["x"]},`),
		"too large":     string(good) + strings.Repeat(" ", maxFileSize),
		"null":          "null",
	} {
		if err := os.WriteFile(n.cfg.File, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		n.restart(n.cfg.File)
		n.want(name, claim("a", -5000, -2000), PodTooOld)
		n.want(name, claim("a", -5000, 5), TooRecent)
		n.want(name, claim("a", -5000, 60), "")
	}
	if err := os.WriteFile(n.cfg.File, good, 0o600); err != nil {
		t.Fatal(err)
	}
	n.restart(n.cfg.File)
	n.want("usable", claim("a", -5000, 5), PodTooOld)
	n.boot = ""
	n.restart(n.cfg.File)
	n.want("without a boot ID", claim("a", -5000, 5), TooRecent)
}

func FuzzRemember(f *testing.F) {
	f.Add([]byte(`{"boot":"b","current":5,"links":[{"index":1,"name":"v","mac":"m","peer":2,"kind":"veth","created":{"From":1,"To":2,"Offset":3},"addresses":["10.0.0.1"]}]}`))
	file := f.TempDir() + "/" + FileName
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if m, err := readMemory(file, "b", time.Hour); err == nil {
			table := newTable(Config{File: file}, NewFakeNetwork(), systemClock())
			for _, l := range m.Links {
				table.restore(linkEvent{key: l.key, kind: l.Kind}, m)
			}
		}
	})
}
