package nmi

import (
	"context"
	"fmt"

	"go.uber.org/zap"
	"k8s.io/client-go/rest"

	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/iptables"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/health"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/server"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// agent has the parts of a running NMI.
type agent struct {
	cfg        Config
	logs       telemetry.Loggers
	metrics    *telemetry.Metrics
	health     *health.Health
	capture    *iptables.Capture
	client     *cluster.Client
	objects    *cluster.Cache
	principals *credentials.Principals
	sources    *token.Sources
	tokens     *token.Cache
	requests   *request.Processor
	events     *telemetry.Events // nil if Events are disabled

	onAPIFailure func(operation string) // see cluster.NewClient
}

// Run serves the pods of this node until ctx ends. The rules that capture their requests stay in place afterwards;
// Uninstall removes them. Run changes nothing on the node until it creates the network link with the listen address.
func Run(ctx context.Context, cfg Config, logs telemetry.Loggers) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if err := cfg.checkKubenet(); err != nil {
		return err
	}
	capture, err := newCapture(cfg, logs.Main) //nolint:contextcheck // asks the version of iptables, which ends at once
	if err != nil {
		return err
	}
	if err := disableMemoryDumps(); err != nil {
		return fmt.Errorf("disabling core dumps of this process and access to its memory: %w", err)
	}
	api, err := apiServerConfig(cfg)
	if err != nil {
		return err
	}
	a := &agent{cfg: cfg, logs: logs, metrics: telemetry.NewMetrics(), health: health.New(), capture: capture}
	a.onAPIFailure = a.metrics.CountAPIFailure
	// While NMI stops, requests in flight may still wait for an object. So the watches have a context of their own,
	// which ends after ctx.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWatching()
	if err := a.connect(ctx, watching, api); err != nil {
		return err
	}
	defer a.tokens.Close()
	if err := a.client.CheckNode(ctx, logs.Main); err != nil {
		return err
	}
	return a.run(ctx, watching)
}

func apiServerConfig(cfg Config) (*rest.Config, error) {
	config, err := kube.Config(cfg.Kubeconfig, "podidentity-nmi")
	if err != nil {
		return nil, err
	}
	// When a node starts, NMI may have to send a small request to the API server for each pod before it can give the
	// pod its first token.
	config.QPS, config.Burst = 50, 100
	return config, nil
}

// run opens the ports, then installs the rules, then starts the caches. Once the rules are installed, no pod outside
// the host network can reach the real token endpoint. At that time the ports are already open, and token requests wait
// for the caches, at most for PodLookupTimeout. The watches stop when the context watching ends, which must be after
// run has returned.
func (a *agent) run(ctx, watching context.Context) error {
	listeners, err := server.Listen(ctx, a.cfg.server(), a.capture.EnsureLink)
	if err != nil {
		return err
	}
	defer listeners.Close()
	pods := a.newServer()
	failed := pods.Start(listeners, a.health.Handler())
	defer pods.Close()
	a.health.Set(health.Listener, nil)
	if err := a.capture.Install(ctx); err != nil {
		return fmt.Errorf("installing the rules that capture requests to IMDS: %w", err)
	}
	a.logs.Main.Info("installed the rules that capture requests to IMDS", zap.Stringer(telemetry.KeyBackend, a.capture.Backend()), zap.String(telemetry.KeyNode, a.cfg.Node))
	go a.repairRules(ctx)
	go a.objects.Run(watching)
	go a.releaseDeletedPods(watching)
	hostTokensEnded := make(chan struct{})
	go func() {
		defer close(hostTokensEnded)
		if a.cfg.HostToken {
			pods.ServeHostTokens(ctx)
		}
	}()

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	a.health.ShutDown()
	a.logs.Main.Info("stopping NMI; its iptables rules stay in place, so that no pod outside the host network reaches the real token endpoint")
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.ShutdownTimeout)
	defer cancel()
	err = pods.Shutdown(ending)
	<-hostTokensEnded
	if err != nil {
		return fmt.Errorf("requests of pods were still in flight after --shutdown-timeout, and NMI closes their connections: %w", err)
	}
	return nil
}
