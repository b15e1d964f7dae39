package mic

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/internal/retry"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/cluster"
	"github.com/podidentity/podidentity/mic/ledger"
	"github.com/podidentity/podidentity/mic/telemetry"
	"github.com/podidentity/podidentity/mic/usage"
)

// Machines calls Azure Resource Manager. [azure.Reloading] implements it. Its methods return errors of type
// *azure.Error.
type Machines interface {
	Get(ctx context.Context, r azure.Resource) (azure.State, error)
	Begin(ctx context.Context, r azure.Resource, basis azure.State, add, remove []string) (*azure.Operation, error)
	Resume(ctx context.Context, r azure.Resource, token string) (*azure.Operation, error)
	// OwnIdentities returns the client IDs or resource IDs of the identities that MIC's configuration for Azure names. MIC
	// must never detach them, because MIC itself or the kubelet uses them.
	OwnIdentities() []string
}

// Deps are the dependencies of a Controller.
type Deps struct {
	Kube     *rest.Config // New uses a copy with the rate limits of the Config
	Machines Machines
	Log      *zap.Logger
	Registry prometheus.Registerer
}

// Controller does the work of the MIC that is the leader. It connects the parts: events requeue pods, the reconcile of
// a pod requeues its machine, and the reconcile of a machine requeues the pods that wait for it.
type Controller struct {
	log        *zap.Logger
	crds       rest.Interface
	configMaps typedcorev1.ConfigMapInterface
	cluster    *cluster.Cluster
	usage      *usage.Tracker
	report     *telemetry.Reporter
	metrics    *telemetry.Metrics
	timer      *telemetry.AssignmentTimer
	loaded     chan struct{} // closed once the demands of all pods are recorded

	podReconciler     *podReconciler
	machineReconciler *machineReconciler

	pods, machines, bindings *queue
}

// machineWorkers is how many machines are reconciled concurrently at most. Azure may take a minute to update a
// machine, or may not respond at all, and the other machines must not wait. A worker costs some kilobytes.
const machineWorkers = 256

// New returns a Controller. Its method Run must be called at most once.
func New(cfg Config, deps Deps) (*Controller, error) { return newController(cfg, deps, false) }

// newController returns a Controller. If drain is true, the Controller does the work of an uninstall; see Uninstall.
func newController(cfg Config, deps Deps, drain bool) (*Controller, error) {
	c := &Controller{log: deps.Log, timer: &telemetry.AssignmentTimer{}, loaded: make(chan struct{})}
	config := rest.CopyConfig(deps.Kube)
	// All requests of the Controller to the API server share one rate limit. docs/performance.md says how its default was
	// chosen.
	config.RateLimiter = flowcontrol.NewTokenBucketRateLimiter(cfg.QPS, cfg.Burst)
	core, crds, err := newClients(config)
	if err != nil {
		return nil, err
	}
	c.crds = crds
	// MIC does not check the namespaces of Secrets: NMI reads the Secrets, and decides whether an identity may name a
	// Secret in another namespace.
	rules := identity.Rules{Mode: identity.Standard, ForceNamespaced: cfg.ForceNamespaced, AllowCrossNamespaceSecrets: true}
	if c.cluster, err = cluster.New(core, crds, cluster.Options{Rules: rules, Drain: drain}); err != nil {
		return nil, err
	}
	client, err := typedcorev1.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	c.configMaps = client.ConfigMaps(cfg.Namespace)
	c.usage = usage.New(usage.Requeue{
		Pod:     func(key string) { c.pods.Add(key) },
		Machine: func(key string, after time.Duration) { c.machines.AddAfter(key, after) },
	})
	if c.metrics, err = telemetry.NewMetrics(deps.Registry, c.usage.SetAsideCount); err != nil {
		return nil, err
	}
	if c.report, err = telemetry.NewReporter(client, deps.Log); err != nil {
		return nil, err
	}
	c.podReconciler = &podReconciler{
		cluster: c.cluster, usage: c.usage, writer: cluster.NewWriter(crds, c.cluster, c.metrics), report: c.report, timer: c.timer, metrics: c.metrics,
	}
	c.machineReconciler = &machineReconciler{
		interval: cfg.ReconcileInterval, detachDelay: cfg.DetachDelay, immutable: cfg.Immutable, drain: drain,
		usage: c.usage, ledgers: c.configMaps, cluster: c.cluster, report: c.report, metrics: c.metrics, machines: map[string]*machine{},
		updater: &updater{
			arm: deps.Machines, cluster: c.cluster, interval: cfg.ReconcileInterval,
			requeuePod: func(key string) { c.pods.Add(key) }, log: deps.Log,
		},
	}
	c.pods = newQueue("pods", cfg.Workers, c.log, c.podReconciler.reconcile)
	c.machines = newQueue("machines", machineWorkers, c.log, c.machineReconciler.reconcile)
	c.bindings = newQueue("bindings", 1, c.log, (&bindingReconciler{c.cluster, c.report}).reconcile)
	return c, c.cluster.Handle(cluster.Handlers{
		Pod:            func(key string) { c.pods.Add(key) },
		Binding:        func(key string) { c.bindings.Add(key) },
		PodScheduled:   c.timer.Scheduled,
		IdentityEdited: c.usage.RetryRefused,
		WatchFailed:    func() { c.metrics.APIFailed(telemetry.WatchOperation) },
	})
}

// newClients returns clients for the core resources and for the custom resources.
func newClients(config *rest.Config) (core, crds rest.Interface, err error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	scheme.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Pod{}, &corev1.PodList{}, &corev1.Node{}, &corev1.NodeList{}, &corev1.Namespace{}, &corev1.NamespaceList{})
	if err := v1.AddToScheme(scheme); err != nil {
		return nil, nil, err
	}
	if core, err = kube.Client(config, scheme, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf); err != nil {
		return nil, nil, err
	}
	crds, err = kube.Client(config, scheme, v1.GroupVersion, "/apis", runtime.ContentTypeJSON)
	return core, crds, err
}

// Run does the work of the leader: it loads the cluster, and reconciles until ctx ends. When it returns, all goroutines
// that it started have ended. An update that Azure has in progress is then in the ledger.
func (c *Controller) Run(ctx context.Context) error {
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.metrics.BecameLeader()
	defer c.report.Shutdown()
	defer c.shutDownQueues()
	c.untilSuccess(ctx, c.checkDefinitions)
	if !c.cluster.Run(ctx, &wait) {
		return nil
	}
	c.load(ctx)
	for _, q := range []*queue{c.pods, c.machines, c.bindings} {
		wait.Go(func() { q.run(ctx) })
	}
	<-ctx.Done()
	return nil
}

func (c *Controller) shutDownQueues() {
	for _, q := range []*queue{c.pods, c.machines, c.bindings} {
		q.ShutDown()
	}
}

// reconcileAll requeues all machines and ends their delays after failures. It is called when the configuration for
// Azure has changed, which may have removed the cause of the failures.
func (c *Controller) reconcileAll() {
	for _, key := range c.usage.Keys() {
		if m := c.usage.Machine(key); m != nil {
			m.SetRetryAfter(0)
		}
		c.machines.Add(key)
	}
}

// untilSuccess calls do until it succeeds or ctx ends, and logs each failure. It is for the steps before the first
// reconcile.
func (c *Controller) untilSuccess(ctx context.Context, do func(context.Context) error) {
	_ = retry.UntilSuccess(ctx, transientBackoff, do, func(err error) { c.log.Warn("MIC cannot start to reconcile yet; it retries", zap.Error(err)) })
}

// checkDefinitions checks that the API server serves the custom resources and the status subresource of
// AzureAssignedIdentity. The CRDs of AAD Pod Identity do not have this subresource, and without it MIC cannot write the
// state of an assignment.
func (c *Controller) checkDefinitions(ctx context.Context) error {
	var list metav1.APIResourceList
	if err := c.crds.Get().AbsPath("/apis/" + v1.GroupVersion.String()).Do(ctx).Into(&list); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("listing the resources of the API server: %w", err)
	}
	served := map[string]bool{}
	for _, r := range list.APIResources {
		served[r.Name] = true
	}
	for _, r := range []string{v1.AzureIdentities, v1.AzureIdentityBindings, v1.AzureAssignedIdentities, v1.AzureAssignedIdentities + "/status"} {
		if !served[r] {
			return fmt.Errorf("the cluster does not have %s of %s; install the custom resource definitions of the chart, which replace those of AAD Pod Identity: helm show crds CHART | kubectl apply --server-side --force-conflicts -f -", r, v1.GroupName)
		}
	}
	return nil
}

// load records the demands of all pods and finds all ledgers. It runs before the first reconcile, so that MIC does not
// treat an identity in use as unused.
func (c *Controller) load(ctx context.Context) {
	var ids []string
	c.untilSuccess(ctx, func(ctx context.Context) (err error) {
		ids, err = ledger.Machines(ctx, c.configMaps)
		return err
	})
	if ctx.Err() != nil {
		return
	}
	for _, id := range ids {
		r, err := azure.ParseID(id)
		if err != nil {
			c.log.Error("a ledger does not contain the ID of a machine; MIC does not detach the identities in this ledger until a pod needs an identity on its machine; find the ConfigMap of the ledger by the label podidentity.io/ledger, correct the value of its key 'machine', and restart MIC; if you delete the ConfigMap instead, MIC no longer knows that it attached these identities, and does not detach them", zap.String(telemetry.KeyMachine, id), zap.Error(err))
			continue
		}
		c.usage.Add(r.Key(), r)
	}
	for _, p := range c.cluster.Pods() {
		c.podReconciler.setDemands(p.Key(), c.cluster.Desired(p))
	}
	for _, key := range c.usage.Keys() {
		c.machines.Add(key)
	}
	c.timer.Start()
	close(c.loaded)
	c.log.Info("loaded the cluster and the ledgers", zap.Int("machines", len(c.usage.Keys())), zap.Int("ledgers", len(ids)))
}
