package iptables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/podidentity/podidentity/internal/nodelink"
)

// change is a change of the tables by another program.
type change func(f *fakeTables)

func flush(table, chain string) change {
	return func(f *fakeTables) { f.chains[table][chain] = nil }
}

func insert(table, chain string, at int, rule string) change {
	return func(f *fakeTables) {
		words, _ := splitWords(rule)
		if err := f.insertAt(table, chain, at, words); err != nil {
			panic(err)
		}
	}
}

func appendRule(table, chain, rule string) change {
	return func(f *fakeTables) { insert(table, chain, len(f.chains[table][chain]), rule)(f) }
}

func deleteRule(table, chain string, at int) change {
	return func(f *fakeTables) {
		f.chains[table][chain] = slices.Delete(slices.Clone(f.chains[table][chain]), at, at+1)
	}
}

func move(table, chain string, from, to int) change {
	return func(f *fakeTables) {
		rules := slices.Clone(f.chains[table][chain])
		rule := rules[from]
		f.chains[table][chain] = slices.Insert(slices.Delete(rules, from, from+1), to, rule)
	}
}

// halfBuilt leaves an incomplete generation, like a crash during a repair.
func halfBuilt(table, chain string, rules ...string) change {
	return func(f *fakeTables) {
		f.chains[table][chain] = nil
		for _, rule := range rules {
			appendRule(table, chain, rule)(f)
		}
	}
}

// copyChain creates another generation with the same rules.
func copyChain(table, from, to string) change {
	return func(f *fakeTables) { f.chains[table][to] = slices.Clone(f.chains[table][from]) }
}

func jumpTo(chain string) string {
	for _, s := range slots(testMetadata, testListen, 0) {
		for g := range generations {
			if s.chain(g) == chain {
				return fmt.Sprintf("-m comment --comment %q -j %s", marker+s.why, chain)
			}
		}
	}
	panic(chain)
}

const (
	acceptAll   = "-j ACCEPT"
	foreignDNAT = "-d 169.254.169.254/32 -p tcp --dport 80 -j DNAT --to-destination 10.9.9.9:80"
)

// damages are states of an installation that a Sync has to repair. repaired is what Sync then returns. If repaired is
// nil, the tests do not check what Sync returns. They still check that no command opens a gap and that the rules reach
// their expected state.
var damages = []struct {
	name     string
	changes  []change
	repaired []string
}{
	{"nothing", nil, []string{}},
	{"nat flushed", []change{flush("nat", "PREROUTING"), flush("nat", "PODIDENTITY-NAT-A")}, []string{"nat jump", "nat chain"}},
	{"nat hook flushed", []change{flush("nat", "PREROUTING")}, []string{"nat jump"}},
	{"forward hook flushed", []change{flush("filter", "FORWARD")}, []string{"forward jump"}},
	{"everything flushed", []change{
		flush("filter", "FORWARD"), flush("filter", "INPUT"), flush("nat", "PREROUTING"),
		flush("filter", "PODIDENTITY-FWD-A"), flush("filter", "PODIDENTITY-IN-A"), flush("nat", "PODIDENTITY-NAT-A"),
	}, []string{"forward jump", "forward chain", "input jump", "input chain", "nat jump", "nat chain"}},
	{"earlier accept in forward", []change{insert("filter", "FORWARD", 0, acceptAll)}, []string{"forward jump"}},
	{"earlier accept in input", []change{insert("filter", "INPUT", 0, acceptAll)}, []string{"input jump"}},
	{"earlier foreign redirection", []change{insert("nat", "PREROUTING", 0, foreignDNAT)}, []string{"nat jump"}},
	{"jump doubled next to itself", []change{insert("filter", "FORWARD", 0, jumpTo("PODIDENTITY-FWD-A"))}, []string{"forward jump"}},
	{"jump doubled at the end", []change{appendRule("filter", "FORWARD", acceptAll), appendRule("filter", "FORWARD", jumpTo("PODIDENTITY-FWD-A"))}, []string{"forward jump"}},
	{"jump with another comment", []change{deleteRule("nat", "PREROUTING", 0), insert("nat", "PREROUTING", 0, "-j PODIDENTITY-NAT-A")}, []string{"nat jump"}},
	{"rule added to our chain", []change{appendRule("filter", "PODIDENTITY-IN-A", acceptAll)}, []string{"input chain"}},
	{"rule put first in our chain", []change{insert("filter", "PODIDENTITY-FWD-A", 0, acceptAll)}, []string{"forward chain"}},
	{"rule missing in our chain", []change{deleteRule("filter", "PODIDENTITY-FWD-A", 0)}, []string{"forward chain"}},
	{"all rules of ours replaced", []change{flush("filter", "PODIDENTITY-FWD-A"), appendRule("filter", "PODIDENTITY-FWD-A", acceptAll)}, []string{"forward chain"}},
	{"rules in another order", []change{move("filter", "PODIDENTITY-IN-A", 2, 0)}, []string{"input chain"}},
	{"another chain leads to ours", []change{insert("filter", "OUTPUT", 0, "-j PODIDENTITY-FWD-A"), insert("filter", "FORWARD", 0, acceptAll)}, []string{"forward jump"}},
	{"empty leftover", []change{halfBuilt("nat", "PODIDENTITY-NAT-B")}, []string{"nat leftover"}},
	{"half-built leftover", []change{halfBuilt("filter", "PODIDENTITY-IN-B", `-d 169.254.25.79/32 -i lo -m comment --comment "podidentity: the node itself may ask" -j RETURN`)}, []string{"input leftover"}},
	{"complete leftover, no jump to it", []change{copyChain("filter", "PODIDENTITY-FWD-A", "PODIDENTITY-FWD-B")}, []string{"forward leftover"}},
	{"repair cut short", []change{copyChain("filter", "PODIDENTITY-FWD-A", "PODIDENTITY-FWD-B"), insert("filter", "FORWARD", 0, jumpTo("PODIDENTITY-FWD-B"))}, []string{"forward leftover"}},
	{"repair cut short, then an accept first", []change{
		copyChain("filter", "PODIDENTITY-FWD-A", "PODIDENTITY-FWD-B"), insert("filter", "FORWARD", 0, jumpTo("PODIDENTITY-FWD-B")),
		insert("filter", "FORWARD", 0, acceptAll),
	}, nil},
	{"repair cut short, the first altered but protecting, an accept between", []change{
		copyChain("filter", "PODIDENTITY-FWD-A", "PODIDENTITY-FWD-B"), insert("filter", "FORWARD", 0, acceptAll),
		insert("filter", "FORWARD", 0, jumpTo("PODIDENTITY-FWD-B")), deleteRule("filter", "PODIDENTITY-FWD-B", 2),
	}, nil},
	{"repair cut short, the first no longer protecting", []change{
		copyChain("filter", "PODIDENTITY-FWD-A", "PODIDENTITY-FWD-B"), insert("filter", "FORWARD", 0, jumpTo("PODIDENTITY-FWD-B")),
		deleteRule("filter", "PODIDENTITY-FWD-B", 0),
	}, nil},
	{"repair cut short, both altered", []change{
		deleteRule("filter", "PODIDENTITY-FWD-A", 2),
		copyChain("filter", "PODIDENTITY-FWD-A", "PODIDENTITY-FWD-B"), insert("filter", "FORWARD", 0, acceptAll),
		insert("filter", "FORWARD", 0, jumpTo("PODIDENTITY-FWD-B")),
	}, nil},
}

// otherRules adds rules of other programs on the node. They must never change.
func otherRules(f *fakeTables) {
	f.chains["nat"]["KUBE-SERVICES"] = nil
	appendRule("nat", "PREROUTING", `-m comment --comment "kubernetes service portals" -j KUBE-SERVICES`)(f)
	appendRule("filter", "FORWARD", "-s 10.0.0.0/8 -j ACCEPT")(f)
	appendRule("filter", "INPUT", "-p tcp --dport 22 -j ACCEPT")(f)
}

// watch compares the outcomes for packets of a pod before and after each command, and fails the test if worst returns
// true for the outcomes of one of the packets.
func watch(t *testing.T, f *fakeTables, worst func(was, is outcome) bool) {
	t.Helper()
	before := f.outcomes()
	f.after = func(command string) {
		now := f.outcomes()
		for name, is := range now {
			if worst(before[name], is) {
				t.Errorf("after %q a pod's packet to %s is %v, was %v before\n%s", command, name, is, before[name], f.text())
			}
		}
		before = now
	}
}

func worse(was, is outcome) bool { return is < was }

// faults returns every kind of fault at each command. commands is the number of commands of a run without faults.
func faults(commands int) []fault {
	var all []fault
	for at := range commands {
		all = append(all, fault{at: at}, fault{at: at, applied: true}, fault{at: at, dead: true}, fault{at: at, applied: true, dead: true})
	}
	return all
}

// runWithEveryFault calls run on a prepared state without a fault. Then, for each fault and each time on a newly
// prepared state, it calls run with the fault and again without it. After each run without a fault it calls check.
// worst is the parameter of watch.
func runWithEveryFault(t *testing.T, prepare func() *fakeTables, run func(*fakeTables) error, worst func(was, is outcome) bool, check func(*testing.T, *fakeTables)) {
	t.Helper()
	clean := prepare()
	foreign := clean.foreignText()
	clean.op = 0
	watch(t, clean, worst)
	if err := run(clean); err != nil {
		t.Fatalf("without a fault: %v", err)
	}
	commands := clean.op
	check(t, clean)
	if got := clean.foreignText(); got != foreign {
		t.Errorf("foreign rules are now\n%s\nwere\n%s", got, foreign)
	}
	for _, fault := range faults(commands) {
		t.Run(fmt.Sprintf("%+v", fault), func(t *testing.T) {
			f := prepare()
			f.op, f.fault = 0, fault
			watch(t, f, worst)
			if err := run(f); err == nil && fault.dead {
				t.Error("a run that died reports success")
			}
			if !f.hit {
				t.Fatal("the fault was never reached: this test tests nothing")
			}
			f.fault.at = -1
			if err := run(f); err != nil {
				t.Fatalf("the run after the fault: %v", err)
			}
			check(t, f)
			if got := f.foreignText(); got != foreign {
				t.Errorf("foreign rules are now\n%s\nwere\n%s", got, foreign)
			}
		})
	}
}

func installed(t *testing.T, listen netip.AddrPort) *fakeTables {
	t.Helper()
	f := newFakeTables()
	otherRules(f)
	if err := newFakeCapture(t, f, nil, listen).Install(context.Background()); err != nil {
		t.Fatal(err)
	}
	return f
}

// checkInstalled fails unless pods are captured and there are no leftovers of ours.
func checkInstalled(t *testing.T, f *fakeTables) {
	t.Helper()
	f.after = nil
	c := newFakeCapture(t, f, nil, testListen)
	if err := c.Verify(context.Background()); err != nil {
		t.Errorf("Verify: %v", err)
	}
	if repaired, err := c.Sync(context.Background()); err != nil || len(repaired) != 0 {
		t.Errorf("a second Sync repaired %v, %v", repaired, err)
	}
	want := map[string]outcome{"tcp 80": captured, "tcp 443": dropped, "udp 53": dropped}
	if got := f.outcomes(); !maps.Equal(got, want) {
		t.Errorf("pods' packets are %v, want %v", got, want)
	}
	text := f.text()
	for _, s := range c.slots {
		if n := strings.Count(text, s.table+" "+s.prefix); n != 1 {
			t.Errorf("%d chains %s*, want 1", n, s.prefix)
		}
	}
}

func TestInstallKeepsBlockedPacketsBlocked(t *testing.T) {
	prepare := func() *fakeTables { f := newFakeTables(); otherRules(f); return f }
	run := func(f *fakeTables) error { return newFakeCapture(t, f, nil, testListen).Install(context.Background()) }
	runWithEveryFault(t, prepare, run, worse, checkInstalled)
}

func TestInstallAddsTheDropFirstAndTheRedirectionLast(t *testing.T) {
	f := newFakeTables()
	var hooks []string
	f.after = func(command string) {
		if hook, ok := strings.CutPrefix(command, "insert "); ok {
			hooks = append(hooks, hook)
		}
	}
	if err := newFakeCapture(t, f, nil, testListen).Install(context.Background()); err != nil {
		t.Fatal(err)
	}
	if want := []string{"FORWARD", "INPUT", "PREROUTING"}; !slices.Equal(hooks, want) {
		t.Errorf("jumps were inserted in the hooks %v, want %v", hooks, want)
	}
}

func TestAnotherConfigurationReplacesTheRulesWithoutAGap(t *testing.T) {
	for _, old := range []string{"169.254.25.79:9999", "169.254.25.80:2579"} {
		t.Run(old, func(t *testing.T) {
			prepare := func() *fakeTables { return installed(t, netip.MustParseAddrPort(old)) }
			run := func(f *fakeTables) error { return newFakeCapture(t, f, nil, testListen).Install(context.Background()) }
			runWithEveryFault(t, prepare, run, worse, checkInstalled)
		})
	}
}

func TestAnotherConfigurationAfterAnInterruptedRepair(t *testing.T) {
	prepare := func() *fakeTables {
		f := installed(t, netip.MustParseAddrPort("169.254.25.79:9999"))
		copyChain("filter", "PODIDENTITY-FWD-A", "PODIDENTITY-FWD-B")(f)
		insert("filter", "FORWARD", 0, jumpTo("PODIDENTITY-FWD-B"))(f)
		copyChain("nat", "PODIDENTITY-NAT-A", "PODIDENTITY-NAT-B")(f)
		insert("nat", "PREROUTING", 0, jumpTo("PODIDENTITY-NAT-B"))(f)
		return f
	}
	run := func(f *fakeTables) error {
		_, err := newFakeCapture(t, f, nil, testListen).Sync(context.Background())
		return err
	}
	runWithEveryFault(t, prepare, run, worse, checkInstalled)
}

func TestSyncRepairsEveryDamageWithoutAGap(t *testing.T) {
	for _, damage := range damages {
		t.Run(damage.name, func(t *testing.T) {
			prepare := func() *fakeTables {
				f := installed(t, testListen)
				for _, change := range damage.changes {
					change(f)
				}
				return f
			}
			run := func(f *fakeTables) error {
				_, err := newFakeCapture(t, f, nil, testListen).Sync(context.Background())
				return err
			}
			runWithEveryFault(t, prepare, run, worse, checkInstalled)
		})
	}
}

func TestSyncReportsWhatItRepairedAndVerifyWhatIsWrong(t *testing.T) {
	for _, damage := range damages {
		if damage.repaired == nil {
			continue
		}
		t.Run(damage.name, func(t *testing.T) {
			f := installed(t, testListen)
			for _, change := range damage.changes {
				change(f)
			}
			c := newFakeCapture(t, f, nil, testListen)
			before := f.text()
			err := c.Verify(context.Background())
			if before != f.text() {
				t.Fatal("Verify changed something")
			}
			if errors.Is(err, ErrDrift) != (len(damage.repaired) > 0) {
				t.Errorf("Verify: %v", err)
			}
			for _, what := range damage.repaired {
				if !strings.Contains(fmt.Sprint(err), what+": ") {
					t.Errorf("Verify does not name %q: %v", what, err)
				}
			}
			repaired, err := c.Sync(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(repaired, damage.repaired) && len(repaired)+len(damage.repaired) > 0 {
				t.Errorf("Sync repaired %q, want %q", repaired, damage.repaired)
			}
		})
	}
}

func TestSyncDeletesConnectionsOnlyIfPodsMayHaveBypassedCapture(t *testing.T) {
	for _, tt := range []struct {
		change change
		want   int
	}{
		{func(*fakeTables) {}, 0},
		{appendRule("filter", "PODIDENTITY-IN-A", acceptAll), 0},
		{flush("nat", "PREROUTING"), 1},
		{flush("filter", "FORWARD"), 1},
	} {
		f := installed(t, testListen)
		tt.change(f)
		c := newFakeCapture(t, f, nil, testListen)
		if _, err := c.Sync(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got := c.flows.(*fakeFlows).uncaptured; got != tt.want {
			t.Errorf("Sync called deleteUncaptured %d times, want %d", got, tt.want)
		}
	}
}

func TestSyncRepairsTheRulesEvenIfTheLinkFails(t *testing.T) {
	f := installed(t, testListen)
	flush("nat", "PREROUTING")(f)
	c := newFakeCapture(t, f, nil, testListen)
	c.link = &fakeLink{err: nodelink.ErrForeign}
	repaired, err := c.Sync(context.Background())
	if !errors.Is(err, nodelink.ErrForeign) || !slices.Equal(repaired, []string{"nat jump"}) {
		t.Errorf("Sync repaired %v, %v", repaired, err)
	}
}

func TestSyncRepairsOtherHooksWhenOneFails(t *testing.T) {
	f := installed(t, testListen)
	flush("filter", "FORWARD")(f)
	flush("nat", "PREROUTING")(f)
	f.op, f.fault = 0, fault{at: 9} // The first command after nine lists: the jump in FORWARD.
	repaired, err := newFakeCapture(t, f, nil, testListen).Sync(context.Background())
	if !errors.Is(err, errInjected) || !slices.Equal(repaired, []string{"nat jump"}) {
		t.Errorf("Sync repaired %v, %v", repaired, err)
	}
}

func TestAForeignChainOfOurNameIsRefusedAndNothingChanged(t *testing.T) {
	for _, chain := range []string{"PODIDENTITY-NAT-A", "PODIDENTITY-NAT-B"} {
		f := newFakeTables()
		otherRules(f)
		f.chains["nat"][chain] = nil
		appendRule("nat", chain, "-d 10.1.1.1/32 -j ACCEPT")(f)
		appendRule("nat", "OUTPUT", "-j "+chain)(f)
		before := f.text()
		c := newFakeCapture(t, f, nil, testListen)
		_, syncErr := c.Sync(context.Background())
		for doing, err := range map[string]error{
			"Install": c.Install(context.Background()), "Sync": syncErr,
			"Verify": c.Verify(context.Background()), "Uninstall": c.Uninstall(context.Background()),
		} {
			if !errors.Is(err, ErrForeignChain) || !strings.Contains(fmt.Sprint(err), "chain "+chain+" of table nat") {
				t.Errorf("%s: %v", doing, err)
			}
		}
		if f.text() != before {
			t.Errorf("something was changed:\n%s\nwas:\n%s", f.text(), before)
		}
	}
}

func TestUninstallRestoresThePreviousRules(t *testing.T) {
	untouched := newFakeTables()
	otherRules(untouched)
	for _, damage := range damages {
		t.Run(damage.name, func(t *testing.T) {
			prepare := func() *fakeTables {
				f := installed(t, testListen)
				for _, change := range damage.changes {
					change(f)
				}
				return f
			}
			run := func(f *fakeTables) error {
				return newFakeCapture(t, f, nil, testListen).Uninstall(context.Background())
			}
			never := func(was, is outcome) bool { return false }
			runWithEveryFault(t, prepare, run, never, func(t *testing.T, f *fakeTables) {
				if strings.Contains(f.text(), "PODIDENTITY") {
					t.Errorf("something of ours is left:\n%s", f.text())
				}
				if damage.name == "nothing" && f.text() != untouched.text() {
					t.Errorf("the node is not as it was:\n%s\nwas:\n%s", f.text(), untouched.text())
				}
			})
		})
	}
}

func TestUninstallRemovesTheDropLast(t *testing.T) {
	f := installed(t, testListen)
	var seen []outcome
	f.after = func(string) { seen = append(seen, f.outcomes()["tcp 80"]) }
	if err := newFakeCapture(t, f, nil, testListen).Uninstall(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got, want := slices.Compact(seen), []outcome{captured, dropped, leaked}; !slices.Equal(got, want) {
		t.Errorf("pods' packets were %v in turn, want %v", got, want)
	}
}

func TestABackendChangeMovesTheRulesWithoutAGap(t *testing.T) {
	old := installed(t, testListen)
	f := newFakeTables()
	otherRules(f)
	for _, side := range []*fakeTables{old, f} {
		side.after = func(command string) {
			// Both back ends see each packet. It is leaked only if neither back end stops it.
			if old.outcomes()["udp 53"] == leaked && f.outcomes()["udp 53"] == leaked {
				t.Errorf("a packet is leaked after %q", command)
			}
		}
	}
	c := newFakeCapture(t, f, old, testListen)
	if err := c.Install(context.Background()); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, f)
	if strings.Contains(old.text(), "PODIDENTITY") {
		t.Errorf("the other back end still has rules of ours:\n%s", old.text())
	}
}

func TestACancelledContextStopsBeforeTheFirstChange(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	f := newFakeTables()
	before := f.text()
	c := newFakeCapture(t, f, nil, testListen)
	_, syncErr := c.Sync(ctx)
	for _, err := range []error{c.Install(ctx), c.EnsureLink(ctx), c.Verify(ctx), syncErr} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
	if f.text() != before {
		t.Error("something was changed")
	}
}
