package iptables

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Operators see the text of our rules and write their own rules around them, so a change of the text affects operators.
func TestTheRulesHaveThisText(t *testing.T) {
	want := map[string]string{
		"filter FORWARD PODIDENTITY-FWD-": `jump: -m comment --comment 'podidentity: pods never reach the metadata service itself' -j PODIDENTITY-FWD-A
-d 169.254.169.254/32 -m comment --comment 'podidentity: no packet of a pod leaves for the metadata service' -j DROP
-s 169.254.169.254/32 -m comment --comment 'podidentity: no packet from the metadata address reaches a pod' -j DROP
-d 169.254.25.79/32 -m comment --comment 'podidentity: no captured packet leaves the node' -j DROP
`,
		"filter INPUT PODIDENTITY-IN-": `jump: -m comment --comment 'podidentity: only captured connections reach the node server' -j PODIDENTITY-IN-A
-d 169.254.25.79/32 -i lo -m comment --comment 'podidentity: the node itself may ask' -j RETURN
-d 169.254.25.79/32 -m conntrack --ctstate DNAT --ctproto tcp --ctorigdst 169.254.169.254 --ctorigdstport 80 -m comment --comment 'podidentity: captured from a pod' -j RETURN
-d 169.254.25.79/32 -m comment --comment 'podidentity: not captured, so not for the node server' -j DROP
`,
		"nat PREROUTING PODIDENTITY-NAT-": `jump: -m comment --comment 'podidentity: pods'' metadata requests are answered on this node' -j PODIDENTITY-NAT-A
-d 169.254.169.254/32 -p tcp -m tcp --dport 80 -m comment --comment 'podidentity: to the node server' -j DNAT --to-destination 169.254.25.79:2579
`,
	}
	quote := func(rule []string) string {
		rule = slices.Clone(rule)
		for i, word := range rule {
			if strings.Contains(word, " ") {
				rule[i] = "'" + strings.ReplaceAll(word, "'", "''") + "'"
			}
		}
		return strings.Join(rule, " ") + "\n"
	}
	got := map[string]string{}
	for _, s := range slots(testMetadata, testListen, 0) {
		text := "jump: " + quote(s.jump(0))
		for _, rule := range s.rules {
			text += quote(rule)
		}
		got[strings.Join([]string{s.table, s.hook, s.prefix}, " ")] = text
		if n := len(s.chain(1)); n > 28 {
			t.Errorf("%s has %d characters, netfilter takes 28", s.chain(1), n)
		}
		if !isOurName(s.chain(0)) || !isOurName(s.chain(1)) || isOurName(s.prefix) {
			t.Errorf("%s is not recognized as ours", s.prefix)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestEveryRuleAndJumpCarriesTheMarker(t *testing.T) {
	for _, s := range slots(testMetadata, testListen, 0) {
		for _, rule := range append(slices.Clone(s.rules), s.jump(0), s.jump(1)) {
			if l := (listed{args: rule}); !l.ours() {
				t.Errorf("no marker: %v", l)
			}
		}
	}
}

func TestRulesAreRecognizedInTheOutputOfBothBackends(t *testing.T) {
	all := slots(testMetadata, testListen, 0)
	for line, want := range map[string][]string{
		// As nft lists them.
		`-A X -d 169.254.25.79/32 -m conntrack --ctstate DNAT --ctproto 6 --ctorigdst 169.254.169.254 --ctorigdstport 80 -m comment --comment "podidentity: captured from a pod" -j RETURN`: all[1].rules[1],
		`-A X -d 169.254.25.79/32 -i lo -m comment --comment "podidentity: the node itself may ask" -j RETURN`:                                                                              all[1].rules[0],
		// In another order, without the module of the protocol, without the mask.
		`-A X -p tcp -d 169.254.169.254 --dport 80 -m comment --comment "podidentity: to the node server" -j DNAT --to-destination 169.254.25.79:2579`:         all[2].rules[0],
		`-A X -d 169.254.169.254/32 -p 6 -m tcp --dport 80 -m comment --comment "podidentity: to the node server" -j DNAT --to-destination 169.254.25.79:2579`: all[2].rules[0],
		// With quotes inside.
		`-A X -m comment --comment "podidentity: pods\' metadata requests are answered on this node" -j PODIDENTITY-NAT-B`: all[2].jump(1),
	} {
		if rule, ok := parseListed(line); !ok || !rule.is(want) {
			t.Errorf("not recognized: %s", line)
		}
	}
}

func TestDifferentRulesAreDistinguished(t *testing.T) {
	nat := slots(testMetadata, testListen, 0)[2]
	whole := `-A X -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -m comment --comment "podidentity: to the node server" -j DNAT --to-destination 169.254.25.79:2579`
	if rule, ok := parseListed(whole); !ok || !rule.is(nat.rules[0]) {
		t.Fatal("the rule itself is not recognized")
	}
	for _, change := range [][2]string{
		{"-d 169.254.169.254/32", "! -d 169.254.169.254/32"},
		{"-d 169.254.169.254/32", "-d 169.254.169.0/24"},
		{"-d 169.254.169.254/32", "-d 169.254.169.254/32 -s 10.0.0.0/8"},
		{"--dport 80", "--dport 81"},
		{"--dport 80", "! --dport 80"},
		{"-p tcp -m tcp --dport 80", ""},
		{"-m tcp", "-m tcp -m statistic --mode random --probability 0.5"},
		{":2579", ":2580"},
		{":2579", ":2579 --random"},
		{"-j DNAT", "-g DNAT"},
		{"to the node server", "to another"},
		{`-m comment --comment "podidentity: to the node server"`, ""},
		{"-j DNAT --to-destination 169.254.25.79:2579", ""},
		{"-j DNAT --to-destination 169.254.25.79:2579", "!"},
	} {
		if rule, _ := parseListed(strings.Replace(whole, change[0], change[1], 1)); rule.is(nat.rules[0]) {
			t.Errorf("%q instead of %q is not noticed", change[1], change[0])
		}
	}
}

func TestTheTextOfACommentIsNotParsedAsAFlag(t *testing.T) {
	rule, ok := parseListed(`-A X -m comment --comment "-j DROP" -j ACCEPT`)
	if !ok || rule.target() != "ACCEPT" || valueOf(rule.args, "--comment") != "-j DROP" {
		t.Errorf("got %q", rule.args)
	}
	rule, ok = parseListed(`-A X -m comment --comment -j -g CHAIN`)
	if !ok || rule.target() != "CHAIN" {
		t.Errorf("got %q", rule.args)
	}
	if a, b := canonical([]string{"--comment", "!", "-j", "A"}), canonical([]string{"!", "--comment", "-j", "A"}); a == b {
		t.Error("canonical does not distinguish the comment \"!\" from a negation")
	}
}

// The kernel prints the listings, but a comment in a rule can contain any text that a program with the right to write
// rules chose.
func FuzzSplitWords(f *testing.F) {
	for _, seed := range []string{`-A X -j Y`, `-A X -m comment --comment "a \"b\" \\ \'c\'" -j Y`, `"`, `\`, `! ! -A`, ``} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		words, ok := splitWords(line)
		if !ok {
			return
		}
		canonical(words)
		rule, _ := parseListed(line)
		_ = rule.ours() || rule.target() == ""
		if strings.ContainsAny(line, `"\`) {
			return
		}
		if again, _ := splitWords(strings.Join(words, " ")); !slices.Equal(words, again) {
			t.Errorf("%q: %q, then %q", line, words, again)
		}
	})
}
