package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

const (
	micNamespace = "podidentity"
	micAccount   = "mic"
	// micMetrics and micProfiles are where MIC serves metrics and profiles by default.
	micMetrics  = "http://127.0.0.1:8888/metrics"
	micProfiles = "http://127.0.0.1:6060/debug/pprof/"
)

// micSecret is the application as which MIC authenticates to Entra ID, with the application's client secret.
var micSecret = azure.App{
	ClientID: "be9c4006-0000-4000-8000-000000000001", ObjectID: "be9c4007-0000-4000-8000-000000000001", Secrets: []azure.AppSecret{{Value: "not a secret"}},
}

// micEnvironment is MIC with a real API server, a fake ARM and a fake Entra ID, all in one network namespace that has
// only the loopback interface. There is no controller and no kubelet: nodes and pods are only objects, and the workload
// sets the status that a kubelet would report.
type micEnvironment struct {
	plane    *cluster.Plane
	dir      string
	k        clients
	azure    *azure.Client
	http     *http.Client // connects from inside the namespace
	children children
	binary   string
	args     []string // flags for MIC besides the required ones
	mic      *child   // nil before startMIC and after stopMIC
	log      *os.File
	workload *workload
	watcher  *watcher
}

func newMICEnvironment(ctx context.Context, args []string) (*micEnvironment, error) {
	dir, err := cluster.Scratch("bench")
	if err != nil {
		return nil, err
	}
	r := &micEnvironment{dir: dir, args: args}
	if err := r.build(ctx); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *micEnvironment) build(ctx context.Context) (err error) {
	if r.binary, err = buildProgram(ctx, "mic", r.dir); err != nil {
		return err
	}
	if r.plane, err = cluster.StartPlane(ctx, r.dir, func(line string) { printLine("   %s", line) }); err != nil {
		return err
	}
	r.http = &http.Client{Timeout: 10 * time.Minute, Transport: &http.Transport{DialContext: r.plane.DialContext}}
	if r.k, err = newClients(r.plane); err != nil {
		return err
	}
	if _, err := r.plane.Kubectl(ctx, "apply", "--server-side", "-f", filepath.Join(repo(), "deploy", "podidentity", "crds")); err != nil {
		return err
	}
	if _, err := r.plane.Kubectl(ctx, "wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"); err != nil {
		return err
	}
	if r.watcher, err = newWatcher(ctx, r.k.kube.CoreV1().RESTClient()); err != nil {
		return err
	}
	r.workload = &workload{k: r.k, watcher: r.watcher, random: rand.New(rand.NewPCG(1, 2))}
	if err := r.workload.createNodesAndIdentities(ctx); err != nil {
		return err
	}
	if r.log, err = os.Create(filepath.Join(r.dir, "mic.log")); err != nil {
		return err
	}
	return errors.Join(r.authorizeMIC(ctx), r.startAzure(ctx))
}

// close stops the processes that the environment started, and removes its folder.
func (r *micEnvironment) close() error {
	r.children.stop()
	var err error
	if r.plane != nil {
		err = r.plane.Stop()
	}
	if r.log != nil {
		r.log.Close()
	}
	return errors.Join(err, os.RemoveAll(r.dir))
}

// authorizeMIC creates a ServiceAccount and writes a kubeconfig with its token, so that the API server's limits for one
// user apply to MIC as in a pod. The ServiceAccount has all rights; other tests check that the chart's rights suffice.
func (r *micEnvironment) authorizeMIC(ctx context.Context) error {
	if err := r.workload.makeNamespace(ctx, micNamespace); err != nil {
		return err
	}
	if err := r.workload.makeAccount(ctx, micNamespace, micAccount); err != nil {
		return err
	}
	_, err := r.k.kube.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: micAccount},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: micNamespace, Name: micAccount}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	token, err := r.k.kube.CoreV1().ServiceAccounts(micNamespace).CreateToken(ctx, micAccount, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	config, err := clientcmd.LoadFromFile(r.plane.Kubeconfig())
	if err != nil {
		return err
	}
	for name := range config.AuthInfos {
		config.AuthInfos[name] = &clientcmdapi.AuthInfo{Token: token.Status.Token}
	}
	return clientcmd.WriteToFile(*config, r.file("mic.kubeconfig"))
}

func (r *micEnvironment) file(name string) string { return filepath.Join(r.dir, name) }

// startAzure runs the fake Azure with all scale sets and identities, and writes the configuration of a custom cloud for
// MIC.
func (r *micEnvironment) startAzure(ctx context.Context) error {
	config := azure.Config{
		IMDSAddr: "127.0.0.1:8081", EntraAddr: "127.0.0.1:8443", ControlSocket: r.file("azure.sock"), StateDir: r.file("azure"), Tenant: cluster.TenantID,
	}
	for set := range scaleSets {
		config.Nodes = append(config.Nodes, azure.Node{
			Name: nodeOf(set, 0), ProviderID: "azure://" + setID(set) + "/virtualMachines/0",
			Sources: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 240, 0, byte(set)}), 32)},
		})
	}
	const endpoint = "https://127.0.0.1:8443/"
	err := errors.Join(
		writeJSON(r.file("fake-azure.json"), config),
		writeJSON(r.file("azure.json"), map[string]any{
			"cloud": "AzureStackCloud", "tenantId": cluster.TenantID, "subscriptionId": cluster.SubscriptionID, "resourceGroup": "bench", "vmType": "vmss",
			"aadClientId": micSecret.ClientID, "aadClientSecret": micSecret.Secrets[0].Value}),
		writeJSON(r.file("cloud.json"), map[string]any{"resourceManagerEndpoint": endpoint, "activeDirectoryEndpoint": endpoint, "tokenAudience": endpoint}))
	if err != nil {
		return err
	}
	cmd, err := r.plane.Command(context.WithoutCancel(ctx), filepath.Join(repo(), "bin", "cluster"), "azure", "serve", "--config", r.file("fake-azure.json"))
	if err != nil {
		return err
	}
	cmd.Stderr = os.Stderr
	if _, err := r.children.start(cmd); err != nil {
		return fmt.Errorf("starting the fake Azure: %w", err)
	}
	r.azure = azure.Dial(config.ControlSocket)
	waiting, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if err := errors.Join(r.azure.WaitReady(waiting), r.azure.AddApp(ctx, micSecret)); err != nil {
		return err
	}
	return inParallel(identities, func(i int) error { return r.azure.DefineIdentity(ctx, identityOf(i)) })
}

func writeJSON(file string, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o600)
}

// startMIC runs MIC like the Deployment of the chart, and returns when MIC serves its metrics. Only the flags in
// r.args, profiling, and the flags for this environment differ from the defaults.
func (r *micEnvironment) startMIC(ctx context.Context) error {
	args := append([]string{"--kubeconfig=" + r.file("mic.kubeconfig"), "--namespace=" + micNamespace, "--cloudconfig=" + r.file("azure.json"),
		"--ca-bundle=" + filepath.Join(r.dir, "azure", azure.CAFile), "--leader-election-instance=bench", "--enable-profile"}, r.args...)
	cmd, err := r.plane.Command(context.WithoutCancel(ctx), r.binary, args...)
	if err != nil {
		return err
	}
	cmd.Stderr = r.log
	cmd.Env = []string{"GOMEMLIMIT=838860KiB" /* as in the chart */, "AZURE_ENVIRONMENT_FILEPATH=" + r.file("cloud.json")}
	if r.mic, err = r.children.start(cmd); err != nil {
		return fmt.Errorf("starting MIC: %w", err)
	}
	for range 600 {
		if _, err = r.get(ctx, micMetrics); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return r.withLog(fmt.Errorf("MIC did not serve its metrics in 600 attempts: %w", err))
}

// stopMIC ends MIC with SIGTERM, so that MIC releases its Lease.
func (r *micEnvironment) stopMIC() {
	r.mic.stop()
	r.mic = nil
}

// withLog adds the end of MIC's log to an error.
func (r *micEnvironment) withLog(err error) error {
	text, _ := os.ReadFile(r.log.Name())
	return fmt.Errorf("%w; the end of MIC's log:\n%s", err, text[max(0, len(text)-4000):])
}

func (r *micEnvironment) get(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := r.http.Do(req)
	if err != nil {
		return "", err
	}
	body, err := readAll(resp)
	return string(body), err
}

// work is the processor time and the requests of MIC: the totals at one point in time, or the
// differences between two such points.
type work struct {
	cpu time.Duration
	requests
	written float64 // writes of objects that only MIC writes, counted by the API server
}

func (w work) minus(b work) work {
	return work{w.cpu - b.cpu, requests{w.all - b.all, w.writes - b.writes}, w.written - b.written}
}

func (r *micEnvironment) work(ctx context.Context) (w work, err error) {
	own, err := r.get(ctx, micMetrics)
	if err != nil {
		return w, r.withLog(err)
	}
	if w.requests, err = readRequests(own); err != nil {
		return w, err
	}
	all, err := r.k.kube.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return w, fmt.Errorf("reading the metrics of the API server: %w", err)
	}
	if w.written, err = readWrites(string(all)); err != nil {
		return w, err
	}
	w.cpu, err = r.mic.cpu()
	return w, err
}

// armCalls has the greatest number of GETs, and the greatest number of PATCHes, that ARM received for one scale set.
type armCalls struct{ gets, patches int }

// armCalls returns the greatest numbers of requests to ARM for one scale set since the last call of armCalls.
func (r *micEnvironment) armCalls(ctx context.Context) (maxCalls armCalls, err error) {
	stats, err := r.azure.Stats(ctx)
	if err != nil {
		return maxCalls, err
	}
	for id, counts := range stats.ARM.Resources {
		if strings.Contains(id, "/virtualmachinescalesets/") {
			maxCalls.gets, maxCalls.patches = max(maxCalls.gets, counts.Get), max(maxCalls.patches, counts.Patch)
		}
	}
	return maxCalls, r.azure.ResetLog(ctx)
}

// waitAssigned waits until all of the pods are Assigned and there are as many assignments as pods in the workload. It
// returns how long each of the pods waited, sorted, and when the last one was Assigned.
func (r *micEnvironment) waitAssigned(ctx context.Context, pods []string) (waits []time.Duration, last time.Time, err error) {
	const maxWait = 20 * time.Minute
	deadline := time.Now().Add(maxWait)
	for {
		waiting, live, err := r.watcher.pending(pods)
		if err == nil {
			err = r.mic.alive()
		}
		switch want := r.workload.count(); {
		case err != nil:
			return nil, last, r.withLog(err)
		case waiting == 0 && live == want:
			waits, last = r.watcher.took(pods)
			return waits, last, nil
		case time.Now().After(deadline):
			return nil, last, r.withLog(fmt.Errorf("after %s, %d pods are still not Assigned, and there are %d assignments for %d pods", maxWait, waiting, live, want))
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, last, ctx.Err()
		}
	}
}
