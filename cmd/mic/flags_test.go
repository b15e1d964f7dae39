package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/podidentity/podidentity/mic"
)

// configOf returns what MIC is told by arguments, in a pod.
func configOf(t *testing.T, args ...string) mic.Config {
	t.Helper()
	t.Setenv("MIC_POD_NAMESPACE", "podidentity-system")
	t.Setenv("KUBECONFIG", "")
	o := newOptions()
	flags := pflag.NewFlagSet("mic", pflag.ContinueOnError)
	flags.SetOutput(io.Discard)
	o.addTo(flags)
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	o.cfg.LeaderElection.Instance = "mic-1"
	return o.config("v1")
}

func TestInAPodTheDefaultsAreEnough(t *testing.T) {
	want := mic.DefaultConfig()
	want.Namespace, want.UserAgent = "podidentity-system", "podidentity-mic/v1"
	want.LeaderElection.Namespace, want.LeaderElection.Instance = "podidentity-system", "mic-1"
	got := configOf(t)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
}

func TestEachFlagReachesItsField(t *testing.T) {
	want := mic.Config{
		Kubeconfig: "/k", Namespace: "other", CloudConfig: "/etc/kubernetes/azure.json", CABundle: "/ca.pem", UserAgent: "team/1",
		Immutable:       []string{"c11e0000-0000-4000-8000-000000000001", "c11e0000-0000-4000-8000-000000000002"},
		ForceNamespaced: true, ReconcileInterval: time.Minute, DetachDelay: time.Second, QPS: 7.5, Burst: 8, Workers: 9,
		ProbePort: 8081, PrometheusPort: 8889, Profile: true,
		LeaderElection: mic.LeaderElection{Instance: "mic-1", Namespace: "leases", Name: "mic", Duration: 20 * time.Second},
	}
	got := configOf(t, "--kubeconfig=/k", "--namespace=other", "--cloudconfig=/etc/kubernetes/azure.json", "--ca-bundle=/ca.pem",
		"--custom-user-agent=team/1", "--immutable-user-msis=c11e0000-0000-4000-8000-000000000001, c11e0000-0000-4000-8000-000000000002",
		"--force-namespaced", "--identity-assignment-reconcile-interval=1m", "--detach-delay=1s", "--client-qps=7.5", "--client-burst=8",
		"--workers=9", "--http-probe-port=8081", "--prometheus-port=8889", "--enable-profile", "--leader-election-namespace=leases",
		"--leader-election-name=mic", "--leader-election-duration=20s")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
}

func TestArgumentsOfThePredecessorStartMIC(t *testing.T) {
	got := configOf(t, "--cloudconfig=/etc/kubernetes/azure.json", "--forceNamespaced", "--syncRetryDuration=1h",
		"--leader-election-instance=a", "--leader-election-namespace=default", "--leader-election-name=aad-pod-identity-mic",
		"--leader-election-duration=15s", "--http-probe-port=8080", "--prometheus-port=8888", "--enableProfile=true",
		"--enableScaleFeatures", "--createDeleteBatch=20", "--clientQps=5", "--immutable-user-msis=",
		"--config-map-name=aad-pod-identity-config", "--type-upgrade-status-key=type-upgrade-status", "--enable-type-upgrade",
		"--update-user-msi-max-retry=2", "--update-user-msi-retry-interval=1s", "--identity-assignment-reconcile-interval=3m",
		"--custom-user-agent=x", "--log-format=json")
	if !got.ForceNamespaced || !got.Profile || got.QPS != 5 || got.LeaderElection.Namespace != "default" {
		t.Errorf("the arguments did not get through: %+v", got)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
}

func TestTheEnvironmentOfThePredecessorCounts(t *testing.T) {
	t.Setenv("FORCENAMESPACED", "true")
	if !configOf(t).ForceNamespaced {
		t.Error("FORCENAMESPACED is not heard")
	}
	if configOf(t, "--force-namespaced=false").ForceNamespaced {
		t.Error("a flag does not count more than the environment")
	}
}

func TestPlanAndUninstallTakeTheArgumentsOfAMICThatRuns(t *testing.T) {
	for _, name := range []string{"plan", "uninstall"} {
		c, _, err := command().Find([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.ParseFlags([]string{"--cloudconfig=/a", "--leader-election-name=b", "--detach-delay=1m", "--forceNamespaced"}); err != nil {
			t.Errorf("mic %s: %v", name, err)
		}
	}
}

func TestHoldSaysThatAllIsDoneUntilItIsToldToEnd(t *testing.T) {
	listener, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	ctx, end := context.WithTimeout(t.Context(), time.Minute)
	defer end()
	ended := make(chan error, 1)
	go func() { ended <- holdOn(ctx, listener) }()
	response, err := http.Get("http://127.0.0.1:" + strconv.Itoa(port) + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Errorf("readyz is %s", response.Status)
	}
	taken := hold(ctx, port)
	if taken == nil || !strings.Contains(taken.Error(), "all is removed") {
		t.Errorf("on a port that is taken: %v", taken)
	}
	end()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
