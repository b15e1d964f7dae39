package iptables

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Backend is one of the two sets of tables the kernel has for iptables. Both are always in effect, so capture would work
// in either; it goes where the rest of the node's rules are, because that is where an operator looks, and because an
// order among rules can only be kept within one.
type Backend string

const (
	BackendAuto   Backend = "auto"
	BackendNFT    Backend = "nft"
	BackendLegacy Backend = "legacy"
)

func (b Backend) String() string { return string(b) }

// ParseBackend reads the name of a back end, as a flag gives it. Case does not matter, and empty means auto.
func ParseBackend(name string) (Backend, error) {
	switch b := Backend(strings.ToLower(name)); b {
	case "":
		return BackendAuto, nil
	case BackendAuto, BackendNFT, BackendLegacy:
		return b, nil
	}
	return "", fmt.Errorf("unknown iptables back end %q: use auto, nft or legacy", name)
}

// kubeHints are chains that kubelet and kube-proxy leave in the back end they use, for others to find.
var kubeHints = []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", "KUBE-PROXY-CANARY", "KUBE-SERVICES", "KUBE-FORWARD", "KUBE-FIREWALL"}

// choose picks the back end from what is in them, and says why. It is pure.
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
		return b, "our chains are there already"
	}
	isHint := func(chain string) bool { return slices.Contains(kubeHints, chain) }
	if b, ok := pick(nft.hasChain(isHint), legacy.hasChain(isHint)); ok {
		return b, "the chains of Kubernetes are there"
	}
	n, l := nft.ruleCount(), legacy.ruleCount()
	if b, ok := pick(n > l, l > n); ok {
		return b, fmt.Sprintf("it has more rules (nft %d, legacy %d)", n, l)
	}
	return BackendNFT, "nothing speaks for either"
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

// backends are the back ends whose programs this machine has.
type backends map[Backend]tables

// openBackends finds the programs of both back ends. That one is missing is an error only when it was asked for, or when
// both are.
func openBackends(want Backend, capabilities uint64) (backends, error) {
	found := backends{}
	for _, b := range [...]Backend{BackendNFT, BackendLegacy} {
		p, err := findProgram(b)
		if err != nil {
			if want == b {
				return nil, err
			}
			continue
		}
		found[b] = p
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%w: there is neither iptables-nft nor iptables-legacy, with its -save program, that runs from PATH, /usr/sbin or /sbin; install the iptables package in the image", ErrMissingBinary)
	}
	if want == BackendLegacy {
		if err := requireRaw(capabilities); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// detect reads both back ends and chooses. It changes nothing, and brings no table into being.
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
			return only, "the programs of the other are missing", nil
		}
	}
	return b, reason, nil
}
