package nmi

import (
	"context"
	"errors"
	"fmt"

	lru "github.com/hashicorp/golang-lru/v2"
	"go.uber.org/zap"
	"k8s.io/client-go/rest"

	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/health"
	"github.com/podidentity/podidentity/nmi/links"
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
	capture    *capture
	client     *cluster.Client
	objects    *cluster.Cache
	principals *credentials.Principals
	sources    *token.Sources
	tokens     *token.Cache
	pods       *cluster.PodFinder
	links      *links.Table // nil if addresses do not have to be confirmed
	requests   *request.Processor
	events     *telemetry.Events // nil if Events are disabled
	moved      *lru.Cache[movedAddress, struct{}]

	hostPodsChanged chan struct{} // has a value if exemptHostPods is to update the exempt pods

	onAPIFailure func(operation string) // see cluster.NewClient
}

// Run serves the pods of this node until ctx ends. What captures their requests stays in place afterwards;
// Uninstall removes them. Run changes nothing on the node until it creates the network link with the listen address.
func Run(ctx context.Context, cfg Config, logs telemetry.Loggers) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if err := cfg.checkKubenet(); err != nil {
		return err
	}
	if err := disableMemoryDumps(); err != nil {
		return fmt.Errorf("disabling core dumps of this process and access to its memory: %w", err)
	}
	api, err := apiServerConfig(cfg)
	if err != nil {
		return err
	}
	a := &agent{cfg: cfg, logs: logs, metrics: telemetry.NewMetrics(), health: health.New(), hostPodsChanged: make(chan struct{}, 1)}
	a.onAPIFailure = a.metrics.CountAPIFailure
	// While NMI stops, requests in flight may still wait for an object. So the watches have a context of their own,
	// which ends after ctx.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWatching()
	if err := a.connect(ctx, watching, api); err != nil {
		return err
	}
	defer a.tokens.Close()
	labels, err := a.client.NodeLabels(ctx, logs.Main)
	if err != nil {
		return err
	}
	if a.capture, err = newCapture(cfg, labels[ebpfHostRoutingLabel] == "true", logs.Main); err != nil { //nolint:contextcheck // asks the version of iptables, which ends at once
		return err
	}
	linksWatched := a.watchLinks(watching)
	defer func() {
		stopWatching()
		<-linksWatched
	}()
	return a.run(ctx, watching)
}

// watchLinks watches the network links of the node until ctx ends. It closes the channel when it has saved what it knows.
func (a *agent) watchLinks(ctx context.Context) <-chan struct{} {
	ended := make(chan struct{})
	if a.links == nil {
		close(ended)
		return ended
	}
	a.setLinksState(errors.New("not read yet"))
	go func() {
		defer close(ended)
		a.links.Run(ctx)
	}()
	return ended
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

// run opens the ports, then installs the capture, then starts the caches. Once the capture is installed, no pod outside
// the host network can reach the real token endpoint. At that time the ports are already open, and token requests wait
// for the caches, at most for PodLookupTimeout. The watches stop when the context watching ends, which must be after
// run has returned.
func (a *agent) run(ctx, watching context.Context) error {
	listeners, err := server.Listen(ctx, a.serverConfig(), a.capture.ensureLink)
	if err != nil {
		return err
	}
	defer listeners.Close()
	pods := a.newServer()
	failed := pods.Start(listeners, a.health.Handler())
	defer pods.Close()
	a.health.Set(health.Listener, nil)
	if err := a.capture.install(ctx); err != nil {
		return fmt.Errorf("installing the capture of requests to IMDS: %w", err)
	}
	a.metrics.SetCaptures(a.capture.iptables != nil, a.capture.bpf != nil)
	a.logs.Main.Info("installed the capture of requests to IMDS", append(a.capture.fields(), zap.String(telemetry.KeyNode, a.cfg.Node))...)
	go a.repairCapture(ctx)
	if a.cfg.capturesHostNetwork() {
		go a.exemptHostPods(ctx, a.capture.bpf.SetExemptPods)
	}
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
	a.logs.Main.Info("stopping NMI; its iptables rules and eBPF programs stay in place, so that pods do not reach the real token endpoint")
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.ShutdownTimeout)
	defer cancel()
	err = pods.Shutdown(ending)
	<-hostTokensEnded
	if err != nil {
		return fmt.Errorf("requests of pods were still in flight after --shutdown-timeout, and NMI closes their connections: %w", err)
	}
	return nil
}
