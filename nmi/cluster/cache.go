package cluster

import (
	"errors"
	"hash/maphash"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/tools/cache"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/nmi/health"
)

// Config has the settings of a Cache.
type Config struct {
	Node      string
	Rules     identity.Rules
	Callbacks Callbacks
	Health    *health.Health // receives whether the custom resource definitions and the caches are ready
	Log       *zap.Logger
}

// Callbacks are called after the caches have changed. They must not block.
type Callbacks struct {
	PodGone         func(uid string)            // the pod was deleted, or all of its containers finished
	IdentityChanged func(old identity.Identity) // the AzureIdentity changed or was deleted; old is its previous state
	// HostPodsChanged may be nil. It is called after a change of a pod in the host network, or of an exception.
	HostPodsChanged func()
}

// Cache has the informers of NMI, except those of Secrets. Objects in its caches are shared: callers must not change
// them.
type Cache struct {
	*Client
	cfg                                    Config
	seed                                   maphash.Seed // see bindingBucket
	pods, identities, bindings, exceptions cache.SharedIndexInformer
	assignments                            cache.SharedIndexInformer // nil in managed mode
	podChanged                             Broadcast                 // Send is called after each event of a pod
	notifier                               Notifier                  // is used in standard mode only
	synced                                 chan struct{}             // is closed when all caches have synced
}

// NewCache prepares the informers; Run starts them.
func NewCache(client *Client, cfg Config) (*Cache, error) {
	c := &Cache{Client: client, cfg: cfg, seed: maphash.MakeSeed(), synced: make(chan struct{})}
	c.pods = cache.NewSharedIndexInformer(c.listWatch(c.core, "pods", onNode(cfg.Node)), &corev1.Pod{}, 0, PodIndexers())
	c.identities = cache.NewSharedIndexInformer(c.listWatch(c.crds, v1.AzureIdentities, fields.Everything()), &v1.AzureIdentity{}, 0, cache.Indexers{})
	c.bindings = cache.NewSharedIndexInformer(c.listWatch(c.crds, v1.AzureIdentityBindings, fields.Everything()), &v1.AzureIdentityBinding{}, 0,
		cache.Indexers{bySelector: c.bindingSelector})
	c.exceptions = cache.NewSharedIndexInformer(c.listWatch(c.crds, v1.AzurePodIdentityExceptions, fields.Everything()), &v1.AzurePodIdentityException{}, 0,
		cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	if cfg.Rules.Mode == identity.Standard {
		c.assignments = c.newAssignmentInformer()
		if err := c.notifyOnChanges(); err != nil {
			return nil, err
		}
	}
	for _, informer := range c.informers() {
		if err := errors.Join(informer.SetTransform(trim), informer.SetWatchErrorHandlerWithContext(c.watchFailed)); err != nil {
			return nil, err
		}
	}
	return c, c.registerCallbacks()
}

// registerCallbacks registers event handlers that call the callbacks of the configuration, and wake the waiters of
// podChanged after each event of a pod.
func (c *Cache) registerCallbacks() error {
	callbacks := c.cfg.Callbacks
	_, podsErr := c.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { c.podChanged.Send() },
		UpdateFunc: func(_, o any) {
			if pod, ok := o.(*corev1.Pod); ok && finished(pod) {
				callbacks.PodGone(string(pod.UID))
			}
			c.podChanged.Send()
		},
		DeleteFunc: func(o any) {
			if pod, ok := kube.LastState(o).(*corev1.Pod); ok {
				callbacks.PodGone(string(pod.UID))
			}
			c.podChanged.Send()
		},
	})
	_, identitiesErr := c.identities.AddEventHandler(kube.TypedHandler(func(old, current *trimmed[identity.Identity]) {
		if old != nil && (current == nil || !old.value.Equal(current.value)) {
			callbacks.IdentityChanged(old.value)
		}
	}))
	return errors.Join(podsErr, identitiesErr, registerHostPodsChanged(c.pods, c.exceptions, callbacks.HostPodsChanged))
}

// registerHostPodsChanged registers event handlers that call changed, unless it is nil. See Callbacks.HostPodsChanged.
func registerHostPodsChanged(pods, exceptions cache.SharedIndexInformer, changed func()) error {
	if changed == nil {
		return nil
	}
	_, podsErr := pods.AddEventHandler(kube.TypedHandler(func(old, current *corev1.Pod) {
		if kube.Newest(old, current).Spec.HostNetwork {
			changed()
		}
	}))
	_, exceptionsErr := exceptions.AddEventHandler(kube.TypedHandler(func(_, _ *trimmed[identity.Exception]) { changed() }))
	return errors.Join(podsErr, exceptionsErr)
}

// informers returns all informers, that of the pods first.
func (c *Cache) informers() []cache.SharedIndexInformer {
	all := []cache.SharedIndexInformer{c.pods, c.identities, c.bindings, c.exceptions}
	if c.assignments != nil {
		all = append(all, c.assignments)
	}
	return all
}

// Notifier returns the notifier of changes that a waiting request depends on. In managed mode it notifies of no
// changes.
func (c *Cache) Notifier() *Notifier { return &c.notifier }
