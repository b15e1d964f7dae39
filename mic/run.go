package mic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/podidentity/podidentity/mic/telemetry"

	"github.com/go-logr/zapr"
	"github.com/prometheus/client_golang/prometheus"
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
	"github.com/podidentity/podidentity/internal/outbound"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/ledger"
)

// userAgent is what the API server knows MIC by.
const userAgent = "podidentity-mic"

// Run works as one of several MICs, of which the leader does everything, until ctx ends or the lead is lost; that is an
// error, after which the process is to be started again.
func Run(ctx context.Context, cfg Config, log *zap.Logger) error {
	return stand(ctx, cfg, log, false)
}

// Uninstall takes the lead, detaches what MIC attached, and removes all assignments and ledgers. It returns when nothing
// of that is left.
func Uninstall(ctx context.Context, cfg Config, log *zap.Logger) error {
	cfg.DetachDelay = 0
	return stand(ctx, cfg, log, true)
}

// stand stands for leader and does the leader's work.
func stand(ctx context.Context, cfg Config, log *zap.Logger, drain bool) error {
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
		if c != nil { // the first time there is nothing to ask again
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
	ctx, done := context.WithCancel(ctx)
	defer done()
	var drained atomic.Bool
	lead := func(ctx context.Context) error {
		log.Info("leading", zap.String("instance", cfg.LeaderElection.Instance))
		go func() {
			select {
			case <-c.loaded:
				debug.FreeOSMemory() // loading needs several times what is kept
			case <-ctx.Done():
				return
			}
			if drain && c.awaitNothing(ctx) {
				drained.Store(true)
				done()
			}
		}()
		return c.Run(ctx)
	}
	watchFile := func(ctx context.Context) error { return awaitReplaced(ctx, cfg.CloudConfig) }
	run := func(ctx context.Context) error {
		arm.Run(ctx)
		return nil
	}
	if err := errors.Join(m.Add(manager.RunnableFunc(lead)), m.Add(everywhere(run)), m.Add(everywhere(watchFile))); err != nil {
		return err
	}
	err = m.Start(ctx)
	if drain && !drained.Load() {
		return errors.Join(errors.New("stopped before all was removed; run it again"), err)
	}
	return err
}

// everywhere is what a MIC does whether it leads or not.
type everywhere func(context.Context) error

// Start implements manager.Runnable.
func (e everywhere) Start(ctx context.Context) error { return e(ctx) }

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (everywhere) NeedLeaderElection() bool { return false }

// replacedEvery is how often is looked whether another file has taken the place of azure.json.
const replacedEvery = 10 * time.Second

// awaitReplaced returns an error once the file that this process sees is not the one of that name any more: a file of the host that is
// mounted by itself stays the old one in the container when another takes its place, and only a new container sees that.
func awaitReplaced(ctx context.Context, file string) error {
	ticker := time.NewTicker(replacedEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		info, err := os.Stat(file)
		if err != nil {
			continue // there is none, or none that can be read, which whoever reads it reports
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Nlink == 0 {
			return fmt.Errorf("another file has taken the place of %s; starting anew with that", file)
		}
	}
}

// newMachines is the way to Azure, with the configuration as it is at any time.
// configured is called when there is one that can be used.
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
			log.Error("cannot ask Azure for anything until its configuration is right", zap.Error(err))
			return
		}
		log.Info("read the configuration of Azure")
		configured()
	}
	return azure.NewReloading(cfg.CloudConfig, os.Getenv, azure.Options{UserAgent: cfg.UserAgent, RootCAs: roots, Observer: observer}, changed), nil
}

// newManager prepares leader election, metrics and probes. MIC that uninstalls has no probes: its pod becomes ready when
// all is done.
func newManager(cfg Config, config *rest.Config, drain bool) (manager.Manager, error) {
	lease := cfg.LeaderElection.Duration
	// Two MICs may have been given one name.
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
		LeaderElectionReleaseOnCancel:       true, // all work has ended by then
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
		return nil, fmt.Errorf("preparing to work: %w", err)
	}
	return m, errors.Join(m.AddHealthzCheck("alive", healthz.Ping), m.AddReadyzCheck("ready", healthz.Ping))
}

// awaitNothing waits until no assignment and no ledger is left. It reports false if ctx ends before.
func (c *Controller) awaitNothing(ctx context.Context) bool {
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
