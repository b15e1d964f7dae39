package nmi

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/podidentity/podidentity/iptables"
	"github.com/podidentity/podidentity/nmi/health"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

func newCapture(cfg Config, log *zap.Logger) (*iptables.Capture, error) {
	c := cfg.Capture()
	c.Logger = log
	return iptables.New(c)
}

// repairRules checks and repairs the iptables rules and the network link of NMI every SyncInterval until ctx ends.
func (a *agent) repairRules(ctx context.Context) {
	ticker := time.NewTicker(a.cfg.SyncInterval)
	defer ticker.Stop()
	a.health.Set(health.Rules, nil) // run has just installed the rules
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		repaired, err := a.capture.Sync(ctx)
		for _, what := range repaired {
			a.metrics.Repairs.WithLabelValues(what).Inc()
		}
		if len(repaired) > 0 {
			a.logs.Main.Warn("repaired iptables rules or the network link of NMI; another program had changed or deleted them, or an earlier repair was not completed", zap.Strings(telemetry.KeyRepaired, repaired))
		}
		if err != nil && ctx.Err() == nil {
			a.metrics.SyncErrors.Inc()
			a.logs.Main.Error("checking or repairing the iptables rules and the network link of NMI failed; NMI retries", zap.Error(err))
		}
		if ctx.Err() == nil {
			a.health.Set(health.Rules, err)
		}
	}
}

// Uninstall removes everything from this node that NMI installed. It is idempotent. Of cfg it uses, and checks, only the
// settings of the capture.
func Uninstall(ctx context.Context, cfg Config, log *zap.Logger) error {
	if err := cfg.validateCapture(); err != nil {
		return err
	}
	capture, err := newCapture(cfg, log) //nolint:contextcheck // asks the version of iptables, which ends at once
	if err != nil {
		return err
	}
	return capture.Uninstall(ctx)
}
