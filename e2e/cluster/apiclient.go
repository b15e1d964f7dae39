package cluster

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	watchtools "k8s.io/client-go/tools/watch"
)

// apiClient is the admin's client of the API server, which it reaches from inside the control plane's namespace.
type apiClient struct{ kubernetes.Interface }

func newAPIClient(pki, netns string) (*apiClient, error) {
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(pki, "admin.kubeconfig"))
	if err != nil {
		return nil, fmt.Errorf("loading the admin's kubeconfig: %w", err)
	}
	config.Dial, config.QPS = DialFrom(netns, nil), -1
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client of the API server: %w", err)
	}
	return &apiClient{client}, nil
}

func (a *apiClient) checkReady(ctx context.Context) error {
	return a.Discovery().RESTClient().Get().AbsPath("/readyz").Timeout(5 * time.Second).Do(ctx).Error()
}

// awaitServiceAccount returns when the namespace default has its ServiceAccount. Before that, the API server refuses
// pods in this namespace.
func (a *apiClient) awaitServiceAccount(ctx context.Context) error {
	return a.awaitObject(ctx, "serviceaccounts", metav1.NamespaceDefault, "default", &corev1.ServiceAccount{}, func(runtime.Object) error { return nil })
}

// awaitNode returns when the kubelet has reported the node as ready. The report must be from the time `since` or later:
// after a restart of the node, the API server still has the kubelet's last report from before the restart.
func (a *apiClient) awaitNode(ctx context.Context, name string, since time.Time) error {
	return a.awaitObject(ctx, "nodes", metav1.NamespaceAll, name, &corev1.Node{}, func(object runtime.Object) error {
		return nodeReady(object.(*corev1.Node), since)
	})
}

// nodeReady returns nil if the kubelet reported the node as ready at the time `since` or later.
func nodeReady(node *corev1.Node, since time.Time) error {
	for _, c := range node.Status.Conditions {
		switch {
		case c.Type != corev1.NodeReady || c.LastHeartbeatTime.Time.Before(since.Truncate(time.Second)): // the API stores whole seconds
		case c.Status == corev1.ConditionTrue:
			return nil
		default:
			return fmt.Errorf("node %s is not ready: %s", node.Name, c.Message)
		}
	}
	return fmt.Errorf("the kubelet of node %s has not reported its state since the node was started at %s", node.Name, since.Format(time.TimeOnly))
}

// awaitObject watches one object until check returns nil for it. If ctx or the watch ends before that, awaitObject
// returns the last error of check, or an error that says that the API server has not returned the object.
func (a *apiClient) awaitObject(ctx context.Context, resource, namespace, name string, kind runtime.Object, check func(runtime.Object) error) error {
	last := fmt.Errorf("the API server has not returned %s %q yet", resource, name)
	source := cache.NewListWatchFromClient(a.CoreV1().RESTClient(), resource, namespace, fields.OneTermEqualSelector(metav1.ObjectNameField, name))
	_, err := watchtools.UntilWithSync(ctx, source, kind, nil, func(event watch.Event) (bool, error) {
		if event.Type != watch.Added && event.Type != watch.Modified {
			return false, nil
		}
		last = check(event.Object)
		return last == nil, nil
	})
	if err != nil {
		return last
	}
	return nil
}
