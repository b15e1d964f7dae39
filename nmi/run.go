package nmi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/iptables"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// node is one NMI at work.
type node struct {
	cfg     Config
	logs    telemetry.Loggers
	metrics *telemetry.Metrics
	health  *health
	capture *iptables.Capture
	watch   *watch
	sources *token.Sources
	cache   *token.Cache
	tokens  *tokens
	events  *telemetry.Events // nil if they are switched off
	filled  chan struct{}     // closed once all caches have been filled
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
	if err := keepSecretsInMemory(); err != nil {
		return err
	}
	n := &node{cfg: cfg, logs: logs, metrics: telemetry.NewMetrics(), health: newHealth(), capture: capture, filled: make(chan struct{})}
	kube, err := kubeConfig(cfg)
	if err != nil {
		return err
	}
	tell := listening{podGone: n.podGone, identityChanged: n.identityChanged, failed: n.metrics.APIFailed}
	if n.watch, err = newWatch(kube, cfg.Node, cfg.rules(), tell); err != nil {
		return fmt.Errorf("preparing to watch the cluster: %w", err)
	}
	for _, informer := range n.watch.all() {
		if err := informer.SetWatchErrorHandlerWithContext(n.watchFailed); err != nil {
			return err
		}
	}
	// Requests under way may still wait for an object while the server ends.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWatching()
	if err := n.prepareTokens(ctx, watching); err != nil {
		return err
	}
	defer n.cache.Close()
	n.metrics.CacheSize(n.cache.Len)
	n.metrics.StaleWatches(n.watch.connection.staleCount)
	if cfg.Events {
		if n.events, err = telemetry.NewEvents(cfg.Node, n.watch.writeEvent); err != nil {
			return err
		}
		go n.events.Run(watching)
	}
	if err := n.watch.checkNode(ctx, logs.Main); err != nil {
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
	l, err := n.listen(ctx)
	defer l.close()
	if err != nil {
		return err
	}
	failed := make(chan error, 4)
	serve := func(what string, s *http.Server, l net.Listener) {
		go func() {
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serving %s: %w", what, err)
			}
		}()
	}
	pods := n.newServer()
	main := newHTTPServer(pods, n.cfg.held())
	defer main.Close()
	serve("pods", main, newFairListener(l.pods, n.metrics.Connections))
	n.health.set(needListener, nil)
	serve("probes", newHTTPServer(n.health.handler(), 0), l.probes)
	serve("metrics", newHTTPServer(n.metricsHandler(), 0), l.metrics)
	if l.profile != nil {
		s := newHTTPServer(profiler(), 0)
		s.WriteTimeout = 5 * time.Minute // a profile takes the time it was asked to take
		serve("profiles", s, l.profile)
	}
	if err := n.capture.Install(ctx); err != nil {
		return fmt.Errorf("capturing metadata requests of pods: %w", err)
	}
	n.logs.Main.Info("metadata requests of pods are captured", zap.Stringer(telemetry.KeyBackend, n.capture.Backend()), zap.String(telemetry.KeyNode, n.cfg.Node))
	go n.keepRules(ctx)
	go n.load(watching)
	go n.sweep(watching)
	hostTokens := make(chan struct{}) // closed once they are not served any more
	go func() {
		defer close(hostTokens)
		if n.cfg.HostToken {
			n.serveHostTokens(ctx, pods)
		}
	}()

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	n.health.shutDown()
	n.logs.Main.Info("stopping; the rules stay, so that pods cannot reach the real token endpoint")
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.cfg.Shutdown)
	defer cancel()
	err = main.Shutdown(ending)
	<-hostTokens
	if err != nil {
		return fmt.Errorf("requests were still under way after --shutdown-timeout: %w", err)
	}
	return nil
}

// listeners are what NMI listens on. profile is nil unless it is switched on.
type listeners struct{ probes, metrics, profile, pods net.Listener }

func (l *listeners) close() {
	for _, one := range []net.Listener{l.probes, l.metrics, l.profile, l.pods} {
		if one != nil {
			_ = one.Close()
		}
	}
}

// listen opens them, those of the pods last: until then nothing has been changed on the node.
func (n *node) listen(ctx context.Context) (*listeners, error) {
	l := &listeners{}
	var err error
	if l.probes, err = listen("127.0.0.1", n.cfg.ProbePort, "--http-probe-port"); err != nil {
		return l, err
	}
	if l.metrics, err = listen("", n.cfg.PrometheusPort, "--prometheus-port"); err != nil {
		return l, err
	}
	if n.cfg.Profile {
		if l.profile, err = listen("127.0.0.1", profilePort, "--enable-profile"); err != nil {
			return l, err
		}
	}
	l.pods, err = n.listenForPods(ctx)
	return l, err
}

func listen(host string, port int, flag string) (net.Listener, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return nil, inUse(flag, err)
	}
	return l, nil
}

func inUse(flag string, err error) error {
	return fmt.Errorf("%s: %w; is another NMI running on this node, or something else on that port?", flag, err)
}

// listenForPods listens on the listen address, and then makes the link that has it. In this order a port that is in use
// is found out while nothing has been changed on the node.
func (n *node) listenForPods(ctx context.Context) (net.Listener, error) {
	early := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) })
		return errors.Join(err, failed)
	}}
	l, err := early.Listen(ctx, "tcp4", n.cfg.listen().String())
	if err != nil {
		return nil, inUse("--nmi-port", err)
	}
	if err := n.capture.EnsureLink(ctx); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (n *node) newServer() *server {
	s := &server{
		rules:         metadata.Rules{HeaderOptional: !n.cfg.MetadataHeaderRequired},
		upstream:      metadata.NewUpstream(n.cfg.imds()),
		tenantID:      n.cfg.TenantID,
		blockInstance: n.cfg.BlockInstanceMetadata,
		metrics:       n.metrics,
		logs:          n.logs,
		tokens:        n.tokens,
	}
	if n.events != nil {
		s.refused = n.events.Refused
	}
	return s
}

func (n *node) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(n.metrics.Registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

func profiler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// waitFilled waits for the first fill of the caches. Before that, "not bound" might only mean "not loaded".
func (n *node) waitFilled(ctx context.Context, timeout time.Duration) error {
	select {
	case <-n.filled:
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	select {
	case <-n.filled:
		return nil
	case <-ctx.Done():
		return n.health.ready()
	}
}

// load fills the caches: pods at once, identities as soon as their definitions are in the cluster.
func (n *node) load(ctx context.Context) {
	n.watch.runPods(ctx)
	if !n.waitForCRDs(ctx) {
		return
	}
	n.health.set(needCRDs, nil)
	n.watch.runIdentities(ctx)
	var synced []cache.InformerSynced
	for _, informer := range n.watch.all() {
		synced = append(synced, informer.HasSynced)
	}
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return
	}
	close(n.filled)
	n.health.set(needCaches, nil)
	// Loading needs several times the memory of what is kept; give the rest back now.
	debug.FreeOSMemory()
	n.logs.Main.Info("caches are filled")
}

// crdPoll is how often missing definitions are looked for.
const crdPoll = 5 * time.Second

// waitForCRDs waits until the cluster has our resources. It reports false when ctx ended first.
func (n *node) waitForCRDs(ctx context.Context) bool {
	for {
		err := n.watch.checkCRDs(ctx)
		if err == nil {
			return true
		}
		n.health.set(needCRDs, err)
		n.logs.Main.Warn("waiting for the custom resource definitions", zap.Error(err))
		select {
		case <-time.After(crdPoll):
		case <-ctx.Done():
			return false
		}
	}
}

// keepRules looks after the rules until ctx ends.
func (n *node) keepRules(ctx context.Context) {
	ticker := time.NewTicker(n.cfg.SyncInterval)
	defer ticker.Stop()
	n.health.set(needRules, nil) // they have just been installed
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
			n.health.set(needRules, err)
		}
	}
}

// watchFailed counts what client-go logs itself.
func (n *node) watchFailed(ctx context.Context, r *cache.Reflector, err error) {
	n.metrics.APIFailed(telemetry.APIWatch)
	cache.DefaultWatchErrorHandler(ctx, r, err)
	if apierrors.IsForbidden(err) {
		n.health.explain(needCaches, fmt.Errorf("%w; the ClusterRole of the chart allows it, if its operationMode is %s", err, strings.ToLower(n.cfg.OperationMode)))
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
