// Package options defines the flags of nmi. It is a package of its own so that the reference of the flags is generated from it.
package options

import (
	"fmt"
	"os"
	"strconv"

	"github.com/go-logr/zapr"
	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"

	"github.com/podidentity/podidentity/nmi/telemetry"

	"github.com/spf13/pflag"

	"github.com/podidentity/podidentity/nmi"
)

// Options are the values of the flags. Names are the predecessor's where they mean the same.
type Options struct {
	cfg        nmi.Config
	logLevel   string
	logFormat  string
	auditLevel string
}

func New() *Options {
	o := &Options{cfg: nmi.DefaultConfig(), logLevel: "info", logFormat: "json", auditLevel: "info"}
	o.cfg.Node = os.Getenv("NODE_NAME")
	o.cfg.Kubeconfig = os.Getenv("KUBECONFIG")
	o.cfg.ForceNamespaced, _ = strconv.ParseBool(os.Getenv("FORCENAMESPACED"))
	return o
}

// AddCaptureFlags adds the flags that say what is captured and how, which removing it needs too.
func (o *Options) AddCaptureFlags(f *pflag.FlagSet) {
	c := &o.cfg
	f.StringVar(&c.ListenAddress, "nmi-listen-address", c.ListenAddress, "link-local `address` that NMI listens on; it gets a link of its own for it")
	f.IntVar(&c.ListenPort, "nmi-port", c.ListenPort, "`port` that NMI listens on")
	f.StringVar(&c.MetadataIP, "metadata-ip", c.MetadataIP, "`address` of the metadata service")
	f.IntVar(&c.MetadataPort, "metadata-port", c.MetadataPort, "`port` of the metadata service")
	f.StringVar(&c.Backend, "iptables-backend", c.Backend, "back end of iptables, by `name`: auto (the one that the node uses), nft or legacy")
	f.StringVar(&o.logLevel, "log-level", o.logLevel, "least important `level` that is logged: debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", o.logFormat, "`format` of the log: json or text")
}

func (o *Options) AddFlags(f *pflag.FlagSet) {
	c := &o.cfg
	o.AddCaptureFlags(f)
	f.StringVar(&c.Node, "node", c.Node, "`name` of this machine's Node; default from NODE_NAME")
	f.StringVar(&c.Kubeconfig, "kubeconfig", c.Kubeconfig, "`file` that says how to reach the API server; default the pod's own account")
	f.StringVar(&c.OperationMode, "operation-mode", c.OperationMode, "`mode` of the installation: managed (identities are attached to machines beforehand) or standard (MIC attaches them)")
	f.BoolVar(&c.ForceNamespaced, "force-namespaced", c.ForceNamespaced, "match pods, bindings and identities of one namespace only; managed mode always does")
	f.DurationVar(&c.AssignmentWait, "assignment-wait", c.AssignmentWait, "`time` that a request waits for MIC to assign its identity, in standard mode; 0 does not wait")
	f.DurationVar(&c.SyncInterval, "iptables-sync-interval", c.SyncInterval, "`time` between two looks at the rules on the node")
	f.DurationVar(&c.PodLookupTimeout, "pod-lookup-timeout", c.PodLookupTimeout, "`time` that a request waits until the pod behind its address is known")
	f.DurationVar(&c.ShutdownTimeout, "shutdown-timeout", c.ShutdownTimeout, "`time` that requests under way have to end when NMI stops")
	f.IntVar(&c.ProbePort, "http-probe-port", c.ProbePort, "`port` of /healthz and /readyz, on loopback")
	f.IntVar(&c.PrometheusPort, "prometheus-port", c.PrometheusPort, "`port` of /metrics")
	f.BoolVar(&c.BlockInstanceMetadata, "block-instance-metadata", false, "refuse /metadata/instance to pods")
	f.BoolVar(&c.MetadataHeaderRequired, "metadata-header-required", c.MetadataHeaderRequired, "refuse requests without the header \"Metadata: true\"")
	f.BoolVar(&c.AllowKubenet, "allow-network-plugin-kubenet", false, "run on nodes with kubenet, where pods with NET_RAW can take each other's addresses")
	f.StringVar(&c.KubeletConfig, "kubelet-config", c.KubeletConfig, "`file` with the kubelet's flags, in which kubenet is looked for")
	f.StringVar(&c.TenantID, "tenant-id", "", "`tenant` that /metadata/identity/info tells; default what the machine's service says")
	f.StringVar(&c.UserAgent, "custom-user-agent", "", "`text` that starts the User-Agent of requests to Azure")
	f.StringVar(&c.Authority, "authority-host", c.Authority, "`URL` of Entra ID, where an AzureIdentity names none in adEndpoint")
	f.StringVar(&c.CABundle, "ca-bundle", "", "`file` of certificates (PEM) that Entra ID is trusted by besides the system's")
	f.StringVar(&c.ManagedIdentityBy, "managed-identity-by", c.ManagedIdentityBy, "what the machine's service is told a managed identity `by`: client-id or resource-id")
	f.BoolVar(&c.AllowCrossNamespaceSecrets, "allow-cross-namespace-secrets", false, "let an AzureIdentity name a Secret of another namespace")
	f.BoolVar(&c.HostToken, "host-token", c.HostToken, "serve /host/token on 127.0.0.1, for the Secrets Store CSI driver; any program in the node's network may ask there for any pod")
	f.BoolVar(&c.Events, "events", c.Events, "tell refusals as Events of pods")
	f.StringVar(&o.auditLevel, "audit-level", o.auditLevel, "least important `level` of the audit: info (each token issued or refused), warn (refused) or off")
	f.BoolVar(&c.Profile, "enable-profile", false, "serve pprof on 127.0.0.1:6060")

	// Spellings of the predecessor that manifests of today use.
	f.BoolVar(&c.ForceNamespaced, "forceNamespaced", c.ForceNamespaced, "")
	f.BoolVar(&c.Profile, "enableProfile", false, "")
	for old, now := range map[string]string{"forceNamespaced": "force-namespaced", "enableProfile": "enable-profile"} {
		_ = f.MarkDeprecated(old, "use --"+now)
	}
	// Settings of the predecessor that nothing is left to set; accepted, so that its arguments start NMI.
	for _, gone := range []struct{ name, why string }{
		{"MICNamespace", "pods of MIC need no exception any more"},
		{"ipt-update-interval-sec", "use --iptables-sync-interval"},
		{"retry-attempts-for-created", "requests are held until the objects change"},
		{"retry-attempts-for-assigned", "requests are held until the objects change"},
		{"find-identity-retry-interval", "requests are held until the objects change"},
		{"enableScaleFeatures", "it is always on"},
		{"set-retry-after-header", "it is always set where a client should come again"},
		{"enable-conntrack-deletion", "it is always done"},
	} {
		f.String(gone.name, "", "")
		_ = f.MarkDeprecated(gone.name, gone.why)
	}
	for _, flag := range []string{"enableScaleFeatures", "set-retry-after-header", "enable-conntrack-deletion"} {
		f.Lookup(flag).NoOptDefVal = "true"
	}
}

func (o *Options) Config(version string) nmi.Config {
	c := o.cfg
	if c.UserAgent == "" {
		c.UserAgent = "podidentity-nmi/" + version
	}
	return c
}

// WithLoggers calls do with the loggers that the flags describe.
func (o *Options) WithLoggers(do func(telemetry.Loggers) error) error {
	level, err := zapcore.ParseLevel(o.logLevel)
	if err != nil {
		return fmt.Errorf("--log-level %q is unknown; give debug, info, warn or error", o.logLevel)
	}
	auditLevel, ok := map[string]zapcore.Level{"info": zapcore.InfoLevel, "warn": zapcore.WarnLevel, "off": zapcore.InvalidLevel}[o.auditLevel]
	if !ok {
		return fmt.Errorf("--audit-level %q is unknown; give info, warn or off", o.auditLevel)
	}
	if o.logFormat != "json" && o.logFormat != "text" {
		return fmt.Errorf("--log-format %q is unknown; give json or text", o.logFormat)
	}
	logs, stop := telemetry.NewLoggers(zapcore.Lock(os.Stderr), level, auditLevel, o.logFormat == "text")
	defer stop()
	klog.SetLogger(zapr.NewLogger(logs.Main))
	return do(logs)
}
