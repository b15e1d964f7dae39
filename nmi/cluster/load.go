package cluster

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"go.uber.org/zap"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/health"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// WaitFilled waits for the first fill of the caches. Before that, "not bound" might only mean "not loaded".
func (w *Watch) WaitSynced(ctx context.Context, timeout time.Duration) error {
	select {
	case <-w.synced:
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	select {
	case <-w.synced:
		return nil
	case <-ctx.Done():
		return w.health.Ready()
	}
}

// Run fills the caches: pods at once, identities as soon as their definitions are in the cluster.
func (w *Watch) Run(ctx context.Context) {
	w.RunPods(ctx)
	if !w.waitForCRDs(ctx) {
		return
	}
	w.health.Set(health.CRDs, nil)
	w.RunIdentities(ctx)
	var synced []cache.InformerSynced
	for _, informer := range w.All() {
		synced = append(synced, informer.HasSynced)
	}
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return
	}
	close(w.synced)
	w.health.Set(health.Caches, nil)
	// Loading needs several times the memory of what is kept; give the rest back now.
	debug.FreeOSMemory()
	w.log.Info("caches are synced")
}

// crdPollInterval is how often missing definitions are looked for.
const crdPollInterval = 5 * time.Second

// waitForCRDs waits until the cluster has our resources. It reports false when ctx ended first.
func (w *Watch) waitForCRDs(ctx context.Context) bool {
	for {
		err := w.CheckCRDs(ctx)
		if err == nil {
			return true
		}
		w.health.Set(health.CRDs, err)
		w.log.Warn("waiting for the custom resource definitions", zap.Error(err))
		select {
		case <-time.After(crdPollInterval):
		case <-ctx.Done():
			return false
		}
	}
}

// watchFailed counts what client-go logs itself.
func (w *Watch) watchFailed(ctx context.Context, r *cache.Reflector, err error) {
	cache.DefaultWatchErrorHandler(ctx, r, err)
	if apierrors.IsForbidden(err) {
		mode := "managed"
		if w.rules.Mode == identity.Standard {
			mode = "standard"
		}
		w.health.Explain(health.Caches, fmt.Errorf("%w; the ClusterRole of the chart allows it, if its operationMode is %s", err, mode))
	}
	w.failed(telemetry.APIWatch)
}
