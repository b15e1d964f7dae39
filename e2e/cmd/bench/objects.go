package main

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

const (
	nodeName  = "bench"
	namespace = "bench"
	pods      = 250
	spread    = 50 // number of namespaces with identities that no pod uses
)

// shared is the identity that all pods use at first.
var shared = azure.Identity{
	ClientID:   "be9c4000-0000-4000-8000-000000000001",
	ObjectID:   "be9c4001-0000-4000-8000-000000000001",
	ResourceID: "/subscriptions/" + cluster.SubscriptionID + "/resourcegroups/bench/providers/Microsoft.ManagedIdentity/userAssignedIdentities/shared",
	TenantID:   cluster.TenantID,
}

// podIP is the address of the i-th pod.
func podIP(subnet, i int) string { return fmt.Sprintf("10.245.%d.%d", subnet, i+2) }

func podName(i int) string { return fmt.Sprintf("pod-%d", i) }

// clients are clients of the API server without a rate limit.
type clients struct {
	kube   kubernetes.Interface
	custom dynamic.Interface
}

// apiServer is how an API server is reached.
type apiServer interface {
	Kubeconfig() string
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

func newClients(a apiServer) (clients, error) {
	config, err := clientcmd.BuildConfigFromFlags("", a.Kubeconfig())
	if err != nil {
		return clients{}, err
	}
	config.Dial, config.QPS = a.DialContext, -1
	custom, err := dynamic.NewForConfig(config)
	if err != nil {
		return clients{}, err
	}
	config.ContentType = runtime.ContentTypeProtobuf // as kubelets do
	kube, err := kubernetes.NewForConfig(config)
	return clients{kube, custom}, err
}

// makeObjects fills the cluster with a node without a kubelet, its pods as a kubelet would report them, and identities.
func makeObjects(ctx context.Context, c *cluster.Cluster, identities int) error {
	k, err := newClients(c)
	if err != nil {
		return err
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}, Spec: corev1.NodeSpec{Unschedulable: true}}
	if _, err := k.kube.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
		return err
	}
	for i := range spread + 1 {
		name := namespace
		if i > 0 {
			name = fmt.Sprintf("%s-%d", namespace, i)
		}
		if _, err := k.kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	if err := inParallel(pods, func(i int) error { return makePod(ctx, k.kube, i) }); err != nil {
		return err
	}
	if err := k.makeIdentity(ctx, namespace, "shared", "app", managedSpec(shared)); err != nil {
		return err
	}
	return inParallel(identities-1, func(i int) error {
		id := azure.Identity{
			ClientID:   fmt.Sprintf("be9c4000-0000-4000-8000-%012d", i+2),
			ResourceID: fmt.Sprintf("/subscriptions/%s/resourcegroups/bench/providers/Microsoft.ManagedIdentity/userAssignedIdentities/identity-%d", cluster.SubscriptionID, i),
		}
		name := fmt.Sprintf("identity-%d", i)
		return k.makeIdentity(ctx, fmt.Sprintf("%s-%d", namespace, i%spread+1), name, name, managedSpec(id))
	})
}

func makePod(ctx context.Context, kube kubernetes.Interface, i int) error {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: podName(i), Namespace: namespace, Labels: map[string]string{
			"aadpodidbinding": "app", "app.kubernetes.io/name": "shop", "app.kubernetes.io/instance": "shop", "pod-template-hash": "6f7d9c5b8"}},
		Spec: corev1.PodSpec{NodeName: nodeName, ServiceAccountName: "default", Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}
	var made *corev1.Pod
	var err error
	// The ServiceAccount default of a new namespace is created a moment after the namespace. Until then the API server
	// refuses pods in this namespace.
	for range 100 {
		made, err = kube.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{})
		if err == nil || !apierrors.IsForbidden(err) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	ip := podIP(nmiSubnet, i)
	made.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}}
	_, err = kube.CoreV1().Pods(namespace).UpdateStatus(ctx, made, metav1.UpdateOptions{})
	return err
}

// managedSpec is the spec of a managed identity.
func managedSpec(id azure.Identity) map[string]any {
	return map[string]any{"type": int64(0), "clientID": id.ClientID, "resourceID": id.ResourceID}
}

func (k clients) makeIdentity(ctx context.Context, namespace, name, selector string, spec map[string]any) error {
	create := func(kind, resource, name string, spec map[string]any) error {
		o := &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "aadpodidentity.k8s.io/v1", "kind": kind, "metadata": map[string]any{"name": name, "namespace": namespace}, "spec": spec}}
		gvr := schema.GroupVersionResource{Group: "aadpodidentity.k8s.io", Version: "v1", Resource: resource}
		_, err := k.custom.Resource(gvr).Namespace(namespace).Create(ctx, o, metav1.CreateOptions{})
		return err
	}
	if err := create("AzureIdentity", "azureidentities", name, spec); err != nil {
		return err
	}
	return create("AzureIdentityBinding", "azureidentitybindings", name+"-binding", map[string]any{"azureIdentity": name, "selector": selector})
}

// inParallel calls do n times, with at most 16 concurrent calls, and returns the first error. An error does not stop
// the other calls.
func inParallel(n int, do func(i int) error) error {
	const atOnce = 16
	var wg sync.WaitGroup
	var once sync.Once
	var failed error
	next := make(chan int)
	for range atOnce {
		wg.Go(func() {
			for i := range next {
				if err := do(i); err != nil {
					once.Do(func() { failed = err })
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	return failed
}
