package options

import (
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"github.com/podidentity/podidentity/mic"
)

// configOf returns the configuration of a MIC that has the arguments args and the environment of a pod.
func configOf(t *testing.T, args ...string) mic.Config {
	t.Helper()
	t.Setenv("MIC_POD_NAMESPACE", "podidentity-system")
	t.Setenv("KUBECONFIG", "")
	o := New()
	flags := pflag.NewFlagSet("mic", pflag.ContinueOnError)
	flags.SetOutput(io.Discard)
	o.AddFlags(flags)
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	o.cfg.LeaderElection.Instance = "mic-1"
	return o.Config("v1")
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

func TestTheArgumentsOfAADPodIdentityAreAccepted(t *testing.T) {
	got := configOf(t, "--cloudconfig=/etc/kubernetes/azure.json", "--forceNamespaced", "--syncRetryDuration=1h",
		"--leader-election-instance=a", "--leader-election-namespace=default", "--leader-election-name=aad-pod-identity-mic",
		"--leader-election-duration=15s", "--http-probe-port=8080", "--prometheus-port=8888", "--enableProfile=true",
		"--enableScaleFeatures", "--createDeleteBatch=20", "--clientQps=5", "--immutable-user-msis=",
		"--config-map-name=aad-pod-identity-config", "--type-upgrade-status-key=type-upgrade-status", "--enable-type-upgrade",
		"--update-user-msi-max-retry=2", "--update-user-msi-retry-interval=1s", "--identity-assignment-reconcile-interval=3m",
		"--custom-user-agent=x", "--log-format=json")
	if !got.ForceNamespaced || !got.Profile || got.QPS != 5 || got.LeaderElection.Namespace != "default" {
		t.Errorf("the arguments have no effect: %+v", got)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
}

func TestTheEnvironmentOfAADPodIdentityIsRead(t *testing.T) {
	t.Setenv("FORCENAMESPACED", "true")
	if !configOf(t).ForceNamespaced {
		t.Error("FORCENAMESPACED has no effect")
	}
	if configOf(t, "--force-namespaced=false").ForceNamespaced {
		t.Error("the flag does not override the environment")
	}
}

func TestAnUnknownLevelIsRefused(t *testing.T) {
	for argument, want := range map[string]string{
		"--log-level=debug": "", "--log-level=info": "", "--log-level=warn": "", "--log-level=error": "",
		"--log-level=":      `--log-level "" is unknown; give debug, info, warn or error`,
		"--log-level=fatal": `--log-level "fatal" is unknown; give debug, info, warn or error`,
		"--log-level=panic": `--log-level "panic" is unknown; give debug, info, warn or error`,
	} {
		o := New()
		flags := pflag.NewFlagSet("", pflag.ContinueOnError)
		o.AddFlags(flags)
		if err := flags.Parse([]string{argument}); err != nil {
			t.Fatal(err)
		}
		called, got := false, ""
		if err := o.WithLogger(func(*zap.Logger) error { called = true; return nil }); err != nil {
			got = err.Error()
		}
		if got != want || called != (want == "") {
			t.Errorf("%s: got the error %q, want %q; the function was called: %v", argument, got, want, called)
		}
	}
}
