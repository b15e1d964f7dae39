package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"strconv"
	"time"

	"go.uber.org/zap"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/nmi/health"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// Names of the indexes: pods by each of their addresses and by UID, bindings by what they select (see bindingBuckets).
const (
	byIP       = "ip"
	byUID      = "uid"
	bySelector = "selector"
)

// bindingBuckets is how many values the index of bindings has. Each takes the library some 500 bytes, so one for each of
// thousands of selectors would be a quarter of the heap; the few bindings that share one are told apart when it is read.
const bindingBuckets = 1024

// Watch holds what this node has to know of the cluster: the pods of the node, all identities, bindings and exceptions,
// and in standard mode the assignments on the node, each cut down to what is read. Objects in its caches are shared: they
// must not be changed.
//
// It stands on client-go's informers with a scheme of two groups instead of a client for all of Kubernetes, because the
// memory of a node agent is paid on every node.
type Watch struct {
	core, crds                             rest.Interface
	node                                   string
	rules                                  identity.Rules
	seed                                   maphash.Seed // see bindingBucket
	pods, identities, bindings, exceptions cache.SharedIndexInformer
	assignments                            cache.SharedIndexInformer // nil in managed mode
	changed                                Broadcast                 // after each event about a pod
	Notifier                               Notifier                  // told in standard mode only
	reconnector                            *reconnector
	failed                                 func(operation string)
	health                                 *health.Health
	log                                    *zap.Logger
	synced                                 chan struct{} // closed once all caches have been synced
}

// Callbacks is who is told of changes. The functions are called after the caches have changed, and must not block.
type Callbacks struct {
	PodGone         func(uid string)
	IdentityChanged func(old identity.Identity) // or gone
	Failed          func(operation string)      // a question to the API server brought no answer
}

// Config says what is watched.
type Config struct {
	API       *rest.Config
	Node      string
	Rules     identity.Rules
	Callbacks Callbacks
	Health    *health.Health // is told what of the cluster is missing
	Log       *zap.Logger
}

// New prepares the caches; Run fills them.
func New(cfg Config) (*Watch, error) {
	tell, rules, config := cfg.Callbacks, cfg.Rules, cfg.API
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	scheme.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Pod{}, &corev1.PodList{}, &corev1.Node{}, &corev1.Secret{}, &corev1.SecretList{}, &corev1.Event{})
	scheme.AddKnownTypes(authenticationv1.SchemeGroupVersion, &authenticationv1.TokenRequest{})
	if err := v1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	w := &Watch{node: cfg.Node, rules: rules, seed: maphash.MakeSeed(), health: cfg.Health, log: cfg.Log, failed: tell.Failed, synced: make(chan struct{})}
	var err error
	if w.core, err = kube.Client(config, scheme, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf); err != nil {
		return nil, err
	}
	if w.crds, err = kube.Client(config, scheme, v1.GroupVersion, "/apis", runtime.ContentTypeJSON); err != nil {
		return nil, err
	}

	w.reconnector = newReconnector(func(ctx context.Context) error { return w.core.Get().AbsPath("/readyz").Do(ctx).Error() }, func() { tell.Failed(telemetry.APIWatch) })
	source := func(c rest.Interface, resource string, which fields.Selector) *cache.ListWatch {
		return w.reconnector.wrap(resource, cache.NewListWatchFromClient(c, resource, metav1.NamespaceAll, which))
	}
	mine := fields.OneTermEqualSelector("spec.nodeName", cfg.Node)
	w.pods = cache.NewSharedIndexInformer(source(w.core, "pods", mine), &corev1.Pod{}, 0, PodIndexers())
	w.identities = cache.NewSharedIndexInformer(source(w.crds, v1.AzureIdentities, fields.Everything()), &v1.AzureIdentity{}, 0, cache.Indexers{})
	w.bindings = cache.NewSharedIndexInformer(source(w.crds, v1.AzureIdentityBindings, fields.Everything()), &v1.AzureIdentityBinding{}, 0,
		cache.Indexers{bySelector: w.bindingSelector})
	w.exceptions = cache.NewSharedIndexInformer(source(w.crds, v1.AzurePodIdentityExceptions, fields.Everything()), &v1.AzurePodIdentityException{}, 0,
		cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	if rules.Mode == identity.Standard {
		if err := w.watchAssignments(); err != nil {
			return nil, err
		}
	}
	for _, informer := range w.All() {
		if err := errors.Join(informer.SetTransform(trim), informer.SetWatchErrorHandlerWithContext(w.watchFailed)); err != nil {
			return nil, err
		}
	}
	_, podsErr := w.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { w.changed.Send() },
		UpdateFunc: func(_, o any) {
			if pod, ok := o.(*corev1.Pod); ok && finished(pod) {
				tell.PodGone(string(pod.UID))
			}
			w.changed.Send()
		},
		DeleteFunc: func(o any) {
			if pod, ok := LastState(o).(*corev1.Pod); ok {
				tell.PodGone(string(pod.UID))
			}
			w.changed.Send()
		},
	})
	_, identitiesErr := w.identities.AddEventHandler(cache.ResourceEventHandlerFuncs{
		UpdateFunc: func(old, now any) {
			before, after := old.(*Kept[identity.Identity]).Value, now.(*Kept[identity.Identity]).Value
			if !before.Equal(after) {
				tell.IdentityChanged(before)
			}
		},
		DeleteFunc: func(o any) {
			if gone, ok := LastState(o).(*Kept[identity.Identity]); ok {
				tell.IdentityChanged(gone.Value)
			}
		},
	})
	return w, errors.Join(podsErr, identitiesErr)
}

// LastState is the object of a deletion. One that the watch missed comes as a tombstone with the last state known.
func LastState(o any) any {
	if tombstone, ok := o.(cache.DeletedFinalStateUnknown); ok {
		return tombstone.Obj
	}
	return o
}

func (w *Watch) All() []cache.SharedIndexInformer {
	all := []cache.SharedIndexInformer{w.pods, w.identities, w.bindings, w.exceptions}
	if w.assignments != nil {
		all = append(all, w.assignments)
	}
	return all
}

// RunPods and runIdentities fill the caches until ctx ends. They are apart because the custom resources may be missing
// from the cluster for a while; see waitForCRDs.
func (w *Watch) RunPods(ctx context.Context) { go w.pods.RunWithContext(ctx) }

func (w *Watch) RunIdentities(ctx context.Context) {
	for _, informer := range w.All()[1:] {
		go informer.RunWithContext(ctx)
	}
}

// Pod returns the pod of this UID if the cache has it and it is not finished.
func (w *Watch) Pod(uid string) (*corev1.Pod, bool) {
	found, err := w.pods.GetIndexer().ByIndex(byUID, uid)
	if err != nil || len(found) != 1 || finished(found[0].(*corev1.Pod)) {
		return nil, false
	}
	return found[0].(*corev1.Pod), true
}

// Latest returns the pod as the cache has it now. One that is not in the cache was found by a question to the API
// server, or has gone, and then nobody is left who waits for what it may have.
func (w *Watch) Latest(pod *corev1.Pod) *corev1.Pod {
	if now, ok := w.Pod(string(pod.UID)); ok {
		return now
	}
	return pod
}

// Stale names a watch that hears nothing at the moment; what it knows may be old. "" if all do.
func (w *Watch) StaleWatch() string { return w.reconnector.staleWatch() }

// StaleCount is how many watches hear nothing at the moment.
func (w *Watch) StaleWatches() int { return w.reconnector.staleWatches() }

// Secret is where one Secret is watched.
func (w *Watch) Secret(ref token.Ref) *cache.ListWatch {
	return w.reconnector.wrap("", cache.NewListWatchFromClient(w.core, "secrets", ref.Namespace, fields.OneTermEqualSelector(metav1.ObjectNameField, ref.Name)))
}

// ReadSecret asks the API server for a Secret.
func (w *Watch) ReadSecret(ctx context.Context, ref token.Ref) (*corev1.Secret, error) {
	var secret corev1.Secret
	err := w.core.Get().Namespace(ref.Namespace).Resource("secrets").Name(ref.Name).Do(ctx).Into(&secret)
	return &secret, w.countFailure(telemetry.APIReadSecret, err)
}

// countFailure notes a question that failed.
func (w *Watch) countFailure(operation string, err error) error {
	if err != nil {
		w.failed(operation)
	}
	return err
}

// WriteEvent creates an Event, or replaces the one of its name, which was written before.
func (w *Watch) WriteEvent(ctx context.Context, e *corev1.Event) error {
	events := func(r *rest.Request) *rest.Request { return r.Namespace(e.Namespace).Resource("events") }
	if e.Count > 1 {
		patch, err := json.Marshal(map[string]any{"count": e.Count, "lastTimestamp": e.LastTimestamp})
		if err != nil {
			return err
		}
		err = events(w.core.Patch(types.MergePatchType)).Name(e.Name).Body(patch).Do(ctx).Error()
		if !apierrors.IsNotFound(err) {
			return w.countFailure(telemetry.APIWriteEvent, err)
		}
	}
	return w.countFailure(telemetry.APIWriteEvent, events(w.core.Post()).Body(e).Do(ctx).Error())
}

// RequestToken asks the API server for a token of a ServiceAccount.
func (w *Watch) RequestToken(ctx context.Context, namespace, serviceAccount string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	var answer authenticationv1.TokenRequest
	err := w.core.Post().Namespace(namespace).Resource("serviceaccounts").Name(serviceAccount).SubResource("token").Body(r).Do(ctx).Into(&answer)
	return &answer, w.countFailure(telemetry.APIRequestToken, err)
}

// Facts collects what the decision needs to know about the pod.
func (w *Watch) Facts(pod *corev1.Pod) (identity.Facts, error) {
	var facts identity.Facts
	exceptions, err := w.exceptions.GetIndexer().ByIndex(cache.NamespaceIndex, pod.Namespace)
	if err != nil {
		return facts, err
	}
	for _, o := range exceptions {
		facts.Exceptions = append(facts.Exceptions, o.(*Kept[identity.Exception]).Value)
	}
	label := pod.Labels[v1.BindingLabel]
	bindings, err := w.bindings.GetIndexer().ByIndex(bySelector, w.bindingBucket(pod.Namespace, label))
	if err != nil {
		return facts, err
	}
	for _, o := range bindings {
		b := o.(*Kept[identity.Binding]).Value
		if b.Selector != label || b.Namespace != pod.Namespace && !w.crossesNamespaces() {
			continue
		}
		facts.Bindings = append(facts.Bindings, b)
		found, ok, err := w.identities.GetIndexer().GetByKey(b.Namespace + "/" + b.AzureIdentity)
		if err != nil {
			return facts, err
		}
		if ok {
			facts.Identities = append(facts.Identities, found.(*Kept[identity.Identity]).Value)
		}
	}
	if w.assignments == nil {
		return facts, nil
	}
	assignments, err := w.assignmentsOf(pod)
	for _, o := range assignments {
		facts.Assignments = append(facts.Assignments, o.(*Kept[assignment]).Value.Assignment)
	}
	return facts, err
}

// livePods asks the API server itself for the pods of this node.
func (w *Watch) livePods(ctx context.Context) ([]*corev1.Pod, error) {
	var list corev1.PodList
	err := w.core.Get().Resource("pods").Param("fieldSelector", fields.OneTermEqualSelector("spec.nodeName", w.node).String()).Do(ctx).Into(&list)
	if w.countFailure(telemetry.APIListPods, err) != nil {
		return nil, fmt.Errorf("listing the pods of node %s: %w", w.node, err)
	}
	pods := make([]*corev1.Pod, len(list.Items))
	for i := range list.Items {
		pods[i] = &list.Items[i]
	}
	return pods, nil
}

// finished reports whether all of the pod's containers are done for good. Its address may be another pod's already.
func finished(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// podIPs indexes a pod by the addresses that are its own: not those of a pod in the host's network, which are the
// node's, nor those of a finished one.
func podIPs(o any) ([]string, error) {
	pod, ok := o.(*corev1.Pod)
	if !ok || pod.Spec.HostNetwork || finished(pod) {
		return nil, nil
	}
	var ips []string
	add := func(text string) {
		if ip, err := netip.ParseAddr(text); err == nil {
			ips = append(ips, ip.Unmap().String())
		}
	}
	for _, ip := range pod.Status.PodIPs {
		add(ip.IP)
	}
	if len(pod.Status.PodIPs) == 0 {
		add(pod.Status.PodIP)
	}
	return ips, nil
}

// PodIndexers are the indexes of pods: by each of their addresses, and by UID.
func PodIndexers() cache.Indexers { return cache.Indexers{byIP: podIPs, byUID: podUID} }

func podUID(o any) ([]string, error) {
	pod, ok := o.(*corev1.Pod)
	if !ok {
		return nil, nil
	}
	return []string{string(pod.UID)}, nil
}

func (w *Watch) bindingSelector(o any) ([]string, error) {
	b, ok := o.(*Kept[identity.Binding])
	if !ok {
		return nil, nil
	}
	return []string{w.bindingBucket(b.Value.Namespace, b.Value.Selector)}, nil
}

// bindingBucket is what bindings are indexed by: a hash of their selector, and of their namespace unless they match
// across namespaces. Its seed is this process's own, so nobody can make bindings that all fall on another's value.
func (w *Watch) bindingBucket(namespace, selector string) string {
	var h maphash.Hash
	h.SetSeed(w.seed)
	if !w.crossesNamespaces() {
		_, _ = h.WriteString(namespace) // has no error
		_ = h.WriteByte('/')
	}
	_, _ = h.WriteString(selector)
	return strconv.FormatUint(h.Sum64()%bindingBuckets, 10)
}

// crossesNamespaces reports whether bindings match pods of other namespaces than their own.
func (w *Watch) crossesNamespaces() bool {
	return w.rules.Mode == identity.Standard && !w.rules.ForceNamespaced
}

// kept is what the caches hold of a custom resource: what the decision reads, and what the informer needs to know the
// object by. The whole object would take four times the memory, and a cluster may have many thousands.
type Kept[T any] struct {
	Value                    T
	namespace, name, version string
}

// GetObjectMeta makes kept an object for the informer.
func (k *Kept[T]) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Namespace: k.namespace, Name: k.name, ResourceVersion: k.version}
}

func Keep[T any](o metav1.Object, value T) *Kept[T] {
	return &Kept[T]{value, o.GetNamespace(), o.GetName(), o.GetResourceVersion()}
}

// trim cuts an object down to what is read here, before it is kept. It leaves alone what it has cut already.
func trim(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Pod:
		o.ObjectMeta = metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion, Labels: o.Labels}
		o.Spec = corev1.PodSpec{NodeName: o.Spec.NodeName, HostNetwork: o.Spec.HostNetwork, ServiceAccountName: o.Spec.ServiceAccountName}
		o.Status = corev1.PodStatus{Phase: o.Status.Phase, PodIP: o.Status.PodIP, PodIPs: o.Status.PodIPs}
	case *v1.AzureIdentity:
		return Keep(o, identity.FromAzureIdentity(o)), nil
	case *v1.AzureIdentityBinding:
		return Keep(o, identity.FromAzureIdentityBinding(o)), nil
	case *v1.AzurePodIdentityException:
		return Keep(o, identity.FromAzurePodIdentityException(o)), nil
	case *v1.AzureAssignedIdentity:
		return Keep(o, assignment{identity.FromAzureAssignedIdentity(o), time.Now()}), nil
	}
	return o, nil
}
