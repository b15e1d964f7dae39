package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	crclient "sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// All tests share one cluster and one fake Azure. Each test uses its own namespace and its own identities.
var (
	testCluster *cluster.Cluster
	fakeAzure   *azure.Client
	// initialState is the state of each node before NMI ran there for the first time.
	initialState map[string]nodeState

	scratch     string            // a temporary folder
	nmiBinary   string            // for tests that start NMI as a process of their own
	withoutCRDs withoutCRDsResult // set by prepare, which runs NMI before the chart is installed
)

func TestMain(m *testing.M) {
	if command := os.Getenv(podProgram); command != "" {
		os.Exit(runPodProgram(command))
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	flag.Parse()
	// Up to eight independent tests run at the same time, even on a few CPUs, because they mostly wait for pods.
	if err := flag.Set("test.parallel", "8"); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	ctx := context.Background()
	progress := func(line string) { fmt.Println("e2e:", line) }
	start := time.Now()
	var err error
	if testCluster, err = cluster.Start(ctx, cluster.Options{Progress: progress}); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: starting the cluster:", err)
		return 1
	}
	defer func() {
		_ = os.RemoveAll(scratch)
		if err := testCluster.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: stopping the cluster:", err)
		}
	}()
	fakeAzure = testCluster.Azure()
	if err := connectToAPIServer(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	if err := prepare(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	if err := createNamespaces(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	if err := testCluster.InstallChart(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	fmt.Printf("e2e: cluster and chart are up after %.1f s\n", time.Since(start).Seconds())
	return m.Run()
}

// prepare records the initial state of the nodes and builds NMI. It runs NMI once while the cluster does not have the
// custom resource definitions of this project.
func prepare(ctx context.Context) error {
	initialState = map[string]nodeState{}
	for _, node := range testCluster.Nodes() {
		state, err := readNodeState(ctx, node)
		if err != nil {
			return err
		}
		initialState[node] = state
	}
	var err error
	if scratch, err = cluster.Scratch("e2e"); err != nil {
		return err
	}
	if nmiBinary, err = buildNMI(ctx); err != nil {
		return err
	}
	withoutCRDs, err = runWithoutCRDs(ctx)
	return err
}

// nodeState is the network configuration of a node. NMI changes it, and must restore it when it is uninstalled.
type nodeState struct{ rules, links, addresses, sysctls string }

func readNodeState(ctx context.Context, node string) (s nodeState, err error) {
	for _, part := range []struct {
		into *string
		cmd  string
	}{
		{&s.rules, "(iptables-nft-save; iptables-legacy-save) | grep -v '^#' | sed 's/\\[[0-9:]*\\]//'"},
		// The veth links are left out: they belong to pods, and are created and deleted with the pods.
		{&s.links, "ip -o link | cut -d: -f2 | grep -v veth | sort"},
		{&s.addresses, "ip -o -4 addr | awk '{print $2, $4}' | grep -v veth | sort"},
		{&s.sysctls, "sysctl -a 2>/dev/null | grep -E 'route_localnet|ip_forward|rp_filter|arp_ignore|nf_conntrack_tcp' | grep -v veth | grep -v podidentity0 | sort"},
	} {
		if *part.into, err = testCluster.InNode(ctx, node, "sh", "-c", part.cmd); err != nil {
			return s, err
		}
	}
	return s, nil
}

const vault = "https://vault.azure.net"

var serial atomic.Int32

// independentTests counts the tests that have called independent and have not ended.
var independentTests sync.WaitGroup

// independent lets the test run at the same time as other independent tests, after all tests that call neither
// independent nor runLast. An independent test must not depend on anything that other tests change, such as the request
// counts of NMI and of the fake Azure. It must not change anything that other tests depend on.
func independent(t *testing.T) {
	independentTests.Add(1)
	t.Cleanup(independentTests.Done)
	t.Parallel()
}

var lastTest sync.Mutex

// runLast makes the test wait until all tests that do not call runLast have ended. Tests that call runLast run one at a
// time. They stop the API server and start it again. For a minute after the restart, the cluster may be unable to start
// pods, and other tests would fail.
func runLast(t *testing.T) {
	t.Parallel()
	independentTests.Wait()
	lastTest.Lock()
	t.Cleanup(lastTest.Unlock)
}

// newIdentity creates a user-assigned identity in the fake Azure, attached to both nodes.
func newIdentity(t *testing.T) azure.Identity {
	t.Helper()
	n := serial.Add(1)
	id := azure.Identity{
		ClientID:   fmt.Sprintf("c11e0000-0000-4000-8000-%012d", n),
		ObjectID:   fmt.Sprintf("0b1ec700-0000-4000-8000-%012d", n),
		ResourceID: fmt.Sprintf("/subscriptions/%s/resourcegroups/rg/providers/Microsoft.ManagedIdentity/userAssignedIdentities/id%d", cluster.SubscriptionID, n),
		TenantID:   cluster.TenantID,
	}
	must(t, fakeAzure.AddIdentity(t.Context(), id))
	return id
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testNamespace is the Kubernetes namespace of one test.
type testNamespace struct {
	t    *testing.T
	name string
}

func newNamespace(t *testing.T) *testNamespace {
	t.Helper()
	n := int(usedNamespaces.Add(1))
	if n > namespaceCount {
		t.Fatalf("the tests need more than the %d namespaces that were created at the start; raise namespaceCount", namespaceCount)
	}
	s := &testNamespace{t, namespaceName(n)}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := testCluster.Kubectl(context.Background(), "get", "pods,azureidentities,azureidentitybindings", "-o", "wide", "-n", s.name)
			logs, _ := testCluster.Kubectl(context.Background(), "logs", "-n", cluster.ChartNamespace, "-l", "app.kubernetes.io/component=nmi", "--prefix", "--tail", "15")
			fmt.Fprintf(t.Output(), "namespace %s:\n%s\nNMI:\n%s", s.name, out, logs)
		}
		_ = kube.Delete(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.name}})
	})
	return s
}

// namespaceCount is the number of namespaces. All are created at the start: a pod needs the default ServiceAccount of
// its namespace. After a test that stopped the API server, it takes a minute until new namespaces get this account.
const namespaceCount = 100

var usedNamespaces atomic.Int32

// namespaceName returns the name of the nth namespace, from 1 to namespaceCount.
func namespaceName(n int) string { return fmt.Sprintf("test-%d", n) }

func createNamespaces(ctx context.Context) error {
	for i := range namespaceCount {
		if err := kube.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespaceName(i + 1)}}); err != nil {
			return fmt.Errorf("creating the namespaces of the tests: %w", err)
		}
	}
	return cluster.Retry(time.Minute, func() error {
		var accounts corev1.ServiceAccountList
		if err := kube.List(ctx, &accounts, crclient.MatchingFields{"metadata.name": "default"}); err != nil {
			return err
		}
		if len(accounts.Items) < namespaceCount {
			return fmt.Errorf("only %d namespaces have a default ServiceAccount", len(accounts.Items))
		}
		return nil
	})
}

// bind creates an AzureIdentity for id, and a binding of it for the pods whose label aadpodidbinding equals selector.
func (s *testNamespace) bind(name, selector string, id azure.Identity) {
	s.t.Helper()
	s.apply(fmt.Sprintf(`
apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentity
metadata: {namespace: %[1]s, name: %[2]s}
spec: {type: 0, clientID: %[4]s, resourceID: %[5]s}
---
apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentityBinding
metadata: {namespace: %[1]s, name: %[2]s-binding}
spec: {azureIdentity: %[2]s, selector: %[3]s}
`, s.name, name, selector, id.ClientID, id.ResourceID))
}

// podYAML returns the manifest of a pod that runs podclient with args.
func (s *testNamespace) podYAML(name, label, node string, args ...string) string {
	text, _ := json.Marshal(args)
	return fmt.Sprintf(`
---
apiVersion: v1
kind: Pod
metadata: {namespace: %s, name: %s, labels: {aadpodidbinding: %q}}
spec:
  nodeSelector: {kubernetes.io/hostname: %q}
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: %q, imagePullPolicy: Never, args: %s}]
`, s.name, name, label, node, cluster.TestImage, text)
}

// pod starts a pod that does nothing, and waits until all pods of the namespace are ready.
func (s *testNamespace) pod(name, label, node string) {
	s.t.Helper()
	s.apply(s.podYAML(name, label, node, "pause"))
	s.waitForPods()
}

// answer is a response that NMI sent. body has the fields of a flat JSON object. headers is set only if the request
// was sent with curl.
type answer struct {
	status  int
	body    map[string]string
	raw     string
	headers string
}

func (a answer) token() string  { return a.body["access_token"] }
func (a answer) reason() string { return a.body["reason"] }

// ask requests a token with an unmodified curl in the pod's network namespace.
func (s *testNamespace) ask(pod, resource string, query ...string) answer {
	s.t.Helper()
	target := "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + url.QueryEscape(resource)
	if len(query) > 0 {
		target += "&" + strings.Join(query, "&")
	}
	return s.curl(pod, "-H", "Metadata: true", target)
}

// curl runs an unmodified curl in the pod's network namespace. The status is 0 if there is no response.
func (s *testNamespace) curl(pod string, args ...string) answer {
	s.t.Helper()
	cmd, err := testCluster.InPodCommand(s.t.Context(), s.name, pod, "curl", append([]string{"-s", "--max-time", "30", "--path-as-is", "-D", "/dev/stderr", "-w", "\n%{http_code}"}, args...)...)
	must(s.t, err)
	var out, headers strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &headers
	_ = cmd.Run() // without a response, the output has the status 000
	text, code, _ := cutLast(out.String(), "\n")
	a := answer{raw: text, body: map[string]string{}, headers: headers.String()}
	_, _ = fmt.Sscan(code, &a.status)
	_ = json.Unmarshal([]byte(text), &a.body)
	return a
}

func cutLast(s, sep string) (string, string, bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// mustHaveTokenOf checks the signature, the audience, the tenant, and the client and object IDs of the token in the
// answer, and the other fields of the answer.
func (s *testNamespace) mustHaveTokenOf(a answer, id azure.Identity, resource string) {
	s.t.Helper()
	if a.status != 200 {
		s.t.Fatalf("status %d: %s", a.status, a.raw)
	}
	claims, err := fakeAzure.Verify(a.token())
	must(s.t, err)
	if claims.AppID != id.ClientID || claims.ObjectID != id.ObjectID || claims.Audience != resource || claims.TenantID != id.TenantID {
		s.t.Fatalf("the token has appid %s, oid %s and audience %s; want %+v and %s", claims.AppID, claims.ObjectID, claims.Audience, id, resource)
	}
	if a.body["client_id"] != id.ClientID || a.body["resource"] != resource || a.body["token_type"] != "Bearer" || a.body["expires_in"] == "" || a.body["not_before"] == "" {
		s.t.Fatalf("the other fields of the answer are wrong: %s", a.raw)
	}
}

func (s *testNamespace) mustBeRefused(a answer, status int, reason string) {
	s.t.Helper()
	if a.status != status || a.reason() != reason || a.token() != "" {
		s.t.Errorf("got %d %s; want %d and reason %s", a.status, a.raw, status, reason)
	}
}

// eventually calls check until it returns nil. It fails the test after the time limit. Limits are generous, because
// everything takes longer on a busy computer. Only a test that fails waits until the limit.
func eventually(t *testing.T, within time.Duration, check func() error) {
	t.Helper()
	must(t, cluster.Retry(within, check))
}

// checkNoPodReachedIMDS checks that the fake IMDS has received no connection and no request from a pod since the counts
// of the fake Azure were last reset.
func checkNoPodReachedIMDS(t *testing.T) {
	t.Helper()
	stats, err := fakeAzure.Stats(t.Context())
	must(t, err)
	if stats.IMDS.RequestsFromPods != 0 || stats.IMDS.ConnectionsFromPods != 0 {
		entries, _ := fakeAzure.Log(t.Context(), 0)
		for _, e := range entries {
			if e.FromPod {
				t.Logf("%+v", e)
			}
		}
		t.Errorf("%d requests and %d connections of pods reached IMDS; want none", stats.IMDS.RequestsFromPods, stats.IMDS.ConnectionsFromPods)
	}
}

// nmiReady returns nil if the readiness probe of NMI on the node succeeds.
func nmiReady(ctx context.Context, node string) error {
	_, err := testCluster.InNode(ctx, node, "curl", "-sf", "--max-time", "10", "http://127.0.0.1:8085/readyz")
	return err
}

// metric returns the sum of a metric of NMI on the node over all series whose labels contain all of the given texts.
func metric(t *testing.T, node, name string, labels ...string) float64 {
	t.Helper()
	out, err := testCluster.InNode(t.Context(), node, "curl", "-sf", "--max-time", "15", "http://127.0.0.1:9090/metrics")
	must(t, err)
	var sum float64
lines:
	for line := range strings.SplitSeq(out, "\n") {
		series, value, ok := cutLast(line, " ")
		if !ok || (series != name && !strings.HasPrefix(series, name+"{")) {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(series, l) {
				continue lines
			}
		}
		var v float64
		_, _ = fmt.Sscan(value, &v)
		sum += v
	}
	return sum
}
