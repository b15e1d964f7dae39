package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// The cluster that MIC is measured in. Each scale set has a block of identities from the start, and one block that is
// added last. All other identities are added when the cluster grows. So an identity has about as many pods on a scale
// set in the small cluster as in the large one, and the replacement of a pod has the same effects in both.
const (
	scaleSets             = 10
	nodesInSet            = 100
	identities            = 200
	block                 = identities / scaleSets
	applicationNamespaces = 20
)

// pair is an identity on a scale set.
type pair struct{ set, identity int }

// firstPairs are the pairs that exist from the start.
func firstPairs() (pairs []pair) {
	for i := range scaleSets * block {
		set := i % scaleSets
		pairs = append(pairs, pair{set, set*block + i/scaleSets})
	}
	return pairs
}

// latePairs are the pairs that addNewIdentities adds last.
func latePairs() (pairs []pair) {
	for _, p := range firstPairs() {
		pairs = append(pairs, pair{p.set, (p.identity + identities - block) % identities})
	}
	return pairs
}

// laterPairs are the pairs that grow adds: all pairs except firstPairs and latePairs.
func laterPairs() (pairs []pair) {
	known := slices.Concat(firstPairs(), latePairs())
	for i := range scaleSets * identities {
		if p := (pair{i % scaleSets, i / scaleSets}); !slices.Contains(known, p) {
			pairs = append(pairs, p)
		}
	}
	return pairs
}

// workload creates and replaces the pods of the cluster.
type workload struct {
	k       clients
	watcher *watcher

	mu     sync.Mutex
	random *rand.Rand
	serial int
	pods   []string        // namespace/name of those that exist
	answer []time.Duration // response times of the API server to the creation of a pod
}

func setID(set int) string {
	return fmt.Sprintf("/subscriptions/%s/resourceGroups/bench/providers/Microsoft.Compute/virtualMachineScaleSets/nodes-%d", cluster.SubscriptionID, set)
}

func nodeOf(set, i int) string { return fmt.Sprintf("nodes-%d-%03d", set, i) }

func application(identity int) string { return fmt.Sprintf("application-%d", identity) }

func namespaceOf(identity int) string {
	return fmt.Sprintf("applications-%d", identity%applicationNamespaces)
}

func identityOf(i int) azure.Identity {
	return azure.Identity{
		ClientID: fmt.Sprintf("be9c4004-0000-4000-8000-%012d", i+1), ObjectID: fmt.Sprintf("be9c4005-0000-4000-8000-%012d", i+1), TenantID: cluster.TenantID,
		ResourceID: fmt.Sprintf("/subscriptions/%s/resourcegroups/bench/providers/Microsoft.ManagedIdentity/userAssignedIdentities/%s", cluster.SubscriptionID, application(i)),
	}
}

// createNodesAndIdentities creates the namespaces of the applications, the identities with their bindings, and the
// nodes.
func (c *workload) createNodesAndIdentities(ctx context.Context) error {
	for i := range applicationNamespaces {
		if err := c.makeNamespace(ctx, namespaceOf(i)); err != nil {
			return err
		}
	}
	err := inParallel(identities, func(i int) error {
		return c.k.makeIdentity(ctx, namespaceOf(i), application(i), application(i), managedSpec(identityOf(i)))
	})
	if err != nil {
		return err
	}
	return inParallel(scaleSets*nodesInSet, func(i int) error {
		set, number := i/nodesInSet, i%nodesInSet
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeOf(set, number)}}
		node.Spec.ProviderID = fmt.Sprintf("azure://%s/virtualMachines/%d", setID(set), number)
		_, err := c.k.kube.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
		return err
	})
}

// makeNamespace creates a namespace and the ServiceAccount that a controller would create.
func (c *workload) makeNamespace(ctx context.Context, name string) error {
	if _, err := c.k.kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	return c.makeAccount(ctx, name, "default")
}

func (c *workload) makeAccount(ctx context.Context, namespace, name string) error {
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
	_, err := c.k.kube.CoreV1().ServiceAccounts(namespace).Create(ctx, account, metav1.CreateOptions{})
	return err
}

// newPod returns a Pod object, not created yet, with the identity of p, on a random node of the scale set of p.
func (c *workload) newPod(p pair) *corev1.Pod {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.serial++
	app := application(p.identity)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespaceOf(p.identity), Name: fmt.Sprintf("%s-6f7d9c5b8-%05d", app, c.serial),
			Labels: map[string]string{"aadpodidbinding": app, "app.kubernetes.io/name": app, "app.kubernetes.io/instance": app, "pod-template-hash": "6f7d9c5b8"},
		},
		Spec: corev1.PodSpec{
			NodeName: nodeOf(p.set, c.random.IntN(nodesInSet)),
			Containers: []corev1.Container{{
				Name: "main", Image: "registry.example.com/" + app + ":1.0.0", Args: []string{"serve", "--port=8080"},
				Env:       []corev1.EnvVar{{Name: "VAULT", Value: "https://" + app + ".vault.azure.net"}},
				Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi")}},
			}},
		},
	}
}

// add creates a pod, and returns it when the API server has acknowledged it.
func (c *workload) add(ctx context.Context, p pair) (*corev1.Pod, error) {
	pod := c.newPod(p)
	began := time.Now()
	made, err := c.k.kube.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	took, key := time.Since(began), made.Namespace+"/"+made.Name
	c.watcher.made(key)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pods, c.answer = append(c.pods, key), append(c.answer, took)
	return made, nil
}

// run sets the status that a kubelet reports when the containers run.
func (c *workload) run(ctx context.Context, pod *corev1.Pod) error {
	now := metav1.Now()
	pod.Status = corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: "10.240.0.4", PodIPs: []corev1.PodIP{{IP: "10.240.0.4"}}, StartTime: &now,
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: now}},
		ContainerStatuses: []corev1.ContainerStatus{{Name: "main", Ready: true, Image: pod.Spec.Containers[0].Image,
			State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}}}},
	}
	_, err := c.k.kube.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{})
	return err
}

// fill creates n pods as fast as possible, cycling through the pairs, and returns them.
func (c *workload) fill(ctx context.Context, pairs []pair, n int) ([]string, error) {
	before := c.count()
	err := inParallel(n, func(i int) error {
		pod, err := c.add(ctx, pairs[i%len(pairs)])
		if err != nil {
			return err
		}
		return c.run(ctx, pod)
	})
	return c.since(before), err
}

// since returns all pods in c.pods except the first count pods.
func (c *workload) since(count int) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.pods[count:])
}

func (c *workload) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pods)
}

// choose removes n random pods from c.pods and returns them in old. The caller replaces old[i] by a pod with the pair
// now[i], a random one of pairs.
func (c *workload) choose(pairs []pair, n int) (old []string, now []pair) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.random.Shuffle(len(c.pods), func(i, j int) { c.pods[i], c.pods[j] = c.pods[j], c.pods[i] })
	old, c.pods = slices.Clone(c.pods[:n]), slices.Clone(c.pods[n:])
	for range n {
		now = append(now, pairs[c.random.IntN(len(pairs))])
	}
	return old, now
}

// replace does what a rolling update does to one pod: it creates the new pod, sets the status of a running pod, and
// deletes the old pod. After the creation of the new pod, it waits for the time step before each further request,
// because a node takes time between these requests, too.
func (c *workload) replace(ctx context.Context, old string, p pair, step time.Duration) error {
	pod, err := c.add(ctx, p)
	if err != nil {
		return err
	}
	time.Sleep(step)
	if err := c.run(ctx, pod); err != nil {
		return err
	}
	// The first of these DELETE requests is that of the controller. The second is that of the kubelet, which has
	// stopped the containers and deletes the pod with grace period 0.
	namespace, name, _ := strings.Cut(old, "/")
	for _, grace := range []int64{30, 0} {
		time.Sleep(step)
		if err := c.k.kube.CoreV1().Pods(namespace).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
			return err
		}
	}
	return nil
}

// answers returns how long the API server took to create each pod since the last call of answers, sorted.
func (c *workload) answers() []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.answer
	c.answer = nil
	slices.Sort(all)
	return all
}
