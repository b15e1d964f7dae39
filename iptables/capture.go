package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/podidentity/podidentity/internal/nodelink"
)

// Config says which traffic is captured and where it is redirected.
type Config struct {
	MetadataIP   netip.Addr     // The address that pods send requests to: 169.254.169.254.
	MetadataPort uint16         // The port that pods send requests to: 80.
	Listen       netip.AddrPort // The address and port of NMI, on the link that this package creates.
	Backend      Backend        // Empty means auto.
	// IdentifiedPort is a further port of the listen address, to which pods connect directly: package bpf redirects them
	// there, and the node server knows their owner. 0 means none.
	IdentifiedPort uint16
	Logger         *zap.Logger // May be nil.
}

func (c Config) check() error {
	listen := c.Listen.Addr()
	switch {
	case !c.MetadataIP.Is4() || c.MetadataIP.IsUnspecified() || c.MetadataIP.IsMulticast() || c.MetadataIP.IsLoopback():
		return fmt.Errorf("metadata address %v: must be a unicast IPv4 address that is not loopback", c.MetadataIP)
	case c.MetadataPort == 0:
		return errors.New("metadata port: must not be 0")
	case listen.Is4() && listen.IsLoopback():
		return fmt.Errorf("listen address %v: loopback would require route_localnet, which exposes all loopback services of the node; use a link-local address such as 169.254.25.79", listen)
	case !listen.Is4() || listen.IsUnspecified() || listen.IsMulticast():
		return fmt.Errorf("listen address %v: must be a unicast IPv4 address; choose one that no other link of the node has", listen)
	case c.Listen.Port() == 0:
		return errors.New("listen port: must not be 0")
	case c.IdentifiedPort == c.Listen.Port():
		return fmt.Errorf("port for identified connections: must differ from the listen port %d", c.Listen.Port())
	case listen == c.MetadataIP:
		return fmt.Errorf("listen address %v: must differ from the metadata address", listen)
	}
	return nil
}

// Capture owns our chains and our link on this node. Its methods may be called from any goroutine, and by several
// processes in the same network namespace at once. Locks serialize the calls; acquireLock says when a process continues
// without the lock.
type Capture struct {
	slots    []slot
	backend  Backend
	backends backends
	link     linker
	flows    flows
	log      *zap.Logger

	// mu is held by the running method. lock acquires the lock between processes; tests may leave it nil.
	mu   sync.Mutex
	lock func(context.Context, *zap.Logger, time.Duration) (done func(), err error)
}

// acquire acquires c.mu and c.lock for the calling method, which calls release when it ends.
func (c *Capture) acquire(ctx context.Context) (release func(), err error) {
	c.mu.Lock()
	if err := ctx.Err(); err != nil {
		c.mu.Unlock()
		return nil, err
	}
	if c.lock == nil {
		return c.mu.Unlock, nil
	}
	unlock, err := c.lock(ctx, c.log, lockTimeout)
	if err != nil {
		c.mu.Unlock()
		return nil, err
	}
	return func() { unlock(); c.mu.Unlock() }, nil
}

// linker manages the link with the listen address. nodelink.Link implements it; tests use a fake.
type linker interface {
	Ensure() (changed bool, err error)
	Differences() ([]string, error)
	Remove() error
}

// flows deletes connections from conntrack's table. conntrack implements it; tests use a fake.
type flows interface {
	deleteUncaptured(context.Context) (int, error)
	deleteCaptured(context.Context) (int, error)
}

// detectTimeout bounds the detection of the back end. It is far above the time of a dump on a node with tens of
// thousands of rules.
const detectTimeout = 30 * time.Second

// New checks the configuration, the capabilities of the process and the installed programs, and detects the back end.
// It changes nothing on the node.
func New(cfg Config) (*Capture, error) {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	configured, err := ParseBackend(string(cfg.Backend))
	if err != nil {
		return nil, err
	}
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("capture of metadata traffic: %w", err)
	}
	capabilities, err := effectiveCapabilities()
	if err != nil {
		return nil, err
	}
	if err := requireAdmin(capabilities); err != nil {
		return nil, err
	}
	found, err := openBackends(configured, capabilities)
	if err != nil {
		return nil, err
	}
	chosen, reason := configured, "it is configured"
	if configured == BackendAuto {
		ctx, cancel := context.WithTimeout(context.Background(), detectTimeout)
		defer cancel()
		if chosen, reason, err = found.detect(ctx, capabilities); err != nil {
			return nil, err
		}
	}
	if chosen != BackendLegacy && requireRaw(capabilities) != nil {
		// Without CAP_NET_RAW the legacy back end can be neither read nor changed. If an earlier process had the
		// capability and wrote rules there, those rules stay.
		delete(found, BackendLegacy)
	}
	cfg.Logger.Info("chose the iptables back end", zap.Stringer("backend", chosen), zap.String("reason", reason))

	metadata := netip.AddrPortFrom(cfg.MetadataIP, cfg.MetadataPort)
	return &Capture{
		slots:    slots(metadata, cfg.Listen, cfg.IdentifiedPort),
		backend:  chosen,
		backends: found,
		link:     nodelink.Link{Address: cfg.Listen.Addr()},
		flows:    conntrack{metadata: metadata, listen: cfg.Listen},
		log:      cfg.Logger,
		lock:     acquireLock,
	}, nil
}

// Backend returns the back end in use, never auto.
func (c *Capture) Backend() Backend { return c.backend }

// EnsureLink creates the link with the listen address, so that NMI can listen there before Install redirects requests
// to the address. Idempotent.
func (c *Capture) EnsureLink(ctx context.Context) error {
	done, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer done()
	_, err = c.link.Ensure()
	return err
}

// Install installs the rules, ends the connections of pods to the metadata service that bypass this NMI, and removes
// NMI's rules from the back end that is not in use. Call it when the listener is up: Install redirects traffic of pods
// to the listener. Idempotent. After an error the rules installed so far stay, and pods cannot reach more than before;
// call Install again.
func (c *Capture) Install(ctx context.Context) error {
	done, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer done()
	if _, err := c.sync(ctx, "installed a part of the capture"); err != nil {
		return fmt.Errorf("installing capture of metadata traffic: %w", err)
	}
	c.deleteUncaptured(ctx)
	// An earlier run may have used the other back end. Remove the rules there only after the rules of this run are in
	// place.
	for backend := range c.backends {
		if backend == c.backend {
			continue
		}
		if err := c.purge(ctx, backend, c.uninstallOrder()...); err != nil {
			c.log.Warn("cannot remove all rules of NMI from the iptables back end that is not in use; rules that remain there stay in force, and NMI tries again when it starts", zap.Stringer("backend", backend), zap.Error(err))
		}
	}
	return nil
}

// purge removes slots from one back end, in the given order. Idempotent. Foreign chains stay; purge returns the errors
// about them only after it has processed all slots.
func (c *Capture) purge(ctx context.Context, backend Backend, order ...slot) error {
	tables := c.backends[backend]
	d, err := tables.dump(ctx)
	if err != nil {
		return err
	}
	var foreign []error
	for _, s := range order {
		switch err := purge(ctx, tables, d, s); {
		case errors.Is(err, ErrForeignChain):
			foreign = append(foreign, err)
		case err != nil:
			return fmt.Errorf("removing NMI's rules for %s of table %s from the %s back end: %w", s.hook, s.table, backend, err)
		}
	}
	return errors.Join(foreign...)
}

// Sync compares the rules and the link with the expected state and repairs the differences. A repair opens no gap:
// between any two commands the rules block at least as much as before, with the exception that generationToBuild
// describes. Each string of repaired names one repaired part: "link", or the name of a slot and the kind of the part,
// such as "nat jump". The slots are forward, input and nat. The kinds are chain, jump and leftover. There are ten
// possible values.
func (c *Capture) Sync(ctx context.Context) (repaired []string, err error) {
	done, err := c.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	repaired, err = c.sync(ctx, "repaired a part of the capture")
	if slices.ContainsFunc(repaired, allowedBypass) {
		c.deleteUncaptured(ctx)
	}
	return repaired, err
}

// allowedBypass reports whether pods may have opened connections that bypass the capture before Sync repaired the part.
// It also returns true for parts whose damage cannot have had that effect, such as "nat leftover".
func allowedBypass(repaired string) bool {
	return strings.HasPrefix(repaired, "forward ") || strings.HasPrefix(repaired, "nat ")
}

// sync repairs the rules and the link for Install and Sync. message is the log message of a repair.
func (c *Capture) sync(ctx context.Context, message string) (repaired []string, err error) {
	tables := c.backends[c.backend]
	var states []slotState
	for _, s := range c.slots {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		state, err := readSlot(tables, s)
		if err != nil {
			return nil, err
		}
		states = append(states, state)
	}
	// Look for foreign chains in all slots before the first change: if there is one, sync changes nothing.
	for _, state := range states {
		if err := state.foreign(); err != nil {
			return nil, err
		}
	}
	var failed []error
	for _, state := range states {
		differences := state.differences()
		if len(differences) == 0 {
			continue
		}
		// If one slot fails, the others are still repaired: each of them protects against some traffic by itself.
		if err := repairSlot(ctx, tables, state); err != nil {
			failed = append(failed, fmt.Errorf("repairing NMI's rules for %s of table %s: %w", state.hook, state.table, err))
			continue
		}
		for _, d := range differences {
			c.log.Info(message, zap.String("what", d.what), zap.String("was", d.text))
			repaired = append(repaired, d.what)
		}
	}
	changed, err := c.link.Ensure()
	if changed {
		c.log.Info(message, zap.String("what", "link"))
		repaired = append(repaired, "link")
	}
	return repaired, errors.Join(append(failed, err)...)
}

// deleteUncaptured ends connections of pods to the metadata address that are not redirected to the listen address, for
// example because they were opened before the rules were there. It deletes their conntrack entries. The next packet of
// such a connection is then redirected to the listener, and the kernel resets the connection, so the client need not
// wait for a timeout. A failure is only logged, because security does not depend on the deletion: the rules alone keep
// the packets of pods from the metadata service itself.
func (c *Capture) deleteUncaptured(ctx context.Context) {
	n, err := c.flows.deleteUncaptured(ctx)
	if err != nil {
		c.log.Warn("NMI could not end all connections of pods to the metadata service that bypass this NMI; the rules drop packets to the metadata service itself, so connections to it end by timeout; connections that other rules redirected, such as those of an earlier NMI, can continue until their clients close them", zap.Error(err))
	}
	if n > 0 {
		c.log.Info("ended connections of pods to the metadata service that bypassed this NMI", zap.Int("count", n))
	}
}

// Verify compares rules and link with the expected state and changes nothing. It returns nil if there is no difference,
// an error that wraps ErrDrift and lists the differences, or the error that prevented the comparison.
func (c *Capture) Verify(ctx context.Context) error {
	done, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer done()
	var differ []string
	for _, s := range c.slots {
		if err := ctx.Err(); err != nil {
			return err
		}
		state, err := readSlot(c.backends[c.backend], s)
		if err != nil {
			return err
		}
		if err := state.foreign(); err != nil {
			return err
		}
		for _, d := range state.differences() {
			differ = append(differ, fmt.Sprintf("%s: %s", d.what, d.text))
		}
	}
	link, err := c.link.Differences()
	if err != nil {
		return err
	}
	for _, text := range link {
		differ = append(differ, "link: "+text)
	}
	if len(differ) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrDrift, strings.Join(differ, "; "))
}

// uninstallOrder returns the slots in reverse order of installation: the drop is removed last.
func (c *Capture) uninstallOrder() []slot {
	order := slices.Clone(c.slots)
	slices.Reverse(order)
	return order
}

// RemoveRules removes our rules from each back end that this process can change, and keeps our link. Packets of pods then
// reach the metadata service, unless rules of NMI stay in a back end that this process cannot change, or something else
// captures them. Idempotent. It stops at the first failure, so that the drop stays if the redirection could not be removed.
// A foreign chain with one of our names stays, and is reported after everything of ours has been removed.
func (c *Capture) RemoveRules(ctx context.Context) error {
	done, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer done()
	return c.removeRules(ctx)
}

func (c *Capture) removeRules(ctx context.Context) error {
	var foreign []error
	// The back end in use is last: if cleaning the other one fails, capture is still complete.
	order := []Backend{BackendNFT, BackendLegacy}
	if c.backend == BackendNFT {
		slices.Reverse(order)
	}
	for _, backend := range order {
		if c.backends[backend] == nil {
			continue
		}
		switch err := c.purge(ctx, backend, c.uninstallOrder()...); {
		case errors.Is(err, ErrForeignChain):
			foreign = append(foreign, err)
		case err != nil:
			return fmt.Errorf("uninstalling capture of metadata traffic: %w", err)
		}
	}
	// The conntrack entries of captured connections are deleted too: with them the kernel would continue to redirect
	// these connections to our address, until the entries expire.
	if _, err := c.flows.deleteCaptured(ctx); err != nil {
		c.log.Warn("NMI removed its rules, but could not end all connections of pods that these rules had redirected to NMI; such connections end by timeout", zap.Error(err))
	}
	return errors.Join(foreign...)
}

// Uninstall removes our rules as RemoveRules does, and then our link. A foreign link with our name stays, and is reported.
func (c *Capture) Uninstall(ctx context.Context) error {
	done, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer done()
	err = c.removeRules(ctx)
	if err != nil && !errors.Is(err, ErrForeignChain) {
		return err
	}
	if linkErr := c.link.Remove(); linkErr != nil {
		return errors.Join(err, fmt.Errorf("uninstalling capture of metadata traffic: %w", linkErr))
	}
	return err
}
