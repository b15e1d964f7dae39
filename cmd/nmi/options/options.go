// Package options defines the flags of nmi. It is separate from package main so that the generator of the flag
// reference can import it.
package options

import (
	"fmt"
	"os"
	"strconv"

	"github.com/go-logr/zapr"
	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"

	"github.com/podidentity/podidentity/internal/logging"
	"github.com/podidentity/podidentity/nmi/telemetry"

	"github.com/spf13/pflag"

	"github.com/podidentity/podidentity/nmi"
)

// Options are the values of the flags. Most flags that AAD Pod Identity also has keep the name that they have there.
// For the few that have a new name, AddFlags also defines the old name, as a deprecated flag.
type Options struct {
	cfg        nmi.Config
	logLevel   string
	logFormat  string
	auditLevel string
}

// New returns Options with the defaults. Some of them depend on environment variables.
func New() *Options {
	o := &Options{cfg: nmi.DefaultConfig(), logLevel: "info", logFormat: "json", auditLevel: "info"}
	o.cfg.Node = os.Getenv("NODE_NAME")
	o.cfg.PodUID = os.Getenv("POD_UID")
	o.cfg.Kubeconfig = os.Getenv("KUBECONFIG")
	o.cfg.ForceNamespaced, _ = strconv.ParseBool(os.Getenv("FORCENAMESPACED"))
	return o
}

// AddCaptureFlags adds the flags that "nmi uninstall" shares with nmi: those of the iptables rules and of the main log.
func (o *Options) AddCaptureFlags(f *pflag.FlagSet) {
	c := &o.cfg
	f.StringVar(&c.ListenAddress, "nmi-listen-address", c.ListenAddress, "link-local `address` that NMI listens on, on a network interface of its own, podidentity0")
	f.IntVar(&c.ListenPort, "nmi-port", c.ListenPort, "`port` that NMI listens on")
	f.StringVar(&c.MetadataIP, "metadata-ip", c.MetadataIP, "`address` whose traffic is captured: that of IMDS")
	f.IntVar(&c.MetadataPort, "metadata-port", c.MetadataPort, "`port` whose traffic is captured: that of IMDS")
	f.IntVar(&c.BPFPort, "nmi-bpf-port", c.BPFPort, "`port` of the listen address for connections that are captured by cgroup")
	f.StringVar(&c.BPFMount, "bpf-mount", c.BPFMount, "`folder` in which the bpffs of the node is mounted, where the programs of the capture by cgroup are pinned")
	f.StringVar(&c.StateDir, "state-dir", c.StateDir, "`folder` in which NMI remembers the network links of the node for its next start; kept until the node reboots")
	f.StringVar(&c.Backend, "iptables-backend", c.Backend, "`name` of the iptables back end: auto (the one in which the node has rules), nft or legacy")
	f.StringVar(&o.logLevel, "log-level", o.logLevel, "lowest `level` that is logged: debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", o.logFormat, "`format` of the log: json or text")
}

// AddFlags adds all flags.
func (o *Options) AddFlags(f *pflag.FlagSet) {
	c := &o.cfg
	o.AddCaptureFlags(f)
	f.StringVar(&c.CaptureBy, "capture", c.CaptureBy, "`kind` of capture: iptables, bpf (by cgroup, which also identifies the pod), both, or auto (both where both are possible)")
	f.StringVar(&c.PodVerification, "pod-verification", c.PodVerification, "`mode` of finding the pod of a request: auto (by cgroup where it is known, otherwise by address), required (by cgroup alone) or off (by address alone)")
	f.StringVar(&c.CaptureHostNetwork, "capture-host-network", c.CaptureHostNetwork, "`which` pods in the host network are captured: none, bound (those with the label aadpodidbinding; others reach IMDS itself) or all (except those that an AzurePodIdentityException matches)")
	f.StringVar(&c.PodUID, "pod-uid", c.PodUID, "`UID` of NMI's pod, by which NMI finds the cgroup of all pods; default from POD_UID")
	f.StringVar(&c.CgroupMount, "cgroup-mount", c.CgroupMount, "`folder` in which the cgroups of the node are mounted")
	f.StringVar(&c.PodsCgroup, "pods-cgroup", "", "`folder` of the cgroup of all pods; default the one that contains NMI's pod")
	f.StringVar(&c.Node, "node", c.Node, "`name` of this node; default from NODE_NAME")
	f.StringVar(&c.Kubeconfig, "kubeconfig", c.Kubeconfig, "`file` with the address of the API server and the credentials; default the pod's service account")
	f.StringVar(&c.OperationMode, "operation-mode", c.OperationMode, "`mode` of the installation: managed (you attach identities to VMs and scale sets beforehand) or standard (MIC attaches them)")
	f.BoolVar(&c.ForceNamespaced, "force-namespaced", c.ForceNamespaced, "let a binding match only pods of its own namespace; always so in managed mode; default from FORCENAMESPACED")
	f.DurationVar(&c.AssignmentWait, "assignment-wait", c.AssignmentWait, "longest `time` that a request waits until MIC has assigned its identity, in standard mode; 0s to 60s, 0s does not wait")
	f.DurationVar(&c.SyncInterval, "iptables-sync-interval", c.SyncInterval, "`time` between checks of the iptables rules; 1s to 10m")
	f.DurationVar(&c.PodLookupTimeout, "pod-lookup-timeout", c.PodLookupTimeout, "longest `time` that a request waits for NMI's caches, and then again for the pod with the UID of its cgroup or with its source address; 100ms to 20s")
	f.DurationVar(&c.ShutdownTimeout, "shutdown-timeout", c.ShutdownTimeout, "longest `time` that NMI, when it stops, waits for requests in progress to finish; 1s to 5m")
	f.IntVar(&c.ProbePort, "http-probe-port", c.ProbePort, "`port` of /healthz and /readyz, on loopback")
	f.IntVar(&c.PrometheusPort, "prometheus-port", c.PrometheusPort, "`port` of /metrics")
	f.BoolVar(&c.BlockInstanceMetadata, "block-instance-metadata", false, "refuse /metadata/instance to pods")
	f.BoolVar(&c.MetadataHeaderRequired, "metadata-header-required", c.MetadataHeaderRequired, "refuse requests without the header \"Metadata: true\"")
	f.BoolVar(&c.AllowKubenet, "allow-network-plugin-kubenet", false, "start on nodes with kubenet, where pods with NET_RAW can take each other's addresses")
	f.StringVar(&c.KubeletConfig, "kubelet-config", c.KubeletConfig, "`file` with the flags of the kubelet, in which NMI looks for kubenet; empty disables the check")
	f.StringVar(&c.TenantID, "tenant-id", "", "`tenant` in the response of /metadata/identity/info; default what IMDS reports")
	f.StringVar(&c.UserAgent, "custom-user-agent", "", "`text` at the start of the User-Agent of token requests to Azure; default the name and version of the program")
	f.StringVar(&c.Authority, "authority-host", c.Authority, "`URL` of Entra ID for identities of types 1 to 3 without adEndpoint")
	f.StringVar(&c.CABundle, "ca-bundle", "", "`file` with CA certificates (PEM) to trust for Entra ID, in addition to the system's")
	f.StringVar(&c.ManagedIdentityBy, "managed-identity-by", c.ManagedIdentityBy, "`field` that names a managed identity to IMDS: client-id, or resource-id, which stays correct if the identity is deleted and created again under its name")
	f.BoolVar(&c.AllowCrossNamespaceSecrets, "allow-cross-namespace-secrets", false, "allow an AzureIdentity to name a Secret of another namespace; anyone who may create AzureIdentity objects can then use every Secret that NMI may read")
	f.BoolVar(&c.HostToken, "host-token", c.HostToken, "serve /host/token on 127.0.0.1, for the Secrets Store CSI driver; any program in the node's network can then request a token for any pod of the node")
	f.BoolVar(&c.Events, "events", c.Events, "report refusals as Events of pods")
	f.StringVar(&o.auditLevel, "audit-level", o.auditLevel, "`level` of the audit log: info (each token issued or refused), warn (refused only) or off")
	f.BoolVar(&c.Profile, "enable-profile", false, "serve pprof on 127.0.0.1:6060")

	// Flags of AAD Pod Identity that have another name here, so that its manifests still work.
	f.BoolVar(&c.ForceNamespaced, "forceNamespaced", c.ForceNamespaced, "")
	f.BoolVar(&c.Profile, "enableProfile", false, "")
	for old, now := range map[string]string{"forceNamespaced": "force-namespaced", "enableProfile": "enable-profile"} {
		_ = f.MarkDeprecated(old, "use --"+now)
	}
	// Flags of AAD Pod Identity that have no effect here. They are accepted, so that its manifests still work.
	for _, gone := range []struct{ name, why string }{
		{"MICNamespace", "it has no effect: NMI treats pods of MIC like other pods"},
		{"ipt-update-interval-sec", "use --iptables-sync-interval"},
		{"retry-attempts-for-created", "it has no effect: a waiting request continues when an object that it depends on changes"},
		{"retry-attempts-for-assigned", "it has no effect: a waiting request continues when an object that it depends on changes"},
		{"find-identity-retry-interval", "it has no effect: a waiting request continues when an object that it depends on changes"},
		{"enableScaleFeatures", "it has no effect: NMI always watches only the AzureAssignedIdentity objects of its node"},
		{"set-retry-after-header", "it has no effect: the header is always set when a client should retry"},
		{"enable-conntrack-deletion", "it has no effect: NMI always deletes tracked connections that bypass its rules"},
	} {
		f.String(gone.name, "", "")
		_ = f.MarkDeprecated(gone.name, gone.why)
	}
	for _, flag := range []string{"enableScaleFeatures", "set-retry-after-header", "enable-conntrack-deletion"} {
		f.Lookup(flag).NoOptDefVal = "true"
	}
}

// Config returns the configuration that the flags describe. version is part of the default User-Agent.
func (o *Options) Config(version string) nmi.Config {
	c := o.cfg
	if c.UserAgent == "" {
		c.UserAgent = "podidentity-nmi/" + version
	}
	return c
}

// WithLoggers calls do with the loggers that the flags describe, and returns the error of do. If a flag of the log is
// invalid, WithLoggers returns an error without calling do.
func (o *Options) WithLoggers(do func(telemetry.Loggers) error) error {
	level, err := logging.ParseLevel(o.logLevel)
	if err != nil {
		return err
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
