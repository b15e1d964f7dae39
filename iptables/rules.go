package iptables

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// marker is the beginning of the comment of all our rules and jumps. It distinguishes them from the rules of other
// programs.
const marker = "podidentity: "

const metadataProtocol = "tcp"

// generations are the suffixes of the names of a slot's two chains. One chain is active; a repair builds the other.
var generations = [2]string{"A", "B"}

// slot is a netfilter hook with NMI's two chains for it, the generations. The hook jumps to the active generation. Sync
// returns the names of slots in its result.
type slot struct {
	name   string
	table  string
	hook   string
	prefix string
	why    string
	rules  [][]string
}

func (s slot) chain(generation int) string { return s.prefix + generations[generation] }

func (s slot) jump(generation int) []string {
	return []string{"-m", "comment", "--comment", marker + s.why, "-j", s.chain(generation)}
}

// slots returns the three slots in the order of installation. The drop in FORWARD is first, because it alone already
// protects the metadata service. The redirection is last, after the slot that protects the listen address.
func slots(metadata, listen netip.AddrPort, identifiedPort uint16) []slot {
	metadataNet, listenNet := metadata.Addr().String()+"/32", listen.Addr().String()+"/32"
	metadataPort := strconv.Itoa(int(metadata.Port()))
	rule := func(why, target string, match ...string) []string {
		r := slices.Clone(match)
		r = append(r, "-m", "comment", "--comment", marker+why)
		return append(r, strings.Fields(target)...)
	}
	input := [][]string{
		rule("the node itself may ask", "-j RETURN", "-d", listenNet, "-i", "lo"),
		// The tuple of the connection is matched, not the packet, so that ICMP errors about the connection pass as well.
		rule("captured from a pod", "-j RETURN", "-d", listenNet,
			"-m", "conntrack", "--ctstate", "DNAT", "--ctproto", metadataProtocol,
			"--ctorigdst", metadata.Addr().String(), "--ctorigdstport", metadataPort),
	}
	if identifiedPort != 0 {
		input = append(input, rule("the node server knows who opened it, or closes it", "-j RETURN", "-d", listenNet,
			"-p", metadataProtocol, "-m", metadataProtocol, "--dport", strconv.Itoa(int(identifiedPort))))
	}
	input = append(input, rule("not captured, so not for the node server", "-j DROP", "-d", listenNet))
	return []slot{
		{
			name: "forward", table: "filter", hook: "FORWARD", prefix: "PODIDENTITY-FWD-",
			why: "pods never reach the metadata service itself",
			rules: [][]string{
				rule("no packet of a pod leaves for the metadata service", "-j DROP", "-d", metadataNet),
				// Also drops responses for connections opened before capture, and prevents neighbors from posing as the
				// metadata service.
				rule("no packet from the metadata address reaches a pod", "-j DROP", "-s", metadataNet),
				// If the link is deleted, the listen address is no longer local. A redirected request would then leave the
				// node, and another host could pose as NMI.
				rule("no captured packet leaves the node", "-j DROP", "-d", listenNet),
			},
		},
		{
			name: "input", table: "filter", hook: "INPUT", prefix: "PODIDENTITY-IN-",
			// Connections to identifiedPort also reach it. The text stays, because another text would be drift.
			why:   "only captured connections reach the node server",
			rules: input,
		},
		{
			name: "nat", table: "nat", hook: "PREROUTING", prefix: "PODIDENTITY-NAT-",
			why: "pods' metadata requests are answered on this node",
			rules: [][]string{
				rule("to the node server", "-j DNAT --to-destination "+listen.String(),
					"-d", metadataNet, "-p", metadataProtocol, "-m", metadataProtocol, "--dport", metadataPort),
			},
		},
	}
}

// listed is one rule as iptables lists it: "-A CHAIN ...", split into arguments.
type listed struct {
	chain string
	args  []string
}

// parseListed parses one line of a listing or a dump. ok is false if the line is not a rule.
func parseListed(line string) (listed, bool) {
	words, ok := splitWords(line)
	if !ok || len(words) < 2 || words[0] != "-A" {
		return listed{}, false
	}
	return listed{chain: words[1], args: words[2:]}, true
}

// splitWords splits a line into words and removes the quoting of iptables: double quotes around words that need them,
// with backslashes inside.
func splitWords(line string) ([]string, bool) {
	var words []string
	var word strings.Builder
	var inWord, quoted, escaped bool
	for _, r := range line {
		switch {
		case escaped:
			word.WriteRune(r)
			escaped = false
		case quoted && r == '\\':
			escaped = true
		case r == '"':
			quoted, inWord = !quoted, true
		case !quoted && (r == ' ' || r == '\t'):
			if inWord {
				words = append(words, word.String())
				word.Reset()
			}
			inWord = false
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, !quoted && !escaped
}

// canonical returns a form that is equal for rules with the same meaning, independent of the back end and version that
// listed them. Listings differ in the order of matches, in whether they name the module of a match, in whether a
// protocol is a number, and in whether an address has the mask /32. Arguments that canonical does not know stay in the
// form and make the rule different.
func canonical(args []string) string {
	var parts []string
	for i := 0; i < len(args); {
		var part []string
		if args[i] == "!" {
			part, i = append(part, "!"), i+1
		}
		if i == len(args) {
			return strings.Join(args, "\x00") // Truncated after "!": different from all our rules.
		}
		flag := args[i]
		part, i = append(part, flag), i+1
		for first := true; i < len(args); first = false {
			// The value of --comment may look like a flag; the values of other flags end where the next flag begins.
			isValue := first && flag == "--comment"
			if !isValue && (args[i] == "!" || strings.HasPrefix(args[i], "-")) {
				break
			}
			part, i = append(part, normalValue(flag, args[i])), i+1
			if flag == "--comment" {
				break
			}
		}
		if part[0] == "-m" {
			continue
		}
		parts = append(parts, strings.Join(part, "\x00"))
	}
	slices.Sort(parts)
	return strings.Join(parts, "\x01")
}

func normalValue(flag, value string) string {
	switch flag {
	case "-p", "--ctproto":
		if value == "6" {
			return metadataProtocol
		}
	case "-s", "-d", "--ctorigdst":
		return strings.TrimSuffix(value, "/32")
	}
	return value
}

func valueOf(args []string, flags ...string) string {
	for i := 0; i+1 < len(args); i++ {
		if args[i] == "--comment" {
			if slices.Contains(flags, args[i]) {
				return args[i+1]
			}
			i++ // The text of a comment is not a flag.
			continue
		}
		if slices.Contains(flags, args[i]) {
			return args[i+1]
		}
	}
	return ""
}

func (l listed) ours() bool { return strings.HasPrefix(valueOf(l.args, "--comment"), marker) }

// target returns the target of the rule: a chain or a verdict.
func (l listed) target() string { return valueOf(l.args, "-j", "-g", "--jump", "--goto") }

func (l listed) is(args []string) bool { return canonical(l.args) == canonical(args) }

func (l listed) String() string { return strings.Join(l.args, " ") }
