package standard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// Settings of MIC and the fake ARM that the tests depend on.
const (
	detachDelay = 5 * time.Second
	// armDelay is the duration of an update in ARM. It is shorter than the ten seconds that MIC waits from the start of
	// an update to the start of the machine's next update.
	armDelay = 8 * time.Second
	// updateTimeout is the limit for everything that needs an update of a machine. Another update may have started just
	// before, and other tests change the same machine at the same time. updateTimeout and reactionTimeout are several
	// times what the tests need on two idle cores, because the computer may be busy.
	updateTimeout = 4 * time.Minute
	// reactionTimeout is the limit for everything that needs no update of a machine.
	reactionTimeout = 90 * time.Second

	micName = "podidentity-mic"
	// immutableClientID is the client ID of the identity that MIC is configured never to detach.
	immutableClientID = "c11e0000-0000-4000-8000-0000000057a7"
)

// testEnvironment is a cluster with the chart in standard mode. Its nodes are in one scale set, or each is a virtual
// machine.
type testEnvironment struct {
	*cluster.Cluster
	kube      client.WithWatch
	cloud     *azure.Client
	vms       bool             // each node is a virtual machine; otherwise both nodes are in one scale set
	foreign   []azure.Identity // attached to all machines before MIC is installed
	immutable azure.Identity   // see immutableClientID

	serial atomic.Int32
}

func twoVMs(o *cluster.Options) { o.ProviderIDs = cluster.TwoVMs() }

// start starts a cluster, attaches to its machines two identities that MIC does not manage (like the kubelet's identity
// on AKS), and installs the chart. With change nil both nodes are in one scale set; otherwise change must make each
// node a virtual machine.
func start(t *testing.T, change func(*cluster.Options)) *testEnvironment {
	t.Helper()
	// Another test process on this computer may wait until this cluster has stopped. The images are built before the
	// cluster starts, so that the other process waits for a shorter time.
	_, errMIC := cluster.BuildMICImage(t.Context())
	_, errNMI := cluster.BuildNMIImage(t.Context(), nil)
	must(t, errors.Join(errMIC, errNMI))
	began := time.Now()
	options := cluster.Options{Progress: func(line string) { fmt.Println("standard:", line) }, Wait: 20 * time.Minute}
	if change != nil {
		change(&options)
	}
	c, err := cluster.Start(t.Context(), options)
	must(t, err)
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error("stopping the cluster:", err)
		}
	})
	l := &testEnvironment{Cluster: c, cloud: c.Azure(), vms: change != nil}
	l.kube = newClient(t, c)
	for range 2 {
		id := l.newIdentity(t)
		for _, node := range l.Nodes() {
			must(t, l.cloud.AttachTo(t.Context(), node, id.ResourceID))
		}
		l.foreign = append(l.foreign, id)
	}
	l.immutable = l.identity(0)
	l.immutable.ClientID = immutableClientID
	must(t, l.cloud.DefineIdentity(t.Context(), l.immutable))
	must(t, l.cloud.Set(t.Context(), map[string]string{"arm.delay": armDelay.String(), "arm.casing": string(azure.CasingChanging)}))
	must(t, l.InstallStandard(t.Context(),
		"--set", "mic.detachDelay="+detachDelay.String(), "--set", "mic.identityAssignmentReconcileInterval=10s",
		"--set", "mic.leaderElection.duration=5s", "--set", "mic.immutableUserMSIs={"+immutableClientID+"}"))
	fmt.Printf("standard: cluster and chart are up after %.1f s\n", time.Since(began).Seconds())
	return l
}

func newClient(t *testing.T, c *cluster.Cluster) client.WithWatch {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	must(t, err)
	config.Dial, config.QPS = c.DialContext, -1
	scheme := runtime.NewScheme()
	must(t, errors.Join(clientgoscheme.AddToScheme(scheme), v1.AddToScheme(scheme)))
	kube, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	must(t, err)
	return kube
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually calls check until it returns nil. It fails the test after the time limit.
func eventually(t *testing.T, within time.Duration, check func() error) {
	t.Helper()
	must(t, cluster.Retry(within, check))
}

// identity returns the IDs of the nth identity. It does not create the identity.
func (l *testEnvironment) identity(n int32) azure.Identity {
	return azure.Identity{
		ClientID:   fmt.Sprintf("c11e0000-0000-4000-8000-%012d", n),
		ObjectID:   fmt.Sprintf("0b1ec700-0000-4000-8000-%012d", n),
		ResourceID: fmt.Sprintf("/subscriptions/%s/resourceGroups/Apps/providers/Microsoft.ManagedIdentity/userAssignedIdentities/Id%d", cluster.SubscriptionID, n),
		TenantID:   cluster.TenantID,
	}
}

// newIdentity creates a managed identity that is attached nowhere.
func (l *testEnvironment) newIdentity(t *testing.T) azure.Identity {
	t.Helper()
	id := l.identity(l.serial.Add(1))
	must(t, l.cloud.DefineIdentity(t.Context(), id))
	return id
}

// nodesOfOneMachine returns two nodes of one scale set, or the same node twice if each node is a virtual machine.
func (l *testEnvironment) nodesOfOneMachine() (string, string) {
	if l.vms {
		return "node1", "node1"
	}
	return "node1", "node2"
}

func (l *testEnvironment) attached(t *testing.T, node string, id azure.Identity) bool {
	t.Helper()
	m, err := l.cloud.Machine(t.Context(), node)
	must(t, err)
	return slices.Contains(m.Identities, azure.FoldID(id.ResourceID))
}

func (l *testEnvironment) waitUntilDetached(t *testing.T, node string, id azure.Identity) {
	t.Helper()
	eventually(t, updateTimeout, func() error {
		if l.attached(t, node, id) {
			return fmt.Errorf("%s is still attached to the machine of %s", id.ResourceID, node)
		}
		return nil
	})
}

// changes returns the attachments and detachments of an identity on the machine of a node, oldest first.
func (l *testEnvironment) changes(t *testing.T, node string, id azure.Identity) []azure.ARMChange {
	t.Helper()
	all, err := l.cloud.ARMChanges(t.Context(), 0)
	must(t, err)
	m, err := l.cloud.Machine(t.Context(), node)
	must(t, err)
	return slices.DeleteFunc(all, func(c azure.ARMChange) bool {
		return c.Identity != azure.FoldID(id.ResourceID) || c.Resource != azure.FoldID(m.ID)
	})
}

// patches are the PATCH requests that attach or detach an identity, whether they succeeded or not.
func (l *testEnvironment) patches(t *testing.T, id azure.Identity) []azure.ARMRequest {
	t.Helper()
	all, err := l.cloud.ARMLog(t.Context(), 0)
	must(t, err)
	key := azure.FoldID(id.ResourceID)
	return slices.DeleteFunc(all, func(r azure.ARMRequest) bool {
		return r.Operation != azure.OpPatch || !slices.Contains(r.Add, key) && !slices.Contains(r.Remove, key)
	})
}

// updates are the patches that ARM accepted. Tests count updates instead of patches, because ARM may refuse a patch on
// account of an identity of another test.
func (l *testEnvironment) updates(t *testing.T, id azure.Identity) []azure.ARMRequest {
	t.Helper()
	return slices.DeleteFunc(l.patches(t, id), func(r azure.ARMRequest) bool { return !r.Accepted })
}

// mustBeDetachedAfterDelay waits until MIC has detached an identity from the machine of a node. unused is the time of
// the change after which no pod uses the identity, such as the deletion of a pod. mustBeDetachedAfterDelay checks that
// the update that detached the identity started more than detachDelay after that time.
func (l *testEnvironment) mustBeDetachedAfterDelay(t *testing.T, node string, id azure.Identity, unused time.Time) {
	t.Helper()
	l.waitUntilDetached(t, node, id)
	changes := l.changes(t, node, id)
	if len(changes) == 0 {
		t.Fatalf("%s was never attached to the machine of %s", id.ResourceID, node)
	}
	last := changes[len(changes)-1]
	for _, r := range l.updates(t, id) {
		if r.OperationID == last.OperationID && r.Start.After(unused.Add(detachDelay)) {
			return
		}
	}
	t.Errorf("no pod uses %s since %s; want an update that detaches it and starts more than %s later; its changes on the machine of %s: %+v", id.ResourceID, unused, detachDelay, node, changes)
}

func (l *testEnvironment) waitUntilDeleted(t *testing.T, o client.Object) {
	t.Helper()
	eventually(t, updateTimeout, func() error {
		err := l.kube.Get(t.Context(), client.ObjectKeyFromObject(o), o)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("%T %s/%s still exists or cannot be read (error: %v): %s", o, o.GetNamespace(), o.GetName(), err, asJSON(o))
	})
}

func (l *testEnvironment) micPods(ctx context.Context) ([]corev1.Pod, error) {
	var pods corev1.PodList
	err := l.kube.List(ctx, &pods, client.InNamespace(cluster.ChartNamespace), client.MatchingLabels{"app.kubernetes.io/component": "mic"})
	return pods.Items, err
}

func (l *testEnvironment) lease(t *testing.T) string {
	t.Helper()
	var lease coordinationv1.Lease
	must(t, l.kube.Get(t.Context(), client.ObjectKey{Namespace: cluster.ChartNamespace, Name: "aad-pod-identity-mic"}, &lease))
	if lease.Spec.HolderIdentity == nil {
		return ""
	}
	return *lease.Spec.HolderIdentity
}

// leader waits until the Lease has a holder other than before. It returns the name of the holder's pod, and the holder.
// A restarted process in the same pod is another holder.
func (l *testEnvironment) leader(t *testing.T, before string) (pod, holder string) {
	t.Helper()
	eventually(t, reactionTimeout, func() error {
		holder = l.lease(t)
		pod, _, _ = strings.Cut(holder, "_")
		if pod == "" || holder == before {
			return fmt.Errorf("the holder of the Lease is %q; want a holder other than %q", holder, before)
		}
		return nil
	})
	return pod, holder
}

// scaleMIC sets the number of MIC's replicas and waits until that many pods are ready.
func (l *testEnvironment) scaleMIC(t *testing.T, replicas int) {
	t.Helper()
	var mic appsv1.Deployment
	must(t, l.kube.Get(t.Context(), client.ObjectKey{Namespace: cluster.ChartNamespace, Name: micName}, &mic))
	patch := client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas))
	must(t, l.kube.Patch(t.Context(), &mic, patch))
	eventually(t, reactionTimeout, func() error {
		pods, err := l.micPods(t.Context())
		if err != nil || len(pods) != replicas {
			return fmt.Errorf("MIC has %d pods; want %d (error: %v)", len(pods), replicas, err)
		}
		for _, p := range pods {
			if !isReady(&p) {
				return fmt.Errorf("pod %s of MIC is not ready", p.Name)
			}
		}
		return nil
	})
}

func isReady(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// httpClient is an HTTP client in the network namespace of a pod.
func (l *testEnvironment) httpClient(t *testing.T, namespace, pod string) *http.Client {
	t.Helper()
	var netns *os.File
	eventually(t, reactionTimeout, func() (err error) {
		netns, err = l.PodNetns(t.Context(), namespace, pod)
		return err
	})
	t.Cleanup(func() { netns.Close() })
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext: cluster.DialFrom(fmt.Sprintf("/proc/self/fd/%d", netns.Fd()), nil), DisableKeepAlives: true,
	}}
}

func get(ctx context.Context, c *http.Client, url string) (int, http.Header, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, "", err
	}
	req.Header.Set("Metadata", "true")
	resp, err := c.Do(req)
	if err != nil {
		return 0, nil, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	return resp.StatusCode, resp.Header, string(body), err
}

func asJSON(o any) string {
	text, _ := json.Marshal(o)
	return string(text)
}
