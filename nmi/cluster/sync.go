package cluster

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/cache"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/health"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// crdPollInterval is the time between two checks for missing custom resource definitions.
const crdPollInterval = 5 * time.Second

// Run starts the informers: the informer of the pods at once, the others as soon as the cluster has their definitions.
// They run until ctx ends. Run returns when all caches have synced, or when ctx ends.
func (c *Cache) Run(ctx context.Context) {
	informers := c.informers()
	go informers[0].RunWithContext(ctx)
	if !c.waitForCRDs(ctx) {
		return
	}
	c.cfg.Health.Set(health.CRDs, nil)
	synced := []cache.InformerSynced{informers[0].HasSynced}
	for _, informer := range informers[1:] {
		go informer.RunWithContext(ctx)
		synced = append(synced, informer.HasSynced)
	}
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return
	}
	close(c.synced)
	c.cfg.Health.Set(health.Caches, nil)
	// Loading all objects takes several times the memory that the caches keep. Return the rest to the operating system.
	debug.FreeOSMemory()
	c.cfg.Log.Info("loaded the cluster's objects from the API server; from now on NMI decides about token requests")
}

// waitForCRDs waits until the cluster has the custom resources of NMI. It returns false if ctx ends first.
func (c *Cache) waitForCRDs(ctx context.Context) bool {
	resources := []string{v1.AzureIdentities, v1.AzureIdentityBindings, v1.AzurePodIdentityExceptions}
	if c.assignments != nil {
		resources = append(resources, v1.AzureAssignedIdentities)
	}
	for {
		err := c.checkCRDs(ctx, resources)
		if err == nil {
			return true
		}
		c.cfg.Health.Set(health.CRDs, err)
		c.cfg.Log.Warn("waiting for the custom resource definitions; until the API server serves them, token requests get an error that clients retry", zap.Error(err))
		select {
		case <-time.After(crdPollInterval):
		case <-ctx.Done():
			return false
		}
	}
}

// WaitSynced waits until all caches have synced. Before that, an object that exists may not be in its cache yet. After
// the timeout, or when ctx ends, WaitSynced returns an error that says why NMI is not ready.
func (c *Cache) WaitSynced(ctx context.Context, timeout time.Duration) error {
	select {
	case <-c.synced:
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	select {
	case <-c.synced:
		return nil
	case <-ctx.Done():
		return c.cfg.Health.Ready()
	}
}

// watchFailed logs and counts a failed watch. If the API server forbids the watch and the caches have not synced yet,
// watchFailed also adds this reason to the response of the readiness probe.
func (c *Cache) watchFailed(ctx context.Context, r *cache.Reflector, err error) {
	cache.DefaultWatchErrorHandler(ctx, r, err)
	if apierrors.IsForbidden(err) {
		mode := "managed"
		if c.cfg.Rules.Mode == identity.Standard {
			mode = "standard"
		}
		c.cfg.Health.Explain(health.Caches, fmt.Errorf("%w; the ClusterRole of the chart allows NMI this request if the chart value operationMode is %s", err, mode))
	}
	c.onFailure(telemetry.APIWatch)
}
