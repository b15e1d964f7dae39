package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// The cluster that all tests share. Each test works in a namespace of its own, with identities of its own.
var (
	world  *cluster.Cluster
	cloud  *azure.Client
	before map[string]nodeState // of the nodes, before NMI was ever there

	scratch     string    // a folder
	nmiBinary   string    // for tests that run it by hand
	withoutCRDs lonelyNMI // how NMI fared before the chart was installed
)

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	ctx := context.Background()
	say := func(line string) { fmt.Println("e2e:", line) }
	start := time.Now()
	var err error
	if world, err = cluster.Start(ctx, cluster.Options{Progress: say}); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: starting the cluster:", err)
		return 1
	}
	defer func() {
		_ = os.RemoveAll(scratch)
		if err := world.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: stopping the cluster:", err)
		}
	}()
	cloud = world.Azure()
	if err := prepare(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	if err := makeSpaces(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	if err := world.InstallChart(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	fmt.Printf("e2e: cluster and chart are up after %.1f s\n", time.Since(start).Seconds())
	return m.Run()
}

// prepare notes how the nodes are, and lets NMI meet a cluster without its resources.
func prepare(ctx context.Context) error {
	before = map[string]nodeState{}
	for _, node := range world.Nodes() {
		state, err := stateOf(ctx, node)
		if err != nil {
			return err
		}
		before[node] = state
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

// nodeState is what NMI could leave behind on a node.
type nodeState struct{ rules, links, addresses, sysctls string }

func stateOf(ctx context.Context, node string) (s nodeState, err error) {
	for _, part := range []struct {
		into *string
		cmd  string
	}{
		{&s.rules, "(iptables-nft-save; iptables-legacy-save) | grep -v '^#' | sed 's/\\[[0-9:]*\\]//'"},
		// The links of pods come and go.
		{&s.links, "ip -o link | cut -d: -f2 | grep -v veth | sort"},
		{&s.addresses, "ip -o -4 addr | awk '{print $2, $4}' | grep -v veth | sort"},
		{&s.sysctls, "sysctl -a 2>/dev/null | grep -E 'route_localnet|ip_forward|rp_filter|arp_ignore|nf_conntrack_tcp' | grep -v veth | grep -v podidentity0 | sort"},
	} {
		if *part.into, err = world.InNode(ctx, node, "sh", "-c", part.cmd); err != nil {
			return s, err
		}
	}
	return s, nil
}

const vault = "https://vault.azure.net"

var serial atomic.Int32

// newIdentity makes a user-assigned identity in Azure, attached to both nodes.
func newIdentity(t *testing.T) azure.Identity {
	t.Helper()
	n := serial.Add(1)
	id := azure.Identity{
		ClientID:   fmt.Sprintf("c11e0000-0000-4000-8000-%012d", n),
		ObjectID:   fmt.Sprintf("0b1ec700-0000-4000-8000-%012d", n),
		ResourceID: fmt.Sprintf("/subscriptions/%s/resourcegroups/rg/providers/Microsoft.ManagedIdentity/userAssignedIdentities/id%d", cluster.SubscriptionID, n),
		TenantID:   cluster.TenantID,
	}
	must(t, cloud.AddIdentity(t.Context(), id))
	return id
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// space is a Kubernetes namespace of one test.
type space struct {
	t    *testing.T
	name string
}

func newSpace(t *testing.T) *space {
	t.Helper()
	if len(spaces) == 0 {
		t.Fatalf("the %d namespaces that were made for all tests are used up; raise spaceCount", spaceCount)
	}
	s := &space{t, spaces[0]}
	spaces = spaces[1:]
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := world.Kubectl(context.Background(), "get", "pods,azureidentities,azureidentitybindings", "-o", "wide", "-n", s.name)
			logs, _ := world.Kubectl(context.Background(), "logs", "-n", cluster.ChartNamespace, "-l", "app.kubernetes.io/component=nmi", "--prefix", "--tail", "15")
			t.Logf("namespace %s:\n%s\nNMI:\n%s", s.name, out, logs)
		}
		_, _ = world.Kubectl(context.Background(), "delete", "namespace", s.name, "--wait=false")
	})
	return s
}

// Namespaces for all tests are made at the start: pods need a ServiceAccount, and the controller that makes it takes a
// minute to come back after a test in which the API server was away.
const spaceCount = 100

var spaces []string

func makeSpaces(ctx context.Context) error {
	var yaml strings.Builder
	for i := range spaceCount {
		spaces = append(spaces, fmt.Sprintf("test-%d", i+1))
		fmt.Fprintf(&yaml, "---\n{apiVersion: v1, kind: Namespace, metadata: {name: %s}}\n", spaces[i])
	}
	if err := world.Apply(ctx, yaml.String()); err != nil {
		return err
	}
	waiting, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		out, err := world.Kubectl(waiting, "get", "serviceaccounts", "-A", "--field-selector", "metadata.name=default", "-o", "name")
		if err != nil {
			return fmt.Errorf("waiting for the ServiceAccounts of the tests' namespaces: %w", err)
		}
		if strings.Count(out, "\n") >= spaceCount {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (s *space) apply(yaml string) {
	s.t.Helper()
	must(s.t, world.Apply(s.t.Context(), yaml))
}

// bind makes AzureIdentity and binding of one name, for pods with the label selector.
func (s *space) bind(name, selector string, id azure.Identity) {
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

// podYAML is a pod of the test image; args are podclient's.
func (s *space) podYAML(name, label, node string, args ...string) string {
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

// pod starts a pod that idles, and waits until it runs.
func (s *space) pod(name, label, node string) {
	s.t.Helper()
	s.apply(s.podYAML(name, label, node, "pause"))
	_, err := world.Kubectl(s.t.Context(), "wait", "--for=condition=Ready", "pod/"+name, "-n", s.name, "--timeout=60s")
	must(s.t, err)
}

// answer is what curl got in a pod.
type answer struct {
	status  int
	body    map[string]string
	raw     string
	headers string
}

func (a answer) token() string  { return a.body["access_token"] }
func (a answer) reason() string { return a.body["reason"] }

// ask runs an unmodified curl in the pod's network and asks for a token.
func (s *space) ask(pod, resource string, query ...string) answer {
	s.t.Helper()
	target := "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + url.QueryEscape(resource)
	if len(query) > 0 {
		target += "&" + strings.Join(query, "&")
	}
	return s.curl(pod, "-H", "Metadata: true", target)
}

// curl runs an unmodified curl in the pod's network. A connection that fails is status 0.
func (s *space) curl(pod string, args ...string) answer {
	s.t.Helper()
	cmd, err := world.InPodCommand(s.t.Context(), s.name, pod, "curl", append([]string{"-s", "--max-time", "30", "--path-as-is", "-D", "/dev/stderr", "-w", "\n%{http_code}"}, args...)...)
	must(s.t, err)
	var out, headers strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &headers
	_ = cmd.Run() // its status is in what it prints
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

// mustHaveTokenOf checks signature, audience, application and object of the answer's token.
func (s *space) mustHaveTokenOf(a answer, id azure.Identity, resource string) {
	s.t.Helper()
	if a.status != 200 {
		s.t.Fatalf("status %d: %s", a.status, a.raw)
	}
	claims, err := cloud.Verify(a.token())
	must(s.t, err)
	if claims.AppID != id.ClientID || claims.ObjectID != id.ObjectID || claims.Audience != resource || claims.TenantID != id.TenantID {
		s.t.Fatalf("this is a token of appid %s, oid %s for %s; want %+v for %s", claims.AppID, claims.ObjectID, claims.Audience, id, resource)
	}
	if a.body["client_id"] != id.ClientID || a.body["resource"] != resource || a.body["token_type"] != "Bearer" || a.body["expires_in"] == "" || a.body["not_before"] == "" {
		s.t.Fatalf("the answer around the token is %s", a.raw)
	}
}

func (s *space) mustBeRefused(a answer, status int, reason string) {
	s.t.Helper()
	if a.status != status || a.reason() != reason || a.token() != "" {
		s.t.Errorf("got %d %s; want %d and reason %s", a.status, a.raw, status, reason)
	}
}

// eventually asks until the answer is nil. It is for what other programs do in their own time.
func eventually(t *testing.T, within time.Duration, check func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", within, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// nothingFromPods checks that no packet of a pod has reached the real metadata service since the stand-in's counts were
// last reset.
func nothingFromPods(t *testing.T) {
	t.Helper()
	stats, err := cloud.Stats(t.Context())
	must(t, err)
	if stats.IMDS.RequestsFromPods != 0 || stats.IMDS.ConnectionsFromPods != 0 {
		entries, _ := cloud.Log(t.Context(), 0)
		for _, e := range entries {
			if e.FromPod {
				t.Logf("%+v", e)
			}
		}
		t.Errorf("%d requests and %d connections of pods reached the metadata service", stats.IMDS.RequestsFromPods, stats.IMDS.ConnectionsFromPods)
	}
}

// nmiPod returns the name of NMI's pod on the node.
func nmiPod(t *testing.T, node string) string {
	t.Helper()
	out, err := world.Kubectl(t.Context(), "get", "pods", "-n", cluster.ChartNamespace, "-l", "app.kubernetes.io/component=nmi",
		"--field-selector", "spec.nodeName="+node, "-o", "jsonpath={.items[*].metadata.name}")
	must(t, err)
	if strings.Contains(out, " ") || out == "" {
		t.Fatalf("NMI's pods on %s: %q", node, out)
	}
	return out
}

// nmiReady reports whether NMI of the node says it is ready.
func nmiReady(ctx context.Context, node string) error {
	_, err := world.InNode(ctx, node, "curl", "-sf", "--max-time", "2", "http://127.0.0.1:8085/readyz")
	return err
}

// metric reads the sum of a metric of a node's NMI over all series whose labels contain all of the given texts.
func metric(t *testing.T, node, name string, labels ...string) float64 {
	t.Helper()
	out, err := world.InNode(t.Context(), node, "curl", "-sf", "--max-time", "5", "http://127.0.0.1:9090/metrics")
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
