// Package options defines the flags of mic. It is a separate package so that the generator of the flag reference can
// import it.
package options

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/go-logr/zapr"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"

	"github.com/podidentity/podidentity/internal/logging"
	"github.com/podidentity/podidentity/mic"
)

// Options are the values of the flags. Most flags that AAD Pod Identity also has keep their names. For the few that
// have a new name, AddFlags also defines the old name, as a deprecated flag.
type Options struct {
	cfg       mic.Config
	logLevel  string
	logFormat string
}

// New returns Options with the defaults. Some of them depend on environment variables and on the host name.
func New() *Options {
	o := &Options{cfg: mic.DefaultConfig(), logLevel: "info", logFormat: "json"}
	o.cfg.Namespace = os.Getenv("MIC_POD_NAMESPACE")
	o.cfg.Kubeconfig = os.Getenv("KUBECONFIG")
	o.cfg.ForceNamespaced, _ = strconv.ParseBool(os.Getenv("FORCENAMESPACED"))
	// By default the host name in a pod is the name of the pod. If the host name is unknown, and
	// --leader-election-instance is not given, mic.Config.Validate returns an error.
	o.cfg.LeaderElection.Instance, _ = os.Hostname()
	return o
}

// AddFlags adds all flags.
func (o *Options) AddFlags(f *pflag.FlagSet) {
	c := &o.cfg
	f.StringVar(&c.Kubeconfig, "kubeconfig", c.Kubeconfig, "`file` with the address of the API server and the credentials; default the pod's service account")
	f.StringVar(&c.Namespace, "namespace", c.Namespace, "MIC's own `namespace`, where it stores its ledgers; default from MIC_POD_NAMESPACE")
	f.StringVar(&c.CloudConfig, "cloudconfig", c.CloudConfig, "`file` (azure.json) with the cloud and the credentials for Azure; if empty, MIC uses only environment variables; a change of the file takes effect within about 10s")
	f.StringVar(&c.CABundle, "ca-bundle", "", "`file` with CA certificates (PEM) to trust for Azure, in addition to the system's")
	f.StringVar(&c.UserAgent, "custom-user-agent", "", "`text` at the start of the User-Agent of requests to Azure; default the name and version of the program")
	f.BoolVar(&c.ForceNamespaced, "force-namespaced", c.ForceNamespaced, "let a binding match only pods of its own namespace; default from FORCENAMESPACED")
	f.StringSliceVar(&c.Immutable, "immutable-user-msis", nil, "comma-separated client `IDs` of identities that are never detached, even if MIC attached them")
	f.DurationVar(&c.ReconcileInterval, "identity-assignment-reconcile-interval", c.ReconcileInterval, "`time` between checks of a VM or VMSS, to attach again what somebody else detached; 10s to 1h")
	f.DurationVar(&c.DetachDelay, "detach-delay", c.DetachDelay, "`time` that an identity stays attached to a VM or VMSS after the last pod there that used it is gone; 0s to 1h")
	f.Float32Var(&c.QPS, "client-qps", c.QPS, "`requests` per second to the API server; 1 to 10000")
	f.IntVar(&c.Burst, "client-burst", c.Burst, "`requests` to the API server in a burst; 1 to 20000")
	f.IntVar(&c.Workers, "workers", c.Workers, "`pods` that are reconciled concurrently; 1 to 1000")
	f.IntVar(&c.ProbePort, "http-probe-port", c.ProbePort, "`port` of /healthz and /readyz")
	f.IntVar(&c.PrometheusPort, "prometheus-port", c.PrometheusPort, "`port` of /metrics")
	f.BoolVar(&c.Profile, "enable-profile", false, "serve pprof on 127.0.0.1:6060")
	l := &c.LeaderElection
	f.StringVar(&l.Instance, "leader-election-instance", l.Instance, "`name` of this MIC in the lease; default the host name")
	f.StringVar(&l.Namespace, "leader-election-namespace", "", "`namespace` of the lease; default the value of --namespace")
	f.StringVar(&l.Name, "leader-election-name", l.Name, "`name` of the lease")
	f.DurationVar(&l.Duration, "leader-election-duration", l.Duration, "`time` after which a leader that does not renew its lease is replaced; 5s to 5m")
	f.StringVar(&o.logLevel, "log-level", o.logLevel, "lowest `level` that is logged: debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", o.logFormat, "`format` of the log: json or text")
	o.addDeprecated(f)
}

// addDeprecated adds the flags of AAD Pod Identity that have another name in MIC, or that MIC does not need. Manifests
// of AAD Pod Identity therefore still work.
func (o *Options) addDeprecated(f *pflag.FlagSet) {
	c := &o.cfg
	f.BoolVar(&c.ForceNamespaced, "forceNamespaced", c.ForceNamespaced, "")
	f.BoolVar(&c.Profile, "enableProfile", false, "")
	f.Float32Var(&c.QPS, "clientQps", c.QPS, "")
	for old, now := range map[string]string{"forceNamespaced": "force-namespaced", "enableProfile": "enable-profile", "clientQps": "client-qps"} {
		_ = f.MarkDeprecated(old, "use --"+now)
	}
	// These flags have no effect.
	for _, unused := range []struct{ name, why string }{
		{"syncRetryDuration", "it has no effect: MIC retries by itself"},
		{"enableScaleFeatures", "it has no effect: MIC always labels AzureAssignedIdentity objects with their node"},
		{"createDeleteBatch", "it has no effect; use --workers"},
		{"config-map-name", "it has no effect: stored objects need no upgrade"},
		{"type-upgrade-status-key", "it has no effect: stored objects need no upgrade"},
		{"enable-type-upgrade", "it has no effect: stored objects need no upgrade"},
		{"update-user-msi-max-retry", "it has no effect: MIC itself decides when it retries an identity that Azure refuses"},
		{"update-user-msi-retry-interval", "it has no effect: MIC itself decides when it retries an identity that Azure refuses"},
	} {
		f.String(unused.name, "", "")
		_ = f.MarkDeprecated(unused.name, unused.why)
	}
	for _, flag := range []string{"enableScaleFeatures", "enable-type-upgrade"} {
		f.Lookup(flag).NoOptDefVal = "true"
	}
}

// Config returns the configuration that the flags describe. version is part of the default User-Agent.
func (o *Options) Config(version string) mic.Config {
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

// WithLogger calls do with the logger that the flags describe, and returns the error of do. If a flag of the log is
// invalid, WithLogger returns an error without calling do.
func (o *Options) WithLogger(do func(*zap.Logger) error) error {
	level, err := logging.ParseLevel(o.logLevel)
	if err != nil {
		return err
	}
	if o.logFormat != "json" && o.logFormat != "text" {
		return fmt.Errorf("--log-format %q is unknown; give json or text", o.logFormat)
	}
	w, stop := logging.Buffer(zapcore.Lock(os.Stderr))
	defer stop()
	log := logging.NewLogger(w, level, o.logFormat == "text")
	klog.SetLogger(zapr.NewLogger(log))
	return do(log)
}
