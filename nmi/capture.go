package nmi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/podidentity/podidentity/bpf"
	"github.com/podidentity/podidentity/internal/nodelink"
	"github.com/podidentity/podidentity/iptables"
	"github.com/podidentity/podidentity/nmi/health"
	"github.com/podidentity/podidentity/nmi/links"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// capture is what redirects the requests of pods to NMI: iptables rules, eBPF programs at the cgroup of all pods, or both.
type capture struct {
	link     nodelink.Link
	iptables *iptables.Capture // nil if not used
	obsolete *iptables.Capture // removes the rules of an earlier NMI if iptables is nil; may be nil
	bpf      *bpf.Capture      // nil if not used
	owners   *bpf.Capture      // identifies connections; nil if the node cannot have bpf
	pinDir   string            // of package bpf
	// identifies says that the cgroup identifies most pods: bpf is used. It may be read while install runs.
	identifies atomic.Bool
	// oneIsEnough says that NMI works with one of the two if the other cannot be installed.
	oneIsEnough   bool
	bpfIsRequired bool // also if iptables rules are installed
	log           *zap.Logger
	// unidentified limits the log lines about connections whose owner is not known.
	unidentified rate.Sometimes
}

// ebpfHostRoutingLabel is the label of a node on which AKS routes the packets of pods past netfilter, with the value "true".
const ebpfHostRoutingLabel = "kubernetes.azure.com/ebpf-host-routing"

// newCapture checks which kinds of capture this node can have, and chooses among those that the configuration allows. It
// changes nothing on the node. bypassed says that the packets of pods bypass netfilter.
func newCapture(cfg Config, bypassed bool, log *zap.Logger) (*capture, error) {
	c := &capture{
		link: nodelink.Link{Address: cfg.listen().Addr()}, pinDir: cfg.pinDir(), oneIsEnough: cfg.CaptureBy == CaptureAuto, log: log,
		unidentified: rate.Sometimes{Interval: time.Minute},
	}
	var bpfErr error
	if cfg.CaptureBy != CaptureIPTables {
		c.bpf, bpfErr = newBPF(cfg, log)
	}
	settings := cfg.iptables(c.bpf != nil)
	settings.Logger = log
	rules, iptablesErr := iptables.New(settings)
	if bypassed && cfg.CaptureBy != CaptureBoth && iptablesErr == nil {
		iptablesErr = fmt.Errorf("the packets of pods bypass netfilter on this node, which has the label %s", ebpfHostRoutingLabel)
	}
	if c.oneIsEnough && bpfErr != nil && bpf.Installed(c.pinDir) {
		return nil, fmt.Errorf("an earlier NMI captures by cgroup on this node, but this NMI cannot: %w; --capture=%s removes that capture", bpfErr, CaptureIPTables)
	}
	use, err := chooseCaptures(cfg, bpfErr, iptablesErr)
	if err != nil {
		return nil, err
	}
	if use.iptables {
		c.iptables = rules
	} else {
		c.obsolete = rules
	}
	if !use.bpf {
		c.bpf = nil
	}
	c.owners = c.bpf
	c.identifies.Store(use.bpf)
	c.bpfIsRequired = !c.oneIsEnough || cfg.capturesHostNetwork() || cfg.PodVerification == string(request.VerifyRequired)
	if c.oneIsEnough && bpfErr != nil {
		log.Warn(withIPTablesAlone, zap.Error(bpfErr))
	}
	if c.oneIsEnough && iptablesErr != nil {
		c.warnWithoutIPTables(iptablesErr)
	}
	return c, nil
}

const withIPTablesAlone = "NMI captures with iptables alone, and knows pods by their address only, because this node cannot capture by cgroup"

// captureKinds are kinds of capture.
type captureKinds struct{ iptables, bpf bool }

// chooseCaptures returns what captures the requests of pods. The errors say why this node cannot have a kind of capture.
func chooseCaptures(cfg Config, bpfErr, iptablesErr error) (captureKinds, error) {
	var use captureKinds
	var required error // why a required kind is missing
	switch cfg.CaptureBy {
	case CaptureIPTables:
		use, required = captureKinds{iptables: true}, iptablesErr
	case CaptureBPF:
		use, required = captureKinds{bpf: true}, bpfErr
	case CaptureBoth:
		use, required = captureKinds{iptables: true, bpf: true}, bothErrors(iptablesErr, bpfErr)
	default:
		use = captureKinds{iptables: iptablesErr == nil, bpf: bpfErr == nil}
	}
	switch {
	case errors.Is(required, bpf.ErrUnsupported): // says what to do
		return use, fmt.Errorf("--capture=%s: %w", cfg.CaptureBy, required)
	case required != nil:
		return use, fmt.Errorf("--capture=%s is not possible on this node: %w; correct this, or give --capture=%s", cfg.CaptureBy, required, CaptureAuto)
	case !use.bpf && !use.iptables:
		return use, fmt.Errorf("this node can capture the requests of pods neither with iptables rules nor by cgroup: %w", bothErrors(iptablesErr, bpfErr))
	case !use.bpf && cfg.capturesHostNetwork():
		return use, fmt.Errorf("--capture-host-network=%s: this node cannot capture pods in the host network: %w", cfg.CaptureHostNetwork, bpfErr)
	case !use.bpf && cfg.PodVerification == string(request.VerifyRequired):
		return use, fmt.Errorf("--pod-verification=%s: this node cannot identify pods by their cgroup, so no pod would get a token: %w", cfg.PodVerification, bpfErr)
	}
	return use, nil
}

// bothErrors joins errors in one line.
func bothErrors(iptablesErr, bpfErr error) error {
	if iptablesErr != nil && bpfErr != nil {
		return fmt.Errorf("%w; %w", iptablesErr, bpfErr)
	}
	return errors.Join(iptablesErr, bpfErr)
}

func (c *capture) warnWithoutIPTables(reason error) {
	c.log.Warn("NMI captures by cgroup alone, because it cannot capture with iptables rules on this node; pods in virtual machines are not captured", zap.Error(reason))
}

func newBPF(cfg Config, log *zap.Logger) (*bpf.Capture, error) {
	root := cfg.PodsCgroup
	if root == "" {
		var err error
		if root, err = bpf.FindPodsCgroup(cfg.CgroupMount, cfg.PodUID); err != nil {
			return nil, err
		}
	}
	return bpf.New(bpf.Config{PodsCgroup: root, Metadata: cfg.imds(), Listen: cfg.listenIdentified(), CaptureHostNetwork: cfg.capturesHostNetwork(), OwnPodUID: cfg.PodUID, PinDir: cfg.pinDir(), Logger: log})
}

// ensureLink creates the network link with the listen address.
func (c *capture) ensureLink(ctx context.Context) error {
	if c.iptables != nil {
		return c.iptables.EnsureLink(ctx)
	}
	_, err := c.link.Ensure()
	return err
}

// install installs what captures the requests of pods, and then removes what an earlier NMI installed with another
// --capture: programs that nobody serves would redirect the requests of pods to a closed port.
func (c *capture) install(ctx context.Context) error {
	// The rules are first: they allow connections that the programs redirect.
	if c.iptables != nil {
		err := c.iptables.Install(ctx)
		switch {
		case err == nil:
		case c.bpf == nil || !c.oneIsEnough:
			return err
		default:
			c.warnWithoutIPTables(err)
			c.iptables, c.obsolete = nil, c.iptables
		}
	}
	if c.bpf == nil {
		return bpf.Uninstall(ctx, c.pinDir)
	}
	if err := c.bpf.Install(ctx); err != nil {
		if c.iptables == nil || c.bpfIsRequired || bpf.Installed(c.pinDir) {
			return err
		}
		c.log.Warn(withIPTablesAlone, zap.Error(err))
		c.bpf = nil
		c.identifies.Store(false)
	}
	if c.obsolete == nil {
		return nil
	}
	if err := c.obsolete.RemoveRules(ctx); err != nil {
		return fmt.Errorf("removing iptables rules of NMI, which drop connections that are redirected by cgroup: %w", err)
	}
	return nil
}

// sync checks and repairs the capture, and returns what it repaired.
func (c *capture) sync(ctx context.Context) (repaired []string, err error) {
	var failed []error
	if c.iptables != nil {
		repaired, err = c.iptables.Sync(ctx)
		failed = append(failed, err)
	} else if changed, err := c.link.Ensure(); err != nil {
		failed = append(failed, err)
	} else if changed {
		repaired = append(repaired, "link")
	}
	if c.bpf != nil {
		more, err := c.bpf.Sync(ctx)
		repaired, failed = append(repaired, more...), append(failed, err)
	}
	return repaired, errors.Join(failed...)
}

// identify returns who opened a connection that package bpf redirected.
func (c *capture) identify(conn net.Conn) (request.Caller, error) {
	owner, err := c.owners.Owner(conn)
	if err != nil {
		c.unidentified.Do(func() {
			c.log.Warn("closed a connection to the port of --nmi-bpf-port, because NMI cannot identify the pod that opened it; the metric podidentity_nmi_connections_unidentified_total counts all of them",
				zap.Stringer(telemetry.KeyAddress, conn.RemoteAddr()), zap.Error(err))
		})
		return request.Caller{}, err
	}
	client, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	return request.Caller{Address: client.Addr().Unmap(), PodUID: owner.PodUID, ContainerID: owner.ContainerID}, err
}

// fields describes the capture for the log.
func (c *capture) fields() []zap.Field {
	var fields []zap.Field
	if c.iptables != nil {
		fields = append(fields, zap.Stringer(telemetry.KeyBackend, c.iptables.Backend()))
	}
	if c.bpf != nil {
		fields = append(fields, zap.String(telemetry.KeyCgroup, c.bpf.PodsCgroup))
	}
	return fields
}

// repairCapture checks the capture at each SyncInterval, and repairs it, until ctx ends.
func (a *agent) repairCapture(ctx context.Context) {
	ticker := time.NewTicker(a.cfg.SyncInterval)
	defer ticker.Stop()
	a.health.Set(health.Rules, nil) // run has just installed the rules
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		repaired, err := a.capture.sync(ctx)
		for _, what := range repaired {
			a.metrics.Repairs.WithLabelValues(what).Inc()
		}
		if len(repaired) > 0 {
			a.logs.Main.Warn("repaired parts of the capture of pods' requests; another program had changed or deleted them, or an earlier repair was not completed", zap.Strings(telemetry.KeyRepaired, repaired))
		}
		if err != nil && ctx.Err() == nil {
			a.metrics.SyncErrors.Inc()
			a.logs.Main.Error("checking or repairing the capture of pods' requests failed; NMI retries", zap.Error(err))
		}
		if ctx.Err() == nil {
			a.health.Set(health.Rules, err)
		}
	}
}

// Uninstall removes what NMI installed on this node, except the folder StateDir itself. It is idempotent. Of cfg it
// uses, and checks, only the settings of the capture.
func Uninstall(ctx context.Context, cfg Config, log *zap.Logger) error {
	if err := cfg.validateCapture(); err != nil {
		return err
	}
	settings := cfg.iptables(false)
	settings.Logger = log
	// The programs are first: without the link, connections that they redirect leave the node.
	failed := []error{bpf.Uninstall(ctx, cfg.pinDir()), links.Remove(cfg.linksFile())}
	rules, err := iptables.New(settings) //nolint:contextcheck // asks the version of iptables, which ends at once
	if err == nil {
		err = rules.Uninstall(ctx)
	} else {
		err = errors.Join(err, nodelink.Link{Address: settings.Listen.Addr()}.Remove())
	}
	return errors.Join(append(failed, err)...)
}
