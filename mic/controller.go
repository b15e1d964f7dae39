package mic

import (
	"context"
	"fmt"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/flowcontrol"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/internal/retry"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/ledger"
)

// Machines is what is asked of Azure; see [azure.Client] and [azure.Reloading]. Failures are *azure.Error.
type Machines interface {
	Get(ctx context.Context, r azure.Resource) (azure.State, error)
	Begin(ctx context.Context, r azure.Resource, basis azure.State, add, remove []string) (*azure.Operation, error)
	Resume(ctx context.Context, r azure.Resource, token string) (*azure.Operation, error)
	// OwnIdentities are client IDs, or resource IDs, of identities that the cluster itself lives by.
	OwnIdentities() []string
}

// Deps are what a Controller works with.
type Deps struct {
	Kube     *rest.Config // its rate limits are set from the Config
	Machines Machines
	Log      *zap.Logger
	Registry prometheus.Registerer
}

// Controller is MIC while it leads.
type Controller struct {
	cfg        Config
	rules      identity.Rules
	arm        Machines
	log        *zap.Logger
	metrics    *metrics
	crds       rest.Interface
	configMaps typedcorev1.ConfigMapInterface
	cluster    *Cluster
	fleet      *Tracker
	events     record.EventBroadcaster
	recorder   record.EventRecorder
	told       *lru.Cache[string, string]
	arrivals   arrivals
	drain      bool          // nothing is wanted any more; see Uninstall
	loaded     chan struct{} // closed once all pods have been counted

	pods, machines, bindings *queue
}

// New prepares a Controller; Run makes it work, once.
func New(cfg Config, deps Deps) (*Controller, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	scheme.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Pod{}, &corev1.PodList{}, &corev1.Node{}, &corev1.NodeList{}, &corev1.Namespace{}, &corev1.NamespaceList{})
	if err := v1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	config := rest.CopyConfig(deps.Kube)
	// One budget for all that MIC does; see the README for how it was chosen.
	config.RateLimiter = flowcontrol.NewTokenBucketRateLimiter(cfg.QPS, cfg.Burst)
	c := &Controller{
		cfg: cfg, arm: deps.Machines, log: deps.Log, loaded: make(chan struct{}),
		// Whether a Secret may be used is NMI's to say, which reads it.
		rules: identity.Rules{Mode: identity.Standard, ForceNamespaced: cfg.ForceNamespaced, AllowCrossNamespaceSecrets: true},
	}
	core, err := kube.Client(config, scheme, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf)
	if err != nil {
		return nil, err
	}
	if c.crds, err = kube.Client(config, scheme, v1.GroupVersion, "/apis", runtime.ContentTypeJSON); err != nil {
		return nil, err
	}
	if c.cluster, err = newCluster(core, c.crds); err != nil {
		return nil, err
	}
	client, err := typedcorev1.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	c.configMaps = client.ConfigMaps(cfg.Namespace)
	if c.told, err = lru.New[string, string](toldKept); err != nil {
		return nil, err
	}
	c.fleet = newFleet(c.wakePod, func(key string, after time.Duration) { c.machines.AddAfter(key, after) })
	if c.metrics, err = newMetrics(deps.Registry, c.fleet.SetAsideCount); err != nil {
		return nil, err
	}
	c.makeEvents(client)
	c.pods = newQueue("pods", cfg.Workers, c.log, c.reconcilePod)
	c.machines = newQueue("machines", machineWorkers, c.log, c.reconcileMachine)
	c.bindings = newQueue("bindings", 1, c.log, c.reconcileBinding)
	return c, c.listen()
}

// machineWorkers is how many machines are worked on at the same time. Each may take Azure a minute, or not answer at
// all, without the others being held up. A worker costs some kilobytes.
const machineWorkers = 256

func (c *Controller) wakePod(key string) { c.pods.Add(key) }

// Run is one term as the leader: it loads what there is, and works until ctx ends. Everything that it began has ended
// when it returns; an update that Azure has under way is in the ledger.
func (c *Controller) Run(ctx context.Context) error {
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.metrics.leader()
	defer c.events.Shutdown()
	defer c.shutDownQueues()
	c.persist(ctx, c.checkDefinitions)
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

// askAgain has all machines looked at without the pauses that failures brought: Azure is asked in another way now.
func (c *Controller) askAgain() {
	for _, key := range c.fleet.Keys() {
		c.fleet.SetRetryAfter(key, 0)
		c.machines.Add(key)
	}
}

// persist does what has to be done before anything else, until it succeeds or ctx ends.
func (c *Controller) persist(ctx context.Context, do func(context.Context) error) {
	_ = retry.UntilSuccess(ctx, transientBackoff, do, func(err error) { c.log.Warn("cannot begin yet", zap.Error(err)) })
}

// checkDefinitions asks whether the cluster has our resources. The predecessor's definition of AzureAssignedIdentity has
// no status subresource, so that no state could be written.
func (c *Controller) checkDefinitions(ctx context.Context) error {
	var list metav1.APIResourceList
	if err := c.crds.Get().AbsPath("/apis/" + v1.GroupVersion.String()).Do(ctx).Into(&list); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("asking the API server for its resources: %w", err)
	}
	served := map[string]bool{}
	for _, r := range list.APIResources {
		served[r.Name] = true
	}
	for _, r := range []string{v1.AzureIdentities, v1.AzureIdentityBindings, v1.AzureAssignedIdentities, v1.AzureAssignedIdentities + "/status"} {
		if !served[r] {
			return fmt.Errorf("the cluster does not have %s of %s; install the custom resource definitions of the chart, in place of the predecessor's: helm show crds CHART | kubectl apply --server-side --force-conflicts -f -", r, v1.GroupName)
		}
	}
	return nil
}

// load counts all pods and finds all ledgers before anything is done, so that nothing that is in use is taken for
// unused.
func (c *Controller) load(ctx context.Context) {
	var ids []string
	c.persist(ctx, func(ctx context.Context) (err error) {
		ids, err = ledger.Machines(ctx, c.configMaps)
		return err
	})
	if ctx.Err() != nil {
		return
	}
	for _, id := range ids {
		r, err := azure.ParseID(id)
		if err != nil {
			c.log.Error("a ledger names no machine; delete its ConfigMap if it is of no use", zap.String(keyMachine, id), zap.Error(err))
			continue
		}
		c.fleet.Add(r.Key(), r)
	}
	for _, o := range c.cluster.pods.GetIndexer().List() {
		if p, ok := o.(*Pod); ok {
			c.count(p.Key(), c.desired(p))
		}
	}
	for _, key := range c.fleet.Keys() {
		c.machines.Add(key)
	}
	c.arrivals.open()
	close(c.loaded)
	c.log.Info("loaded what there is", zap.Int("machines", len(c.fleet.Keys())), zap.Int("ledgers", len(ids)))
}

// listen makes each event wake what it touches. Handlers run as soon as the caches are filled, the queues later.
func (c *Controller) listen() error {
	podsWith := func(index, value string) {
		keys, _ := c.cluster.pods.GetIndexer().IndexKeys(index, value) // the index exists
		for _, key := range keys {
			c.pods.Add(key)
		}
	}
	bindingsOf := func(identity string) {
		for _, b := range kube.ByIndex[*Binding](c.cluster.bindings, byIdentity, identity) {
			c.bindings.Add(b.Key())
			podsWith(bySelector, b.Value.Selector)
		}
	}
	handlers := map[cache.SharedIndexInformer]cache.ResourceEventHandler{
		c.cluster.pods: kube.TypedHandler(func(old, now *Pod) {
			if now != nil && now.Node != "" && !now.Finished && (old == nil || old.Node == "") {
				c.arrivals.begin(now.Key())
			}
			c.pods.Add(kube.Newest(old, now).Key())
		}),
		c.cluster.nodes: kube.TypedHandler(func(old, now *Node) {
			if old != nil && now != nil && old.MachineKey == now.MachineKey && old.Problem == now.Problem {
				return
			}
			name := kube.Newest(old, now).Name
			podsWith(byNode, name)
			for _, a := range kube.ByIndex[*Assignment](c.cluster.assignments, byNode, name) {
				c.pods.Add(a.Pod)
			}
		}),
		c.cluster.namespaces: kube.TypedHandler(func(_, now *Namespace) {
			if now != nil && now.Terminating {
				for _, a := range kube.ByIndex[*Assignment](c.cluster.assignments, cache.NamespaceIndex, now.Name) {
					c.pods.Add(a.Pod)
				}
			}
		}),
		c.cluster.identities: kube.TypedHandler(func(old, now *AzureIdentity) {
			if old != nil && now != nil && old.ResourceVersion != now.ResourceVersion {
				c.fleet.RetryRefused(now.ResourceID)
			}
			bindingsOf(kube.Newest(old, now).Key())
		}),
		c.cluster.bindings: kube.TypedHandler(func(old, now *Binding) {
			for _, b := range []*Binding{old, now} {
				if b != nil {
					podsWith(bySelector, b.Value.Selector)
				}
			}
			c.bindings.Add(kube.Newest(old, now).Key())
		}),
		c.cluster.assignments: kube.TypedHandler(func(old, now *Assignment) {
			c.cluster.recordObserved(kube.Newest(old, now), now == nil)
			c.pods.Add(kube.Newest(old, now).Pod)
		}),
	}
	for informer, handle := range handlers {
		if err := informer.SetWatchErrorHandlerWithContext(c.watchFailed); err != nil {
			return err
		}
		_, err := informer.AddEventHandler(handle)
		if err != nil {
			return fmt.Errorf("listening to the cluster: %w", err)
		}
	}
	return nil
}

// watchFailed counts what client-go logs itself.
func (c *Controller) watchFailed(ctx context.Context, r *cache.Reflector, err error) {
	c.metrics.apiFailed("watch")
	cache.DefaultWatchErrorHandler(ctx, r, err)
}
