package mic

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/go-logr/zapr"
	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/ledger"
)

// userAgent is the User-Agent of MIC for the API server.
const userAgent = "podidentity-mic"

// Run takes part in the leader election, and reconciles while it is the leader, until ctx ends. It returns an error
// if it cannot start, if it loses the lease, or if the container has an old azure.json (see waitUntilReplaced). The
// process must then be started again.
func Run(ctx context.Context, cfg Config, log *zap.Logger) error {
	return runElected(ctx, cfg, log, false)
}

// Uninstall becomes the leader, detaches what MIC attached, except protected identities (see
// machineReconciler.protected), and removes all assignments and ledgers. It returns nil when no assignment and no
// ledger is left, and an error if it ends before.
func Uninstall(ctx context.Context, cfg Config, log *zap.Logger) error {
	cfg.DetachDelay = 0
	return runElected(ctx, cfg, log, true)
}

// runElected takes part in the leader election, and runs a Controller while this MIC is the leader. drain is passed to
// newController. If drain is true, runElected also ends when nothing is left to remove.
func runElected(ctx context.Context, cfg Config, log *zap.Logger, drain bool) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	ctrllog.SetLogger(zapr.NewLogger(log.WithOptions(zap.IncreaseLevel(zap.WarnLevel))))
	config, err := kube.Config(cfg.Kubeconfig, userAgent)
	if err != nil {
		return err
	}
	var c *Controller
	arm, err := newMachines(cfg, log, ctrlmetrics.Registry, func() {
		if c != nil { // newMachines calls this function for the first configuration before the Controller exists
			c.reconcileAll()
		}
	})
	if err != nil {
		return err
	}
	c, err = newController(cfg, Deps{Kube: config, Machines: arm, Log: log, Registry: ctrlmetrics.Registry}, drain)
	if err != nil {
		return err
	}
	m, err := newManager(cfg, config, drain)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var drained atomic.Bool
	lead := func(ctx context.Context) error {
		log.Info("became the leader", zap.String("instance", cfg.LeaderElection.Instance))
		go func() {
			if c.waitUntilLoaded(ctx) && drain && c.waitUntilEmpty(ctx) {
				drained.Store(true)
				cancel()
			}
		}()
		return c.Run(ctx)
	}
	watchFile := func(ctx context.Context) error { return waitUntilReplaced(ctx, cfg.CloudConfig) }
	run := func(ctx context.Context) error {
		arm.Run(ctx)
		return nil
	}
	if err := errors.Join(m.Add(manager.RunnableFunc(lead)), m.Add(always(run)), m.Add(always(watchFile))); err != nil {
		return err
	}
	err = m.Start(ctx)
	if drain && !drained.Load() {
		return errors.Join(errors.New("mic uninstall stopped before all assignments and ledgers were removed; run it again"), err)
	}
	return err
}

// always is a manager.Runnable that runs whether this MIC is the leader or not.
type always func(context.Context) error

// Start implements manager.Runnable.
func (a always) Start(ctx context.Context) error { return a(ctx) }

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (always) NeedLeaderElection() bool { return false }

// waitUntilLoaded waits until all pods are loaded, and then returns memory to the operating system: loading needs
// several times the memory that is used afterwards. It returns false if ctx ends first.
func (c *Controller) waitUntilLoaded(ctx context.Context) bool {
	select {
	case <-c.loaded:
		debug.FreeOSMemory()
		return true
	case <-ctx.Done():
		return false
	}
}

// waitUntilEmpty waits until no assignment and no ledger is left. It returns false if ctx ends first.
func (c *Controller) waitUntilEmpty(ctx context.Context) bool {
	for {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return false
		}
		if c.cluster.HasAssignments() {
			continue
		}
		if left, err := ledger.Machines(ctx, c.configMaps); err == nil && len(left) == 0 {
			return true
		}
	}
}

// newManager returns a manager with leader election, metrics and probes. With drain the manager serves neither metrics
// nor probes: the pod of an uninstall must become ready only when everything is removed. From then on command mic
// itself answers the probes, with the flag --wait-for-signal.
func newManager(cfg Config, config *rest.Config, drain bool) (manager.Manager, error) {
	lease := cfg.LeaderElection.Duration
	// Two MICs may have the same name by mistake, so a UUID makes the holder identity of the lease unique.
	identity := cfg.LeaderElection.Instance + "_" + string(uuid.NewUUID())
	lock, err := resourcelock.NewFromKubeconfig(resourcelock.LeasesResourceLock, cfg.LeaderElection.Namespace, cfg.LeaderElection.Name,
		resourcelock.ResourceLockConfig{Identity: identity}, config, lease*2/3)
	if err != nil {
		return nil, fmt.Errorf("preparing leader election: %w", err)
	}
	renew, retry := lease*2/3, lease/8
	address := func(port int) string {
		if drain {
			return "0"
		}
		return fmt.Sprintf(":%d", port)
	}
	options := manager.Options{
		LeaderElection:                      true,
		LeaderElectionResourceLockInterface: lock,
		LeaderElectionReleaseOnCancel:       true, // the manager first waits until the Controller has ended its work
		LeaseDuration:                       &lease,
		RenewDeadline:                       &renew,
		RetryPeriod:                         &retry,
		Metrics:                             metricsserver.Options{BindAddress: address(cfg.PrometheusPort)},
		HealthProbeBindAddress:              address(cfg.ProbePort),
	}
	if cfg.Profile {
		options.PprofBindAddress = fmt.Sprintf("127.0.0.1:%d", profilePort)
	}
	m, err := manager.New(config, options)
	if err != nil {
		return nil, fmt.Errorf("preparing the manager of controllers: %w", err)
	}
	return m, errors.Join(m.AddHealthzCheck("alive", healthz.Ping), m.AddReadyzCheck("ready", healthz.Ping))
}
