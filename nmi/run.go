package nmi

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	"go.uber.org/zap"
	"k8s.io/client-go/rest"

	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/iptables"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/health"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/server"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// node is one NMI at work.
type node struct {
	cfg        Config
	logs       telemetry.Loggers
	metrics    *telemetry.Metrics
	health     *health.Health
	capture    *iptables.Capture
	watch      *cluster.Watch
	sources    *token.Sources
	cache      *token.Cache
	requests   *request.Processor
	principals *credentials.Principals
	events     *telemetry.Events // nil if they are switched off
}

// Run serves the pods of this node until ctx ends. The rules that capture their traffic stay in place when it returns:
// removing them is Uninstall's. An error that comes before the rules were touched has changed nothing on the node.
func Run(ctx context.Context, cfg Config, logs telemetry.Loggers) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if err := cfg.checkKubenet(); err != nil {
		return err
	}
	captureConfig := cfg.Capture()
	captureConfig.Logger = logs.Main
	capture, err := iptables.New(captureConfig)
	if err != nil {
		return err
	}
	if err := disableMemoryDumps(); err != nil {
		return err
	}
	n := &node{cfg: cfg, logs: logs, metrics: telemetry.NewMetrics(), health: health.New(), capture: capture}
	kube, err := kubeConfig(cfg)
	if err != nil {
		return err
	}
	if n.watch, err = cluster.New(n.cluster(kube)); err != nil {
		return fmt.Errorf("preparing to watch the cluster: %w", err)
	}
	// Requests under way may still wait for an object while the server ends.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWatching()
	if err := n.prepareTokens(ctx, watching); err != nil {
		return err
	}
	defer n.cache.Close()
	n.metrics.AddCacheSize(n.cache.Len)
	n.metrics.AddStaleWatches(n.watch.StaleWatches)
	if cfg.Events {
		if n.events, err = telemetry.NewEvents(cfg.Node, n.watch.WriteEvent); err != nil {
			return err
		}
		go n.events.Run(watching)
	}
	if err := n.watch.CheckNode(ctx); err != nil {
		return err
	}
	return n.run(ctx, watching)
}

func kubeConfig(cfg Config) (*rest.Config, error) {
	config, err := kube.Config(cfg.Kubeconfig, "podidentity-nmi")
	if err != nil {
		return nil, err
	}
	// When a node starts, each of its pods may need one small answer of the API server before its first token.
	config.QPS, config.Burst = 50, 100
	return config, nil
}

// run brings everything up in the order that keeps the node closed: the ports that only NMI uses, the listener, the
// rules, and then the caches, for which requests wait.
//
// Watches end with watching, which outlives ctx.
func (n *node) run(ctx, watching context.Context) error {
	l, err := server.Listen(ctx, n.cfg.server(), n.capture.EnsureLink)
	defer l.Close()
	if err != nil {
		return err
	}
	pods := n.newServer()
	failed := pods.Start(l, n.health.Handler())
	defer pods.Close()
	n.health.Set(health.Listener, nil)
	if err := n.capture.Install(ctx); err != nil {
		return fmt.Errorf("capturing metadata requests of pods: %w", err)
	}
	n.logs.Main.Info("metadata requests of pods are captured", zap.Stringer(telemetry.KeyBackend, n.capture.Backend()), zap.String(telemetry.KeyNode, n.cfg.Node))
	go n.repairRules(ctx)
	go n.watch.Run(watching)
	go n.releaseDeletedPods(watching)
	hostTokens := make(chan struct{}) // closed once they are not served any more
	go func() {
		defer close(hostTokens)
		if n.cfg.HostToken {
			pods.ServeHostTokens(ctx)
		}
	}()

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	n.health.ShutDown()
	n.logs.Main.Info("stopping; the rules stay, so that pods cannot reach the real token endpoint")
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.cfg.ShutdownTimeout)
	defer cancel()
	err = pods.Shutdown(ending)
	<-hostTokens
	if err != nil {
		return fmt.Errorf("requests were still under way after --shutdown-timeout: %w", err)
	}
	return nil
}

// cluster says what to watch, and what follows from a change.
func (n *node) cluster(api *rest.Config) cluster.Config {
	return cluster.Config{
		API: api, Node: n.cfg.Node, Rules: n.cfg.rules(), Health: n.health, Log: n.logs.Main,
		Callbacks: cluster.Callbacks{PodGone: n.podGone, IdentityChanged: n.identityChanged, Failed: n.metrics.CountAPIFailure},
	}
}

func (n *node) newServer() *server.Server {
	var refused func(*corev1.Pod, *metadata.Error)
	if n.events != nil {
		refused = n.events.Refused
	}
	return server.New(n.cfg.server(), n.requests, n.metrics, n.logs, refused)
}

// repairRules looks after the rules until ctx ends.
func (n *node) repairRules(ctx context.Context) {
	ticker := time.NewTicker(n.cfg.SyncInterval)
	defer ticker.Stop()
	n.health.Set(health.Rules, nil) // they have just been installed
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		repaired, err := n.capture.Sync(ctx)
		for _, what := range repaired {
			n.metrics.Repairs.WithLabelValues(what).Inc()
		}
		if len(repaired) > 0 {
			n.logs.Main.Warn("something had changed the rules of this node; they are as they should be again", zap.Strings(telemetry.KeyRepaired, repaired))
		}
		if err != nil && ctx.Err() == nil {
			n.metrics.SyncErrors.Inc()
			n.logs.Main.Error("looking after the rules", zap.Error(err))
		}
		if ctx.Err() == nil {
			n.health.Set(health.Rules, err)
		}
	}
}

// Uninstall removes from this node all that NMI put there. It is idempotent.
func Uninstall(ctx context.Context, cfg Config, log *zap.Logger) error {
	captureConfig := cfg.Capture()
	captureConfig.Logger = log
	capture, err := iptables.New(captureConfig)
	if err != nil {
		return err
	}
	return capture.Uninstall(ctx)
}
