package nmi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"strconv"
	"time"

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

// watch holds what this node has to know of the cluster: the pods of the node, all identities, bindings and exceptions,
// and in standard mode the assignments on the node, each cut down to what is read. Objects in its caches are shared: they
// must not be changed.
//
// It stands on client-go's informers with a scheme of two groups instead of a client for all of Kubernetes, because the
// memory of a node agent is paid on every node.
type watch struct {
	core, crds                             rest.Interface
	node                                   string
	rules                                  identity.Rules
	seed                                   maphash.Seed // see bindingBucket
	pods, identities, bindings, exceptions cache.SharedIndexInformer
	assignments                            cache.SharedIndexInformer // nil in managed mode
	changed                                broadcast                 // after each event about a pod
	news                                   news                      // told in standard mode only
	connection                             *connection
	failed                                 func(operation string)
}

// listening is who is told of changes. The functions are called after the caches have changed, and must not block.
type listening struct {
	podGone         func(uid string)
	identityChanged func(old identity.Identity) // or gone
	failed          func(operation string)      // a question to the API server brought no answer
}

// newWatch prepares the caches; run fills them.
func newWatch(config *rest.Config, node string, rules identity.Rules, tell listening) (*watch, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	scheme.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Pod{}, &corev1.PodList{}, &corev1.Node{}, &corev1.Secret{}, &corev1.SecretList{}, &corev1.Event{})
	scheme.AddKnownTypes(authenticationv1.SchemeGroupVersion, &authenticationv1.TokenRequest{})
	if err := v1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	w := &watch{node: node, rules: rules, seed: maphash.MakeSeed(), failed: tell.failed}
	var err error
	if w.core, err = kube.Client(config, scheme, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf); err != nil {
		return nil, err
	}
	if w.crds, err = kube.Client(config, scheme, v1.GroupVersion, "/apis", runtime.ContentTypeJSON); err != nil {
		return nil, err
	}

	w.connection = newConnection(func(ctx context.Context) error { return w.core.Get().AbsPath("/readyz").Do(ctx).Error() }, func() { tell.failed(telemetry.APIWatch) })
	source := func(c rest.Interface, resource string, which fields.Selector) *cache.ListWatch {
		return w.connection.mend(resource, cache.NewListWatchFromClient(c, resource, metav1.NamespaceAll, which))
	}
	mine := fields.OneTermEqualSelector("spec.nodeName", node)
	w.pods = cache.NewSharedIndexInformer(source(w.core, "pods", mine), &corev1.Pod{}, 0, cache.Indexers{byIP: podIPs, byUID: podUID})
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
	for _, informer := range w.all() {
		if err := informer.SetTransform(trim); err != nil {
			return nil, err
		}
	}
	_, podsErr := w.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { w.changed.send() },
		UpdateFunc: func(_, o any) {
			if pod, ok := o.(*corev1.Pod); ok && finished(pod) {
				tell.podGone(string(pod.UID))
			}
			w.changed.send()
		},
		DeleteFunc: func(o any) {
			if pod, ok := lastState(o).(*corev1.Pod); ok {
				tell.podGone(string(pod.UID))
			}
			w.changed.send()
		},
	})
	_, identitiesErr := w.identities.AddEventHandler(cache.ResourceEventHandlerFuncs{
		UpdateFunc: func(old, now any) {
			before, after := old.(*kept[identity.Identity]).value, now.(*kept[identity.Identity]).value
			if !before.Equal(after) {
				tell.identityChanged(before)
			}
		},
		DeleteFunc: func(o any) {
			if gone, ok := lastState(o).(*kept[identity.Identity]); ok {
				tell.identityChanged(gone.value)
			}
		},
	})
	return w, errors.Join(podsErr, identitiesErr)
}

// lastState is the object of a deletion. One that the watch missed comes as a tombstone with the last state known.
func lastState(o any) any {
	if tombstone, ok := o.(cache.DeletedFinalStateUnknown); ok {
		return tombstone.Obj
	}
	return o
}

func (w *watch) all() []cache.SharedIndexInformer {
	all := []cache.SharedIndexInformer{w.pods, w.identities, w.bindings, w.exceptions}
	if w.assignments != nil {
		all = append(all, w.assignments)
	}
	return all
}

// runPods and runIdentities fill the caches until ctx ends. They are apart because the custom resources may be missing
// from the cluster for a while; see waitForCRDs.
func (w *watch) runPods(ctx context.Context) { go w.pods.RunWithContext(ctx) }

func (w *watch) runIdentities(ctx context.Context) {
	for _, informer := range w.all()[1:] {
		go informer.RunWithContext(ctx)
	}
}

// pod returns the pod of this UID if the cache has it and it is not finished.
func (w *watch) pod(uid string) (*corev1.Pod, bool) {
	found, err := w.pods.GetIndexer().ByIndex(byUID, uid)
	if err != nil || len(found) != 1 || finished(found[0].(*corev1.Pod)) {
		return nil, false
	}
	return found[0].(*corev1.Pod), true
}

// latest returns the pod as the cache has it now. One that is not in the cache was found by a question to the API
// server, or has gone, and then nobody is left who waits for what it may have.
func (w *watch) latest(pod *corev1.Pod) *corev1.Pod {
	if now, ok := w.pod(string(pod.UID)); ok {
		return now
	}
	return pod
}

// secret is where one Secret is watched.
func (w *watch) secret(ref token.Ref) *cache.ListWatch {
	return w.connection.mend("", cache.NewListWatchFromClient(w.core, "secrets", ref.Namespace, fields.OneTermEqualSelector(metav1.ObjectNameField, ref.Name)))
}

// readSecret asks the API server for a Secret.
func (w *watch) readSecret(ctx context.Context, ref token.Ref) (*corev1.Secret, error) {
	var secret corev1.Secret
	err := w.core.Get().Namespace(ref.Namespace).Resource("secrets").Name(ref.Name).Do(ctx).Into(&secret)
	return &secret, w.count(telemetry.APIReadSecret, err)
}

// count notes a question that failed.
func (w *watch) count(operation string, err error) error {
	if err != nil {
		w.failed(operation)
	}
	return err
}

// writeEvent creates an Event, or replaces the one of its name, which was written before.
func (w *watch) writeEvent(ctx context.Context, e *corev1.Event) error {
	events := func(r *rest.Request) *rest.Request { return r.Namespace(e.Namespace).Resource("events") }
	if e.Count > 1 {
		patch, err := json.Marshal(map[string]any{"count": e.Count, "lastTimestamp": e.LastTimestamp})
		if err != nil {
			return err
		}
		err = events(w.core.Patch(types.MergePatchType)).Name(e.Name).Body(patch).Do(ctx).Error()
		if !apierrors.IsNotFound(err) {
			return w.count(telemetry.APIWriteEvent, err)
		}
	}
	return w.count(telemetry.APIWriteEvent, events(w.core.Post()).Body(e).Do(ctx).Error())
}

// requestToken asks the API server for a token of a ServiceAccount.
func (w *watch) requestToken(ctx context.Context, namespace, serviceAccount string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	var answer authenticationv1.TokenRequest
	err := w.core.Post().Namespace(namespace).Resource("serviceaccounts").Name(serviceAccount).SubResource("token").Body(r).Do(ctx).Into(&answer)
	return &answer, w.count(telemetry.APIRequestToken, err)
}

// facts collects what the decision needs to know about the pod.
func (w *watch) facts(pod *corev1.Pod) (identity.Facts, error) {
	var facts identity.Facts
	exceptions, err := w.exceptions.GetIndexer().ByIndex(cache.NamespaceIndex, pod.Namespace)
	if err != nil {
		return facts, err
	}
	for _, o := range exceptions {
		facts.Exceptions = append(facts.Exceptions, o.(*kept[identity.Exception]).value)
	}
	label := pod.Labels[v1.BindingLabel]
	bindings, err := w.bindings.GetIndexer().ByIndex(bySelector, w.bindingBucket(pod.Namespace, label))
	if err != nil {
		return facts, err
	}
	for _, o := range bindings {
		b := o.(*kept[identity.Binding]).value
		if b.Selector != label || b.Namespace != pod.Namespace && !w.crossesNamespaces() {
			continue
		}
		facts.Bindings = append(facts.Bindings, b)
		found, ok, err := w.identities.GetIndexer().GetByKey(b.Namespace + "/" + b.AzureIdentity)
		if err != nil {
			return facts, err
		}
		if ok {
			facts.Identities = append(facts.Identities, found.(*kept[identity.Identity]).value)
		}
	}
	if w.assignments == nil {
		return facts, nil
	}
	assignments, err := w.assignmentsOf(pod)
	for _, o := range assignments {
		facts.Assignments = append(facts.Assignments, o.(*kept[assignment]).value.Assignment)
	}
	return facts, err
}

// livePods asks the API server itself for the pods of this node.
func (w *watch) livePods(ctx context.Context) ([]*corev1.Pod, error) {
	var list corev1.PodList
	err := w.core.Get().Resource("pods").Param("fieldSelector", fields.OneTermEqualSelector("spec.nodeName", w.node).String()).Do(ctx).Into(&list)
	if w.count(telemetry.APIListPods, err) != nil {
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

func podUID(o any) ([]string, error) {
	pod, ok := o.(*corev1.Pod)
	if !ok {
		return nil, nil
	}
	return []string{string(pod.UID)}, nil
}

func (w *watch) bindingSelector(o any) ([]string, error) {
	b, ok := o.(*kept[identity.Binding])
	if !ok {
		return nil, nil
	}
	return []string{w.bindingBucket(b.value.Namespace, b.value.Selector)}, nil
}

// bindingBucket is what bindings are indexed by: a hash of their selector, and of their namespace unless they match
// across namespaces. Its seed is this process's own, so nobody can make bindings that all fall on another's value.
func (w *watch) bindingBucket(namespace, selector string) string {
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
func (w *watch) crossesNamespaces() bool {
	return w.rules.Mode == identity.Standard && !w.rules.ForceNamespaced
}

// kept is what the caches hold of a custom resource: what the decision reads, and what the informer needs to know the
// object by. The whole object would take four times the memory, and a cluster may have many thousands.
type kept[T any] struct {
	value                    T
	namespace, name, version string
}

// GetObjectMeta makes kept an object for the informer.
func (k *kept[T]) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Namespace: k.namespace, Name: k.name, ResourceVersion: k.version}
}

func keep[T any](o metav1.Object, value T) *kept[T] {
	return &kept[T]{value, o.GetNamespace(), o.GetName(), o.GetResourceVersion()}
}

// trim cuts an object down to what is read here, before it is kept. It leaves alone what it has cut already.
func trim(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Pod:
		o.ObjectMeta = metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion, Labels: o.Labels}
		o.Spec = corev1.PodSpec{NodeName: o.Spec.NodeName, HostNetwork: o.Spec.HostNetwork, ServiceAccountName: o.Spec.ServiceAccountName}
		o.Status = corev1.PodStatus{Phase: o.Status.Phase, PodIP: o.Status.PodIP, PodIPs: o.Status.PodIPs}
	case *v1.AzureIdentity:
		return keep(o, identity.FromAzureIdentity(o)), nil
	case *v1.AzureIdentityBinding:
		return keep(o, identity.FromAzureIdentityBinding(o)), nil
	case *v1.AzurePodIdentityException:
		return keep(o, identity.FromAzurePodIdentityException(o)), nil
	case *v1.AzureAssignedIdentity:
		return keep(o, assignment{identity.FromAzureAssignedIdentity(o), time.Now()}), nil
	}
	return o, nil
}
