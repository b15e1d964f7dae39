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
)

// Config says what is captured and where it goes.
type Config struct {
	MetadataIP   netip.Addr     // The address pods ask: 169.254.169.254.
	MetadataPort uint16         // 80.
	Listen       netip.AddrPort // The node server's own address, on the link this package makes.
	Backend      Backend        // Empty means auto.
	Logger       *zap.Logger    // May be nil.
}

func (c Config) check() error {
	listen := c.Listen.Addr()
	switch {
	case !c.MetadataIP.Is4() || c.MetadataIP.IsUnspecified() || c.MetadataIP.IsMulticast() || c.MetadataIP.IsLoopback():
		return fmt.Errorf("metadata address %v: must be a unicast IPv4 address that is not loopback", c.MetadataIP)
	case c.MetadataPort == 0:
		return errors.New("metadata port: must not be 0")
	case listen.Is4() && listen.IsLoopback():
		return fmt.Errorf("listen address %v: loopback would need route_localnet, which opens all of the node's loopback services; use a link-local address such as 169.254.25.79", listen)
	case !listen.Is4() || listen.IsUnspecified() || listen.IsMulticast():
		return fmt.Errorf("listen address %v: must be a unicast IPv4 address, one that no other link has", listen)
	case c.Listen.Port() == 0:
		return errors.New("listen port: must not be 0")
	case listen == c.MetadataIP:
		return fmt.Errorf("listen address %v: must differ from the metadata address", listen)
	}
	return nil
}

// Capture owns our chains and our link on this node. Its methods may be called from any goroutine, and by several
// processes in the same network namespace at once; they take turns.
type Capture struct {
	slots    []slot
	backend  Backend
	backends backends
	link     linker
	flows    flows
	log      *zap.Logger

	// mu is held by the method at work. turn does the same among processes; nil for none.
	mu   sync.Mutex
	lock func(context.Context, *zap.Logger, time.Duration) (done func(), err error)
}

// acquire waits for the turn of the calling method, which calls done when it ends.
func (c *Capture) acquire(ctx context.Context) (done func(), err error) {
	c.mu.Lock()
	if err := ctx.Err(); err != nil {
		c.mu.Unlock()
		return nil, err
	}
	if c.lock == nil {
		return c.mu.Unlock, nil
	}
	release, err := c.lock(ctx, c.log, lockTimeout)
	if err != nil {
		c.mu.Unlock()
		return nil, err
	}
	return func() { release(); c.mu.Unlock() }, nil
}

// linker keeps the link with the listen address. Implemented by ownLink; tests put a fake here.
type linker interface {
	ensure() (changed bool, err error)
	differences() ([]string, error)
	remove() error
}

// flows forgets connections that conntrack remembers. Implemented by conntrack; tests put a fake here.
type flows interface {
	deleteUncaptured(context.Context) (int, error)
	deleteCaptured(context.Context) (int, error)
}

// detectTimeout is far above what a dump takes on a node with tens of thousands of rules.
const detectTimeout = 30 * time.Second

// New checks the configuration, what this process may do and what programs it has, and detects the back end. It changes
// nothing on the node.
func New(cfg Config) (*Capture, error) {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	want, err := ParseBackend(string(cfg.Backend))
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
	found, err := openBackends(want, capabilities)
	if err != nil {
		return nil, err
	}
	chosen, reason := want, "it was configured"
	if want == BackendAuto {
		ctx, cancel := context.WithTimeout(context.Background(), detectTimeout)
		defer cancel()
		if chosen, reason, err = found.detect(ctx, capabilities); err != nil {
			return nil, err
		}
	}
	if chosen != BackendLegacy && requireRaw(capabilities) != nil {
		// We could not read the legacy back end, and have never written there without this capability.
		delete(found, BackendLegacy)
	}
	cfg.Logger.Info("iptables back end chosen", zap.Stringer("backend", chosen), zap.String("reason", reason))

	metadata := netip.AddrPortFrom(cfg.MetadataIP, cfg.MetadataPort)
	return &Capture{
		slots:    slots(metadata, cfg.Listen),
		backend:  chosen,
		backends: found,
		link:     ownLink{address: cfg.Listen.Addr()},
		flows:    conntrack{metadata: metadata, listen: cfg.Listen},
		log:      cfg.Logger,
		lock:     acquireLock,
	}, nil
}

// Backend is the back end in use, never auto.
func (c *Capture) Backend() Backend { return c.backend }

// EnsureLink makes the link with the listen address. Call it before the listener is bound. Idempotent.
func (c *Capture) EnsureLink(ctx context.Context) error {
	done, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer done()
	_, err = c.link.ensure()
	return err
}

// Install puts the rules in place and cuts off connections opened before. Call it once the listener is up: from here on
// pods are sent to it. Idempotent. After an error what is in place stays, and nothing pods could do before is possible
// that was not; call it again.
func (c *Capture) Install(ctx context.Context) error {
	done, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer done()
	if _, err := c.sync(ctx, "capture installed"); err != nil {
		return fmt.Errorf("installing capture of metadata traffic: %w", err)
	}
	c.deleteUncaptured(ctx)
	// A former run may have used the other back end. Its rules go only now that these stand.
	for backend := range c.backends {
		if backend == c.backend {
			continue
		}
		if err := c.purge(ctx, backend, c.uninstallOrder()...); err != nil {
			c.log.Warn("the other iptables back end was not cleaned", zap.Stringer("backend", backend), zap.Error(err))
		}
	}
	return nil
}

// purge removes slots from one back end, in the order given. Idempotent. Foreign chains stay and are reported at the end.
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
			return fmt.Errorf("removing %s of table %s from the %s back end: %w", s.hook, s.table, backend, err)
		}
	}
	return errors.Join(foreign...)
}

// Sync compares everything with how it should be and repairs what differs, without a gap. Each string names one thing
// repaired: "link", or one of forward, input, nat followed by chain, jump or leftover; ten values in all.
func (c *Capture) Sync(ctx context.Context) (repaired []string, err error) {
	done, err := c.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	repaired, err = c.sync(ctx, "capture repaired")
	if slices.ContainsFunc(repaired, allowedBypass) {
		c.deleteUncaptured(ctx)
	}
	return repaired, err
}

// allowedBypass says whether pods may have opened connections past us while the thing was broken.
func allowedBypass(repaired string) bool {
	return strings.HasPrefix(repaired, "forward ") || strings.HasPrefix(repaired, "nat ")
}

// sync does what Sync says; message is what the log calls it.
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
	// Before the first change, so that meeting a foreign chain leaves everything as it was.
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
		// The other slots are still worth repairing if one fails: each is a defence of its own.
		if err := repairSlot(ctx, tables, state); err != nil {
			failed = append(failed, fmt.Errorf("repairing %s of table %s: %w", state.hook, state.table, err))
			continue
		}
		for _, d := range differences {
			c.log.Info(message, zap.String("what", d.what), zap.String("was", d.text))
			repaired = append(repaired, d.what)
		}
	}
	changed, err := c.link.ensure()
	if changed {
		c.log.Info(message, zap.String("what", "link"))
		repaired = append(repaired, "link")
	}
	return repaired, errors.Join(append(failed, err)...)
}

// deleteUncaptured makes clients with a connection from before notice at once. Nothing depends on it: the drop in
// FORWARD holds for those connections too, their clients would only wait for a timeout. So failing is no error.
func (c *Capture) deleteUncaptured(ctx context.Context) {
	n, err := c.flows.deleteUncaptured(ctx)
	if err != nil {
		c.log.Warn("connections opened before capture end by timeout, not at once", zap.Error(err))
	}
	if n > 0 {
		c.log.Info("connections opened before capture cut off", zap.Int("count", n))
	}
}

// Verify changes nothing. nil if everything is as it should be, else an error that is ErrDrift and lists what differs,
// or says why it could not look.
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
	link, err := c.link.differences()
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

// uninstallOrder is that of installation reversed: the drop falls last.
func (c *Capture) uninstallOrder() []slot {
	order := slices.Clone(c.slots)
	slices.Reverse(order)
	return order
}

// Uninstall takes away everything of ours, in both back ends: from here on pods reach the metadata service itself.
// Idempotent. It stops at the first failure, so that the drop stays if the redirection could not be removed. A foreign
// chain or link with one of our names stays, and is reported once all that is ours is gone.
func (c *Capture) Uninstall(ctx context.Context) error {
	done, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer done()
	var foreign []error
	// The one in use goes last: if the other cannot be cleaned, the capture that holds is still whole.
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
	switch err := c.link.remove(); {
	case errors.Is(err, ErrForeignLink):
		foreign = append(foreign, err)
	case err != nil:
		return fmt.Errorf("uninstalling capture of metadata traffic: %w", err)
	}
	// Else connections that were captured would be sent to an address that is gone until conntrack lets go of them.
	if _, err := c.flows.deleteCaptured(ctx); err != nil {
		c.log.Warn("captured connections end by timeout, not at once", zap.Error(err))
	}
	return errors.Join(foreign...)
}
