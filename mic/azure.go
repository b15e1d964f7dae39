package mic

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/podidentity/podidentity/internal/outbound"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/telemetry"
)

// replacedInterval is the interval between checks whether azure.json was replaced.
const replacedInterval = 10 * time.Second

// waitUntilReplaced returns an error once the file has no hard link any more, and nil when ctx ends. A file that is
// mounted into the container as a single file loses its last hard link when it is replaced or deleted on the node. The
// container keeps the old file, and only a new container sees the new one.
func waitUntilReplaced(ctx context.Context, file string) error {
	ticker := time.NewTicker(replacedInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		info, err := os.Stat(file)
		if err != nil {
			continue // azure.Reloading reports a file that is missing or cannot be read
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Nlink == 0 {
			return fmt.Errorf("%s was replaced or deleted on the node; MIC ends so that a new container sees the new file", file)
		}
	}
}

// newMachines returns the client of Azure Resource Manager. newMachines reads the configuration for Azure once, and the
// client's method Run reads each later change. After the first read and after each change, configured is called if the
// configuration is valid.
func newMachines(cfg Config, log *zap.Logger, r prometheus.Registerer, configured func()) (*azure.Reloading, error) {
	roots, err := outbound.RootCAs(cfg.CABundle)
	if err != nil {
		return nil, err
	}
	observer, err := telemetry.NewARMMetrics(r)
	if err != nil {
		return nil, err
	}
	changed := func(_ azure.Config, err error) {
		if err != nil {
			log.Error("the configuration for Azure is not usable; MIC keeps the last usable one, or cannot call Azure if there was none", zap.Error(err))
			return
		}
		log.Info("read the configuration for Azure")
		configured()
	}
	return azure.NewReloading(cfg.CloudConfig, os.Getenv, azure.Options{UserAgent: cfg.UserAgent, RootCAs: roots, Observer: observer}, changed), nil
}
