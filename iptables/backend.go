package iptables

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Backend is one of the two iptables back ends of the kernel, or BackendAuto. The kernel evaluates the rules of both,
// so capture works in either. BackendAuto selects one by the content of both, see choose. The back end with the rules
// of other programs is preferable: operators look for rules there, and only there NMI can place its rules before those
// of the other programs.
type Backend string

const (
	BackendAuto   Backend = "auto"
	BackendNFT    Backend = "nft"
	BackendLegacy Backend = "legacy"
)

func (b Backend) String() string { return string(b) }

// ParseBackend parses the value of a flag. Case is ignored, and "" means auto.
func ParseBackend(name string) (Backend, error) {
	switch b := Backend(strings.ToLower(name)); b {
	case "":
		return BackendAuto, nil
	case BackendAuto, BackendNFT, BackendLegacy:
		return b, nil
	}
	return "", fmt.Errorf("unknown iptables back end %q: use auto, nft or legacy", name)
}

// kubeHints are chains that the kubelet or kube-proxy creates in the back end that it uses.
var kubeHints = []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", "KUBE-PROXY-CANARY", "KUBE-SERVICES", "KUBE-FORWARD", "KUBE-FIREWALL"}

// choose returns the back end to use, by the content of both, and the reason. It is pure.
func choose(nft, legacy dump) (Backend, string) {
	both := [2]Backend{BackendNFT, BackendLegacy}
	pick := func(inNFT, inLegacy bool) (Backend, bool) {
		switch {
		case inNFT && !inLegacy:
			return both[0], true
		case inLegacy && !inNFT:
			return both[1], true
		}
		return "", false
	}
	if b, ok := pick(nft.hasChain(isOurName), legacy.hasChain(isOurName)); ok {
		return b, "it already has chains of NMI"
	}
	isHint := func(chain string) bool { return slices.Contains(kubeHints, chain) }
	if b, ok := pick(nft.hasChain(isHint), legacy.hasChain(isHint)); ok {
		return b, "it has the chains of Kubernetes"
	}
	n, l := nft.ruleCount(), legacy.ruleCount()
	if b, ok := pick(n > l, l > n); ok {
		return b, fmt.Sprintf("it has more rules (nft %d, legacy %d)", n, l)
	}
	return BackendNFT, "both have equally many rules, and nft is the default"
}

func (d dump) hasChain(match func(string) bool) bool {
	for _, chains := range d.chains {
		if slices.ContainsFunc(chains, match) {
			return true
		}
	}
	return false
}

func isOurName(chain string) bool {
	for _, prefix := range []string{"PODIDENTITY-FWD-", "PODIDENTITY-IN-", "PODIDENTITY-NAT-"} {
		if rest, ok := strings.CutPrefix(chain, prefix); ok && slices.Contains(generations[:], rest) {
			return true
		}
	}
	return false
}

// backends are the back ends whose programs are installed. New removes legacy if the process cannot change it.
type backends map[Backend]tables

// openBackends finds the programs of both back ends. A missing back end is an error only if it is configured, or if
// both are missing. If legacy is configured, a missing CAP_NET_RAW is an error too.
func openBackends(configured Backend, capabilities uint64) (backends, error) {
	found := backends{}
	for _, b := range [...]Backend{BackendNFT, BackendLegacy} {
		p, err := findProgram(b)
		if err != nil {
			if configured == b {
				return nil, err
			}
			continue
		}
		found[b] = p
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%w: found neither iptables-nft nor iptables-legacy with its -save program in PATH, /usr/sbin or /sbin; install the iptables package in the image", ErrMissingBinary)
	}
	if configured == BackendLegacy {
		if err := requireRaw(capabilities); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// detect reads both back ends and chooses one. It changes nothing, and creates no table.
func (bs backends) detect(ctx context.Context, capabilities uint64) (Backend, string, error) {
	dumps := map[Backend]dump{}
	for b, t := range bs {
		if b == BackendLegacy {
			used, err := legacyInUse()
			if err != nil {
				return "", "", err
			}
			if !used {
				continue
			}
			if err := requireRaw(capabilities); err != nil {
				return "", "", fmt.Errorf("choosing the iptables back end: legacy tables exist: %w", err)
			}
		}
		d, err := t.dump(ctx)
		if err != nil {
			return "", "", fmt.Errorf("choosing the iptables back end: %w", err)
		}
		dumps[b] = d
	}
	b, reason := choose(dumps[BackendNFT], dumps[BackendLegacy])
	if bs[b] == nil {
		for only := range bs {
			return only, "the programs of the other back end are missing", nil
		}
	}
	return b, reason, nil
}
