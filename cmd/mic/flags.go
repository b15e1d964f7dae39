package main

import (
	"os"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/podidentity/podidentity/mic"
)

// options are the flags. Names are the predecessor's where they mean the same.
type options struct {
	cfg       mic.Config
	logLevel  string
	logFormat string
}

func newOptions() *options {
	o := &options{cfg: mic.DefaultConfig(), logLevel: "info", logFormat: "json"}
	o.cfg.Namespace = os.Getenv("MIC_POD_NAMESPACE")
	o.cfg.Kubeconfig = os.Getenv("KUBECONFIG")
	o.cfg.ForceNamespaced, _ = strconv.ParseBool(os.Getenv("FORCENAMESPACED"))
	o.cfg.LeaderElection.Instance, _ = os.Hostname() // a pod's is its name; without any, Validate asks for one
	return o
}

func (o *options) addTo(f *pflag.FlagSet) {
	c := &o.cfg
	f.StringVar(&c.Kubeconfig, "kubeconfig", c.Kubeconfig, "`file` that says how to reach the API server; default the pod's own account")
	f.StringVar(&c.Namespace, "namespace", c.Namespace, "MIC's own `namespace`, where it writes down what it attached; default from MIC_POD_NAMESPACE")
	f.StringVar(&c.CloudConfig, "cloudconfig", c.CloudConfig, "`file` (azure.json) that says how to reach Azure; default the environment alone")
	f.StringVar(&c.CABundle, "ca-bundle", "", "`file` of certificates (PEM) that Azure is trusted by besides the system's")
	f.StringVar(&c.UserAgent, "custom-user-agent", "", "`text` that starts the User-Agent of requests to Azure")
	f.BoolVar(&c.ForceNamespaced, "force-namespaced", c.ForceNamespaced, "match pods, bindings and identities of one namespace only")
	f.StringSliceVar(&c.Immutable, "immutable-user-msis", nil, "client `IDs`, with commas between them, of identities that are never detached")
	f.DurationVar(&c.ReconcileInterval, "identity-assignment-reconcile-interval", c.ReconcileInterval, "`time` between two looks at what a machine has, to attach again what somebody detached")
	f.DurationVar(&c.DetachDelay, "detach-delay", c.DetachDelay, "`time` that an identity stays attached after its last pod on a machine")
	f.Float32Var(&c.QPS, "client-qps", c.QPS, "`requests` to the API server, a second")
	f.IntVar(&c.Burst, "client-burst", c.Burst, "`requests` to the API server at once")
	f.IntVar(&c.Workers, "workers", c.Workers, "`pods` that are worked on at a time")
	f.IntVar(&c.ProbePort, "http-probe-port", c.ProbePort, "`port` of /healthz and /readyz")
	f.IntVar(&c.PrometheusPort, "prometheus-port", c.PrometheusPort, "`port` of /metrics")
	f.BoolVar(&c.Profile, "enable-profile", false, "serve pprof on 127.0.0.1:6060")
	l := &c.LeaderElection
	f.StringVar(&l.Instance, "leader-election-instance", l.Instance, "`name` of this MIC in the lease; default that of the host")
	f.StringVar(&l.Namespace, "leader-election-namespace", "", "`namespace` of the lease; default that of --namespace")
	f.StringVar(&l.Name, "leader-election-name", l.Name, "`name` of the lease")
	f.DurationVar(&l.Duration, "leader-election-duration", l.Duration, "`time` that a leader which is not heard of remains leader")
	f.StringVar(&o.logLevel, "log-level", o.logLevel, "least important `level` that is logged: debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", o.logFormat, "`format` of the log: json or text")
	o.addPredecessorsTo(f)
}

// addPredecessorsTo adds what arguments of today's manifests contain.
func (o *options) addPredecessorsTo(f *pflag.FlagSet) {
	c := &o.cfg
	f.BoolVar(&c.ForceNamespaced, "forceNamespaced", c.ForceNamespaced, "")
	f.BoolVar(&c.Profile, "enableProfile", false, "")
	f.Float32Var(&c.QPS, "clientQps", c.QPS, "")
	for old, now := range map[string]string{"forceNamespaced": "force-namespaced", "enableProfile": "enable-profile", "clientQps": "client-qps"} {
		_ = f.MarkDeprecated(old, "use --"+now)
	}
	// Settings that nothing is left to set.
	for _, gone := range []struct{ name, why string }{
		{"syncRetryDuration", "what failed is tried again by itself"},
		{"enableScaleFeatures", "it is always on"},
		{"createDeleteBatch", "use --workers"},
		{"config-map-name", "stored objects need no upgrade"},
		{"type-upgrade-status-key", "stored objects need no upgrade"},
		{"enable-type-upgrade", "stored objects need no upgrade"},
		{"update-user-msi-max-retry", "an identity that Azure refuses is set aside, and tried again by itself"},
		{"update-user-msi-retry-interval", "an identity that Azure refuses is set aside, and tried again by itself"},
	} {
		f.String(gone.name, "", "")
		_ = f.MarkDeprecated(gone.name, gone.why)
	}
	for _, flag := range []string{"enableScaleFeatures", "enable-type-upgrade"} {
		f.Lookup(flag).NoOptDefVal = "true"
	}
}

func (o *options) config(version string) mic.Config {
	c := o.cfg
	if c.UserAgent == "" {
		c.UserAgent = "podidentity-mic/" + version
	}
	if c.LeaderElection.Namespace == "" {
		c.LeaderElection.Namespace = c.Namespace
	}
	for i, id := range c.Immutable {
		c.Immutable[i] = strings.TrimSpace(id)
	}
	return c
}
