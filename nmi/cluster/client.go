package cluster

import (
	"context"
	"encoding/json"
	"fmt"
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
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// checkTimeout bounds the request for the node and each check of the custom resource definitions. NMI installs the rules
// only after the check of the node. So this check must end soon even if the API server does not respond: on a node that
// has just started, pods reach IMDS directly until the rules are installed.
const checkTimeout = 5 * time.Second

// Client sends requests to the API server. Its watches reconnect together, see reconnector.
type Client struct {
	core, crds  rest.Interface
	node        string
	reconnector *reconnector
	onFailure   func(operation string)
}

// NewClient returns a client for the node of this name. The client calls onFailure each time a request fails, with one
// of the operations of package telemetry (APIWatch and others). It does not call onFailure for failed probes, or for
// failed checks of the node or of the custom resource definitions. For the watch of a Secret it calls onFailure only if
// the API server is unavailable, not if the API server refuses the watch.
func NewClient(config *rest.Config, node string, onFailure func(operation string)) (*Client, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	scheme.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Pod{}, &corev1.PodList{}, &corev1.Node{}, &corev1.Secret{}, &corev1.SecretList{}, &corev1.Event{})
	scheme.AddKnownTypes(authenticationv1.SchemeGroupVersion, &authenticationv1.TokenRequest{})
	if err := v1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	c := &Client{node: node, onFailure: onFailure}
	var err error
	if c.core, err = kube.Client(config, scheme, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf); err != nil {
		return nil, err
	}
	if c.crds, err = kube.Client(config, scheme, v1.GroupVersion, "/apis", runtime.ContentTypeJSON); err != nil {
		return nil, err
	}
	probe := func(ctx context.Context) error { return c.core.Get().AbsPath("/readyz").Do(ctx).Error() }
	c.reconnector = newReconnector(probe, func() { onFailure(telemetry.APIWatch) })
	return c, nil
}

// listWatch returns a reconnecting source of all objects of a resource that match the selector.
func (c *Client) listWatch(from rest.Interface, resource string, selector fields.Selector) *cache.ListWatch {
	return c.reconnector.wrap(resource, cache.NewListWatchFromClient(from, resource, metav1.NamespaceAll, selector))
}

// StaleWatch returns the name of a watch that is disconnected or has not caught up yet, so that its cache may be
// outdated. It returns "" if there is no such watch.
func (c *Client) StaleWatch() string { return c.reconnector.staleWatch() }

// StaleWatches returns the number of watches that are disconnected or have not caught up yet.
func (c *Client) StaleWatches() int { return c.reconnector.staleWatches() }

// SecretListWatch returns a source for an informer of one Secret. The source reconnects, but StaleWatch ignores it: the
// informer may stop while the source is disconnected, and the source would then count as stale for ever.
func (c *Client) SecretListWatch(namespace, name string) *cache.ListWatch {
	return c.reconnector.wrap("", cache.NewListWatchFromClient(c.core, "secrets", namespace, fields.OneTermEqualSelector(metav1.ObjectNameField, name)))
}

// ReadSecret reads a Secret from the API server.
func (c *Client) ReadSecret(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	var secret corev1.Secret
	err := c.core.Get().Namespace(namespace).Resource("secrets").Name(name).Do(ctx).Into(&secret)
	return &secret, c.countFailure(telemetry.APIReadSecret, err)
}

// RequestToken requests a token of a ServiceAccount.
func (c *Client) RequestToken(ctx context.Context, namespace, serviceAccount string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	var response authenticationv1.TokenRequest
	err := c.core.Post().Namespace(namespace).Resource("serviceaccounts").Name(serviceAccount).SubResource("token").Body(r).Do(ctx).Into(&response)
	return &response, c.countFailure(telemetry.APIRequestToken, err)
}

// WriteEvent writes an Event. If e.Count is greater than one, the Event probably exists. In this case WriteEvent first
// tries to update the count and time of that Event, and creates the Event only if it does not exist.
func (c *Client) WriteEvent(ctx context.Context, e *corev1.Event) error {
	events := func(r *rest.Request) *rest.Request { return r.Namespace(e.Namespace).Resource("events") }
	if e.Count > 1 {
		patch, err := json.Marshal(map[string]any{"count": e.Count, "lastTimestamp": e.LastTimestamp})
		if err != nil {
			return err
		}
		err = events(c.core.Patch(types.MergePatchType)).Name(e.Name).Body(patch).Do(ctx).Error()
		if !apierrors.IsNotFound(err) {
			return c.countFailure(telemetry.APIWriteEvent, err)
		}
	}
	return c.countFailure(telemetry.APIWriteEvent, events(c.core.Post()).Body(e).Do(ctx).Error())
}

func (c *Client) listPods(ctx context.Context) ([]*corev1.Pod, error) {
	var list corev1.PodList
	err := c.core.Get().Resource("pods").Param("fieldSelector", onNode(c.node).String()).Do(ctx).Into(&list)
	if c.countFailure(telemetry.APIListPods, err) != nil {
		return nil, fmt.Errorf("listing the pods of node %s: %w", c.node, err)
	}
	pods := make([]*corev1.Pod, len(list.Items))
	for i := range list.Items {
		pods[i] = &list.Items[i]
	}
	return pods, nil
}

func onNode(node string) fields.Selector { return fields.OneTermEqualSelector("spec.nodeName", node) }

// NodeLabels returns the labels of this node. It returns an error if the cluster has no node of the client's name, because
// NMI would not find any pod. If it cannot read the node for another reason, it logs a warning and returns no labels.
func (c *Client) NodeLabels(ctx context.Context, log *zap.Logger) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	var node corev1.Node
	err := c.core.Get().Resource("nodes").Name(c.node).Do(ctx).Into(&node)
	switch {
	case err == nil:
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("--node %s: the cluster has no node of this name; give the name that kubectl get nodes shows for this node", c.node)
	default:
		log.Warn("could not read the Node object of this node, to check that it exists and whether its data path bypasses netfilter", zap.String(telemetry.KeyNode, c.node), zap.Error(err))
	}
	return node.Labels, nil
}

// checkCRDs returns an error if the discovery of the API server does not list all of these custom resources.
func (c *Client) checkCRDs(ctx context.Context, resources []string) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	var list metav1.APIResourceList
	err := c.crds.Get().AbsPath("/apis/" + v1.GroupVersion.String()).Do(ctx).Into(&list)
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("reading the resources of group %s from the API server: %w", v1.GroupVersion, err)
	}
	served := map[string]bool{}
	for _, r := range list.APIResources {
		served[r.Name] = true
	}
	for _, r := range resources {
		if !served[r] {
			return fmt.Errorf("the cluster does not have %s.%s; install the custom resource definitions of the chart", r, v1.GroupName)
		}
	}
	return nil
}

// countFailure calls onFailure if err is not nil. It returns err.
func (c *Client) countFailure(operation string, err error) error {
	if err != nil {
		c.onFailure(operation)
	}
	return err
}
