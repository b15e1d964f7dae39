package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	coreos "github.com/coreos/go-iptables/iptables"
)

// lockSeconds bounds how long one command waits for the lock of legacy iptables on the node, /run/xtables.lock.
const lockSeconds = 5

// errNoChain is what tables.list returns for a chain that does not exist.
var errNoChain = errors.New("no such chain")

// tables are the operations of capture on one back end. Each method makes at most one change, which is atomic in the
// kernel. Each command (empty runs up to two) waits at most lockSeconds for the lock of legacy iptables, so it suffices
// that callers check their context between the methods. The process may end between two changes, so callers must order
// the changes such that none of them opens a gap.
type tables interface {
	// list returns the rules of a chain in order, or errNoChain if the chain does not exist.
	list(table, chain string) ([]listed, error)
	// empty removes the rules of a chain, and creates the chain if it does not exist. Idempotent.
	empty(table, chain string) error
	// add appends a rule. Not idempotent.
	add(table, chain string, rule []string) error
	// insertFirst inserts a rule at position 1. Not idempotent.
	insertFirst(table, chain string, rule []string) error
	// remove deletes the first rule that equals rule. It returns an error if there is no such rule.
	remove(table, chain string, rule []string) error
	// drop deletes a chain. It returns an error if the chain does not exist, has rules, or is the target of a rule.
	drop(table, chain string) error
	// dump returns all tables, without creating any.
	dump(ctx context.Context) (dump, error)
}

// dump is the content of one back end: chains and rules by table.
type dump struct {
	chains map[string][]string
	rules  map[string][]listed
}

func (d dump) ruleCount() (n int) {
	for _, rules := range d.rules {
		n += len(rules)
	}
	return n
}

func parseDump(text string) dump {
	d := dump{chains: map[string][]string{}, rules: map[string][]listed{}}
	table := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
			d.chains[table] = nil
		case strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			d.chains[table] = append(d.chains[table], name)
		default:
			if rule, ok := parseListed(line); ok {
				d.rules[table] = append(d.rules[table], rule)
			}
		}
	}
	return d
}

// program runs the iptables commands of one back end. It implements tables.
type program struct {
	backend Backend
	path    string
	save    string
	ipt     *coreos.IPTables
}

// findProgram finds the commands of one back end, unambiguous names first. "iptables" alone is either back end,
// depending on the image; the output of --version says which.
func findProgram(backend Backend) (*program, error) {
	mode := map[Backend]string{BackendNFT: "(nf_tables)", BackendLegacy: "(legacy)"}[backend]
	for _, name := range []string{"iptables-" + string(backend), "iptables"} {
		path, save := findCommand(name), findCommand(name+"-save")
		if path == "" || save == "" {
			continue
		}
		if version, err := exec.Command(path, "--version").Output(); err != nil || !bytes.Contains(version, []byte(mode)) { //nolint:noctx // it ends at once
			continue
		}
		ipt, err := coreos.New(coreos.Path(path), coreos.Timeout(lockSeconds))
		if err != nil {
			return nil, fmt.Errorf("starting %s: %w", path, err)
		}
		return &program{backend: backend, path: path, save: save, ipt: ipt}, nil
	}
	return nil, fmt.Errorf("%w: found no iptables-%s with its -save program in PATH, /usr/sbin or /sbin; install the iptables package in the image",
		ErrMissingBinary, backend)
}

func findCommand(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

func (p *program) list(table, chain string) ([]listed, error) {
	lines, err := p.ipt.List(table, chain)
	if err != nil {
		// Both back ends report a missing chain with exit status 1 and different texts, so only the status is compared.
		var exit *coreos.Error
		if errors.As(err, &exit) && exit.ExitStatus() == 1 {
			return nil, errNoChain
		}
		return nil, fmt.Errorf("listing chain %s of table %s: %w", chain, table, err)
	}
	var rules []listed
	for _, line := range lines {
		if rule, ok := parseListed(line); ok {
			rules = append(rules, rule)
		}
	}
	return rules, nil
}

func (p *program) empty(table, chain string) error {
	return wrap(p.ipt.ClearChain(table, chain), "emptying chain", table, chain)
}

func (p *program) add(table, chain string, rule []string) error {
	return wrap(p.ipt.Append(table, chain, rule...), "adding a rule to chain", table, chain)
}

func (p *program) insertFirst(table, chain string, rule []string) error {
	return wrap(p.ipt.Insert(table, chain, 1, rule...), "inserting a jump at position 1 of chain", table, chain)
}

func (p *program) remove(table, chain string, rule []string) error {
	return wrap(p.ipt.Delete(table, chain, rule...), "removing a rule from chain", table, chain)
}

func (p *program) drop(table, chain string) error {
	return wrap(p.ipt.DeleteChain(table, chain), "deleting chain", table, chain)
}

func wrap(err error, doing, table, chain string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s of table %s: %w", doing, chain, table, err)
}

// legacyTables is the file that lists the legacy tables of this network namespace. It does not exist if the kernel has
// not loaded the legacy back end.
const legacyTables = "/proc/thread-self/net/ip_tables_names"

// legacyInUse reports whether the legacy back end has tables. It does not run the legacy programs, which would create
// them.
func legacyInUse() (bool, error) {
	names, err := os.ReadFile(legacyTables)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading which legacy iptables tables exist: %w", err)
	}
	return len(bytes.TrimSpace(names)) > 0, nil
}

func (p *program) dump(ctx context.Context) (dump, error) {
	if p.backend == BackendLegacy {
		if used, err := legacyInUse(); err != nil || !used {
			return dump{}, err
		}
	}
	out, err := exec.CommandContext(ctx, p.save).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return dump{}, fmt.Errorf("running %s: %w: %s", p.save, err, bytes.TrimSpace(exit.Stderr))
		}
		return dump{}, fmt.Errorf("running %s: %w", p.save, err)
	}
	return parseDump(string(out)), nil
}
