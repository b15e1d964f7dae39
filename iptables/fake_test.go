package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
)

var (
	testMetadata = netip.MustParseAddrPort("169.254.169.254:80")
	testListen   = netip.MustParseAddrPort("169.254.25.79:2579")
)

// fault says which command fails, and how.
type fault struct {
	at      int  // Counted from 0 over all commands, reads included; -1 for never.
	applied bool // The command has its effect but returns an error, as if the process was killed before the result.
	dead    bool // All later commands fail too: the process has died.
}

var errInjected = errors.New("injected fault")

// fakeTables is a back end in memory. Like the kernel it refuses to drop a chain that is in use or not empty, to jump
// to a chain that does not exist, and to delete a rule that does not exist.
type fakeTables struct {
	chains map[string]map[string][]listed // Table, chain, rules.
	fault  fault
	op     int
	hit    bool
	after  func(command string) // Called after each command that may have had an effect.
}

func newFakeTables() *fakeTables {
	return &fakeTables{fault: fault{at: -1}, chains: map[string]map[string][]listed{
		"filter": {"INPUT": nil, "FORWARD": nil, "OUTPUT": nil},
		"nat":    {"PREROUTING": nil, "INPUT": nil, "OUTPUT": nil, "POSTROUTING": nil},
	}}
}

// do runs one command with the configured fault.
func (f *fakeTables) do(command string, effect func() error) error {
	now := f.op
	f.op++
	if f.fault.at >= 0 && now > f.fault.at && f.fault.dead {
		return errInjected
	}
	if now == f.fault.at {
		f.hit = true
		if !f.fault.applied {
			return errInjected
		}
	}
	err := effect()
	if f.after != nil {
		f.after(command)
	}
	if now == f.fault.at {
		return errInjected
	}
	return err
}

func (f *fakeTables) list(table, chain string) (rules []listed, err error) {
	err = f.do("list "+chain, func() error {
		found, ok := f.chains[table][chain]
		if !ok {
			return errNoChain
		}
		rules = slices.Clone(found)
		return nil
	})
	return rules, err
}

func (f *fakeTables) empty(table, chain string) error {
	return f.do("empty "+chain, func() error { f.chains[table][chain] = nil; return nil })
}

func (f *fakeTables) add(table, chain string, rule []string) error {
	return f.do("add "+chain, func() error { return f.insertAt(table, chain, len(f.chains[table][chain]), rule) })
}

func (f *fakeTables) insertFirst(table, chain string, rule []string) error {
	return f.do("insert "+chain, func() error { return f.insertAt(table, chain, 0, rule) })
}

func (f *fakeTables) insertAt(table, chain string, at int, rule []string) error {
	rules, ok := f.chains[table][chain]
	if !ok {
		return errNoChain
	}
	l := listed{chain: chain, args: rule}
	if _, known := f.chains[table][l.target()]; !known && !slices.Contains([]string{"ACCEPT", "DROP", "RETURN", "DNAT", ""}, l.target()) {
		return fmt.Errorf("no target %s", l.target())
	}
	f.chains[table][chain] = slices.Insert(slices.Clone(rules), at, l)
	return nil
}

func (f *fakeTables) remove(table, chain string, rule []string) error {
	return f.do("remove "+chain, func() error {
		at := slices.IndexFunc(f.chains[table][chain], func(l listed) bool { return l.is(rule) })
		if at < 0 {
			return errors.New("no such rule")
		}
		f.chains[table][chain] = slices.Delete(slices.Clone(f.chains[table][chain]), at, at+1)
		return nil
	})
}

func (f *fakeTables) drop(table, chain string) error {
	return f.do("drop "+chain, func() error {
		rules, ok := f.chains[table][chain]
		if !ok || len(rules) > 0 {
			return errors.New("no such chain, or not empty")
		}
		for _, others := range f.chains[table] {
			if slices.ContainsFunc(others, func(l listed) bool { return l.target() == chain }) {
				return errors.New("chain in use")
			}
		}
		delete(f.chains[table], chain)
		return nil
	})
}

func (f *fakeTables) dump(context.Context) (d dump, err error) {
	err = f.do("dump", func() error {
		d = dump{chains: map[string][]string{}, rules: map[string][]listed{}}
		for table, chains := range f.chains {
			for name, rules := range chains {
				d.chains[table] = append(d.chains[table], name)
				d.rules[table] = append(d.rules[table], rules...)
			}
		}
		return nil
	})
	return d, err
}

// text returns the whole content in a comparable form.
func (f *fakeTables) text() string {
	var lines []string
	for table, chains := range f.chains {
		for name, rules := range chains {
			lines = append(lines, fmt.Sprintf("%s %s %v", table, name, rules))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// foreignText returns what must never change: the foreign chains, without their jumps to our chains.
func (f *fakeTables) foreignText() string {
	others := newFakeTables()
	for table, chains := range f.chains {
		for name, rules := range chains {
			if !isOurName(name) {
				others.chains[table][name] = slices.DeleteFunc(slices.Clone(rules), func(l listed) bool { return isOurName(l.target()) })
			}
		}
	}
	return others.text()
}

// outcome is what happens to a packet of a pod. A higher value is better.
type outcome int

const (
	leaked outcome = iota
	dropped
	captured
)

func (f outcome) String() string { return [...]string{"leaked", "dropped", "captured"}[f] }

type packet struct {
	protocol  string
	port      string
	to        string
	via       string // The interface on which it arrived.
	wasDNATed bool
}

// outcomes evaluates the tables for packets of a pod: TCP to the redirected port, and packets that must never pass.
func (f *fakeTables) outcomes() map[string]outcome {
	metadata := testMetadata.Addr().String()
	all := map[string]packet{
		"tcp 80":  {protocol: "tcp", port: "80", to: metadata, via: "pod0"},
		"tcp 443": {protocol: "tcp", port: "443", to: metadata, via: "pod0"},
		"udp 53":  {protocol: "udp", port: "53", to: metadata, via: "pod0"},
	}
	result := map[string]outcome{}
	for name, p := range all {
		result[name] = f.outcome(p)
	}
	return result
}

func (f *fakeTables) outcome(p packet) outcome {
	if to, ok := strings.CutPrefix(f.walk("nat", "PREROUTING", p), "DNAT "); ok {
		to, _, _ = strings.Cut(to, ":")
		p.to, p.wasDNATed = to, true
		if strings.HasPrefix(to, "169.254.25.") { // Local, like all listen addresses of these tests.
			if f.walk("filter", "INPUT", p) == "DROP" {
				return dropped
			}
			return captured
		}
		// A foreign redirection: the pod reaches neither the metadata service nor our server.
		return dropped
	}
	if f.walk("filter", "FORWARD", p) == "DROP" {
		return dropped
	}
	return leaked
}

// walk returns the verdict of a chain, "" if it has none.
func (f *fakeTables) walk(table, chain string, p packet) string {
	for _, rule := range f.chains[table][chain] {
		if !p.matches(rule) {
			continue
		}
		switch target := rule.target(); target {
		case "ACCEPT", "DROP":
			return target
		case "RETURN":
			return ""
		case "DNAT":
			return "DNAT " + valueOf(rule.args, "--to-destination")
		case "":
		default:
			if verdict := f.walk(table, target, p); verdict != "" {
				return verdict
			}
		}
	}
	return ""
}

func (p packet) matches(rule listed) bool {
	for flag, is := range map[string]string{"-d": p.to, "-p": p.protocol, "--dport": p.port, "-i": p.via, "-s": "10.0.0.5"} {
		if want := strings.TrimSuffix(valueOf(rule.args, flag), "/32"); want != "" && want != is {
			return false
		}
	}
	return valueOf(rule.args, "--ctstate") != "DNAT" || p.wasDNATed
}

// fakeLink is a link in memory.
type fakeLink struct {
	there bool
	err   error
}

func (l *fakeLink) Ensure() (bool, error) {
	if l.err != nil {
		return false, l.err
	}
	changed := !l.there
	l.there = true
	return changed, nil
}

func (l *fakeLink) Differences() ([]string, error) {
	if l.there {
		return nil, nil
	}
	return []string{"there is none"}, nil
}

func (l *fakeLink) Remove() error { l.there = false; return nil }

type fakeFlows struct{ uncaptured, captured int }

func (f *fakeFlows) deleteUncaptured(context.Context) (int, error) { f.uncaptured++; return 0, nil }
func (f *fakeFlows) deleteCaptured(context.Context) (int, error)   { f.captured++; return 0, nil }

// newFakeCapture returns the Capture of a process that has just started, on the given tables.
func newFakeCapture(t *testing.T, nft, legacy tables, listen netip.AddrPort) *Capture {
	t.Helper()
	c := &Capture{
		slots:    slots(testMetadata, listen, 0),
		backend:  BackendNFT,
		backends: backends{BackendNFT: nft},
		link:     &fakeLink{there: true},
		flows:    &fakeFlows{},
		log:      zap.NewNop(),
	}
	if legacy != nil {
		c.backends[BackendLegacy] = legacy
	}
	return c
}
