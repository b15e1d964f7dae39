package bpf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Config says what is captured, and where.
type Config struct {
	PodsCgroup         string         // Path of the cgroup of all pods of the node. See FindPodsCgroup.
	PinDir             string         // The folder in bpffs with the eBPF links and maps. The folder above it must exist.
	Metadata           netip.AddrPort // The address that pods send requests to: 169.254.169.254:80.
	Listen             netip.AddrPort // The address of NMI for redirected connections.
	CaptureHostNetwork bool           // Also capture pods in the host network. See SetExemptPods.
	OwnPodUID          string         // The pod of NMI, which is always exempt. May be empty.
	Logger             *zap.Logger    // May be nil.
}

func (c Config) check() error {
	for _, a := range []struct {
		name    string
		address netip.AddrPort
	}{{"metadata", c.Metadata}, {"listen", c.Listen}} {
		if !a.address.Addr().Is4() || a.address.Addr().IsUnspecified() || a.address.Port() == 0 {
			return fmt.Errorf("%s address %v: must be an IPv4 address with a port", a.name, a.address)
		}
	}
	if c.Metadata.Addr() == c.Listen.Addr() {
		return fmt.Errorf("listen address %v: must differ from the metadata address", c.Listen.Addr())
	}
	isV2, err := isCgroupV2(c.PodsCgroup)
	if err != nil {
		return fmt.Errorf("%w: the cgroup of all pods: %w; correct --pods-cgroup, or give --capture=iptables", ErrUnsupported, err)
	}
	if !isV2 {
		return fmt.Errorf("%w: %s, the cgroup of all pods, is not a cgroup of version 2; correct --pods-cgroup, or give --capture=iptables", ErrUnsupported, c.PodsCgroup)
	}
	return nil
}

// Capture owns our eBPF links and maps. Its methods may be called from any goroutine, and by several processes at once:
// a lock of the file system serializes changes.
type Capture struct {
	Config
	netns uint64
	pods  podCgroups

	mu     sync.Mutex       // held by the running method, except Owner
	loaded *ebpf.Collection // nil before Install
	mapDir string           // where the maps are pinned; set by load
	exempt map[string]bool  // UIDs of pods; nil before SetExemptPods
	// writtenExempt is what writeExemptPods wrote last. Drift is a difference of the map from it, not from the cgroups
	// that exist now: pods come and go.
	writtenExempt map[uint64]bool

	connections atomic.Pointer[ebpf.Map] // nil before Install
}

// New checks the configuration and that this node can run the programs. It changes nothing on the node. The network
// namespace of the caller is that of the node. The error is ErrUnsupported if the reason is the node.
func New(cfg Config) (*Capture, error) {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	netns, err := hostNetns()
	if err != nil {
		return nil, err
	}
	if err := checkPins(cfg.PinDir); err != nil {
		return nil, err
	}
	if err := checkPrograms(); err != nil {
		return nil, err
	}
	c := &Capture{Config: cfg, netns: netns, pods: podCgroups{root: cfg.PodsCgroup}}
	return c, c.checkOwnPod()
}

// checkOwnPod checks that the cgroup of NMI's pod is where those of pods are. Otherwise PodsCgroup is that of other processes.
func (c *Capture) checkOwnPod() error {
	if c.OwnPodUID == "" {
		return nil
	}
	found, err := c.pods.ids(map[string]bool{c.OwnPodUID: true})
	if err != nil {
		return fmt.Errorf("capture by cgroup: %w", err)
	}
	if len(found) == 0 || isQoSFolder(filepath.Base(c.PodsCgroup)) {
		return fmt.Errorf("%w: the cgroup of NMI's pod %s is not one or two levels below %s, or this is the cgroup of a quality of service class; give the cgroup of all pods with --pods-cgroup", ErrUnsupported, c.OwnPodUID, c.PodsCgroup)
	}
	return nil
}

// Install attaches the programs, or replaces those of an earlier NMI. From then on connections of pods to the metadata
// address are redirected to the listener. Idempotent. If the first installation fails, Install removes what it attached;
// otherwise the earlier programs, or those that are replaced already, stay in force.
func (c *Capture) Install(ctx context.Context) error {
	release, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	first, err := c.isFirst()
	if err != nil {
		return err
	}
	nothingBefore := !Installed(c.PinDir)
	err = c.install(first)
	if err != nil && nothingBefore {
		err = errors.Join(err, uninstall(c.PinDir))
	}
	if err != nil {
		return fmt.Errorf("installing the capture by cgroup: %w", err)
	}
	return nil
}

// Installed reports whether a program is pinned in the folder pins.
func Installed(pins string) bool {
	found, _ := filepath.Glob(filepath.Join(pins, linkPrefix+"*")) // fails only for an invalid pattern
	return len(found) > 0
}

// isFirst reports whether no earlier installation is complete.
func (c *Capture) isFirst() (bool, error) {
	a, err := readAttachment(c.PinDir, hook{name: dropHook})
	a.close()
	return a.cgroup == 0, err
}

func (c *Capture) install(first bool) error {
	if err := c.load(); err != nil {
		return err
	}
	rootID, err := cgroupID(c.PodsCgroup)
	if err != nil {
		return fmt.Errorf("the cgroup of all pods: %w", err)
	}
	if err := c.writeSettings(rootID); err != nil {
		return err
	}
	if err := c.writeExemptPods(); err != nil {
		return err
	}
	for _, h := range hooks() {
		if h.name == dropHook && first {
			if err := c.admitOlderHostSockets(); err != nil {
				return err
			}
		}
		if err := attach(c.PinDir, c.PodsCgroup, rootID, h, c.loaded.Programs[h.program]); err != nil {
			return err
		}
	}
	return c.removeLeftovers()
}

// Sync compares eBPF links and maps with the expected state and repairs the differences. A repair opens no gap: a
// program is replaced at once. Each string of repaired names one repaired part: "bpf" and the name of a hook, "bpf
// settings" or "bpf exempt pods".
func (c *Capture) Sync(ctx context.Context) (repaired []string, err error) {
	release, err := c.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return c.sync()
}

func (c *Capture) sync() (repaired []string, err error) {
	if c.loaded == nil {
		return nil, errors.New("the capture by cgroup is not installed")
	}
	rootID, err := cgroupID(c.PodsCgroup)
	if err != nil {
		return nil, fmt.Errorf("the cgroup of all pods: %w", err)
	}
	var failed []error
	part := func(name string, differs bool, err error, repair func() error) {
		if err == nil && differs {
			err = repair()
		}
		switch {
		case err != nil:
			failed = append(failed, fmt.Errorf("%s: %w", name, err))
		case differs:
			repaired = append(repaired, "bpf "+name)
		}
	}
	missing := missingMaps(c.mapDir, c.loaded.Maps)
	part("maps", len(missing) > 0, nil, func() error { return pinMaps(c.mapDir, c.loaded.Maps, missing) })
	differs, err := c.settingsDiffer(rootID)
	part("settings", differs, err, func() error { return c.writeSettings(rootID) })
	differs, err = c.exemptPodsDiffer()
	part("exempt pods", differs, err, func() error { return nil })
	if err == nil {
		failed = append(failed, c.writeExemptPods()) // in any case: pods come and go
	}
	for _, h := range hooks() {
		differs, err := c.attachmentDiffers(h, rootID)
		part(h.name, differs, err, func() error { return attach(c.PinDir, c.PodsCgroup, rootID, h, c.loaded.Programs[h.program]) })
	}
	return repaired, errors.Join(failed...)
}

func (c *Capture) attachmentDiffers(h hook, rootID uint64) (bool, error) {
	a, err := readAttachment(c.PinDir, h)
	defer a.close()
	if err != nil {
		return false, err
	}
	info, err := c.loaded.Programs[h.program].Info()
	if err != nil {
		return false, err
	}
	id, _ := info.ID()
	return a.cgroup != rootID || a.program != id, nil
}

// Close releases what this process holds. The capture stays in force.
func (c *Capture) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connections.Store(nil)
	if c.loaded != nil {
		c.loaded.Close()
		c.loaded = nil
	}
}

// Uninstall removes all eBPF links and maps in the folder pins: from then on pods reach the metadata service itself, unless something else captures their requests. Idempotent.
func Uninstall(ctx context.Context, pins string) error {
	if _, err := os.Stat(pins); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	release, err := lock(ctx, filepath.Dir(pins))
	if err != nil {
		return err
	}
	defer release()
	if err := uninstall(pins); err != nil {
		return fmt.Errorf("uninstalling the capture by cgroup: %w", err)
	}
	return nil
}

// uninstall detaches the drop last and stops at the first failure, so that pods never reach the metadata service while
// a part of the capture remains.
func uninstall(pins string) error {
	for _, h := range hooks() {
		if h.name == dropHook {
			continue
		}
		if err := detach(pins, h); err != nil {
			return err
		}
	}
	if err := detach(pins, hook{name: dropHook}); err != nil {
		return err
	}
	if err := os.RemoveAll(pins); err != nil {
		return fmt.Errorf("removing maps: %w", err)
	}
	return nil
}

// acquire acquires c.mu and the lock between processes, and returns a function that releases both.
func (c *Capture) acquire(ctx context.Context) (release func(), err error) {
	c.mu.Lock()
	unlock, err := lock(ctx, filepath.Dir(c.PinDir))
	if err != nil {
		c.mu.Unlock()
		return nil, err
	}
	return func() { unlock(); c.mu.Unlock() }, nil
}

// lockTimeout is well above the time that an installation takes.
const (
	lockTimeout       = 10 * time.Second
	lockRetryInterval = 20 * time.Millisecond
)

// lock waits until no other process changes what is pinned in dir. Only root can open dir.
func lock(ctx context.Context, dir string) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	folder, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("locking the capture by cgroup: %w", err)
	}
	for {
		err := ctx.Err()
		if err == nil {
			err = unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
		if err == nil {
			return func() { folder.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			folder.Close()
			return nil, fmt.Errorf("another process holds the lock of %s (`lslocks` shows it), as an NMI does while it changes the capture by cgroup: %w", dir, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(lockRetryInterval):
		}
	}
}
