package nmi

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/iptables"
	"github.com/podidentity/podidentity/nmi/links"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/server"
)

// Config has all settings of NMI. DefaultConfig has the defaults; cmd/nmi/options defines a flag for each field.
type Config struct {
	Node       string // name of the Node object of this node
	Kubeconfig string // if empty, NMI uses the ServiceAccount of its pod

	OperationMode   string        // ModeManaged or ModeStandard, case-insensitive
	ForceNamespaced bool          // managed mode behaves as if it were true
	AssignmentWait  time.Duration // how long a request waits for MIC to assign its identity; standard mode only

	ListenAddress      string // link-local, not used by anything else on the node
	ListenPort         int
	MetadataIP         string
	MetadataPort       int
	BPFPort            int           // of ListenAddress, for connections that package bpf redirects
	CaptureBy          string        // CaptureAuto, CaptureIPTables, CaptureBPF or CaptureBoth
	PodVerification    string        // a request.PodVerification
	CaptureHostNetwork string        // which pods in the host network are captured: HostNetworkNone, HostNetworkBound or HostNetworkAll
	PodUID             string        // of the pod of NMI; used to find the cgroup of all pods
	CgroupMount        string        // where the cgroups of the node are mounted
	BPFMount           string        // where the bpffs of the node is mounted
	PodsCgroup         string        // the cgroup of all pods; empty: NMI searches for it
	StateDir           string        // where NMI remembers the network links of the node for its next start
	Backend            string        // an iptables.Backend
	SyncInterval       time.Duration // between two checks of the capture
	ProbePort          int           // for probes, on loopback
	PrometheusPort     int           // for metrics, on all addresses
	PodLookupTimeout   time.Duration // how long a request waits for the caches to sync, and then once more for its pod
	ShutdownTimeout    time.Duration // how long requests in flight have to end

	BlockInstanceMetadata  bool
	MetadataHeaderRequired bool
	AllowKubenet           bool
	KubeletConfig          string
	TenantID               string
	UserAgent              string
	Profile                bool // serve pprof on loopback

	Authority                  string // the Entra ID endpoint for identities that name none
	CABundle                   string // file of certificates that are trusted for Entra ID in addition to the system's
	ManagedIdentityBy          string // names a managed identity in requests to IMDS: ByClientID or ByResourceID
	AllowCrossNamespaceSecrets bool
	HostToken                  bool // serve /host/token on loopback
	Events                     bool // report refusals as Events of pods
}

// DefaultConfig returns the defaults. Settings that AAD Pod Identity also has keep the defaults that they have there,
// except OperationMode (there standard), ProbePort (there 8080) and SyncInterval (there 60 s).
func DefaultConfig() Config {
	return Config{
		OperationMode:          ModeManaged,
		AssignmentWait:         25 * time.Second,
		ListenAddress:          "169.254.25.79",
		ListenPort:             2579,
		BPFPort:                2578,
		CaptureBy:              CaptureAuto,
		PodVerification:        string(request.VerifyAuto),
		CaptureHostNetwork:     HostNetworkNone,
		CgroupMount:            "/sys/fs/cgroup",
		BPFMount:               "/sys/fs/bpf",
		StateDir:               "/run/podidentity",
		MetadataIP:             "169.254.169.254",
		MetadataPort:           80,
		Backend:                string(iptables.BackendAuto),
		SyncInterval:           10 * time.Second,
		ProbePort:              8085,
		PrometheusPort:         9090,
		PodLookupTimeout:       5 * time.Second,
		ShutdownTimeout:        20 * time.Second,
		MetadataHeaderRequired: true,
		KubeletConfig:          "/etc/default/kubelet",
		Authority:              "https://login.microsoftonline.com/",
		ManagedIdentityBy:      ByClientID,
		HostToken:              true,
		Events:                 true,
	}
}

// Values of ManagedIdentityBy. An AzureIdentity has both IDs. The resource ID stays the same if the managed identity is
// deleted and created again with the same name.
const (
	ByClientID   = "client-id"
	ByResourceID = "resource-id"
)

// Values of CaptureBy.
const (
	CaptureAuto     = "auto"     // both if both are possible, otherwise the one that is possible
	CaptureIPTables = "iptables" // only by package iptables
	CaptureBPF      = "bpf"      // only by package bpf
	CaptureBoth     = "both"
)

// Values of CaptureHostNetwork.
const (
	HostNetworkNone  = "none"
	HostNetworkBound = "bound" // those with the label v1.BindingLabel
	HostNetworkAll   = "all"   // all except those that an AzurePodIdentityException matches
)

// Operation modes.
const (
	ModeManaged  = "managed"  // identities are attached to the VM or VMSS beforehand
	ModeStandard = "standard" // MIC attaches them
)

// Validate returns an error with all problems of the configuration, one sentence each.
func (c Config) Validate() error {
	var problems []error
	add := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if c.Node == "" {
		add("the name of this node is missing; give --node, or set NODE_NAME from the pod's spec.nodeName")
	}
	if !c.standard() && !strings.EqualFold(c.OperationMode, ModeManaged) {
		add("--operation-mode %q is unknown; give %s, or %s where MIC runs", c.OperationMode, ModeManaged, ModeStandard)
	}
	if _, err := identity.ParseAuthority(c.Authority); err != nil {
		add("--authority-host: %w", err)
	}
	if c.ManagedIdentityBy != ByClientID && c.ManagedIdentityBy != ByResourceID {
		add("--managed-identity-by %q is unknown; give %s or %s", c.ManagedIdentityBy, ByClientID, ByResourceID)
	}
	return errors.Join(append(problems, c.validateCapture(), c.validatePorts(), c.validateDurations())...)
}

// validateCapture returns an error with all problems of the settings of the capture, one sentence each. The method iptables
// panics if an address is invalid.
func (c Config) validateCapture() error {
	var problems []error
	add := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if ip, err := netip.ParseAddr(c.ListenAddress); err != nil || !ip.Is4() || !ip.IsLinkLocalUnicast() {
		add("--nmi-listen-address %q is not a link-local IPv4 address; give one of 169.254.0.0/16 that nothing else on the node uses, such as 169.254.25.79", c.ListenAddress)
	}
	if ip, err := netip.ParseAddr(c.MetadataIP); err != nil || !ip.Is4() {
		add("--metadata-ip %q is not an IPv4 address; on Azure it is 169.254.169.254", c.MetadataIP)
	} else if c.MetadataIP == c.ListenAddress {
		add("--nmi-listen-address and --metadata-ip are both %s; NMI needs an address of its own", c.MetadataIP)
	}
	if _, err := iptables.ParseBackend(c.Backend); err != nil {
		add("--iptables-backend: %w", err)
	}
	switch c.CaptureBy {
	case CaptureAuto, CaptureIPTables, CaptureBPF, CaptureBoth:
	default:
		add("--capture %q is unknown; give %s, %s, %s or %s", c.CaptureBy, CaptureAuto, CaptureIPTables, CaptureBPF, CaptureBoth)
	}
	if !filepath.IsAbs(c.StateDir) {
		add("--state-dir %q is not an absolute path; give a folder that is kept while NMI restarts, such as /run/podidentity", c.StateDir)
	}
	if !filepath.IsAbs(c.BPFMount) {
		add("--bpf-mount %q is not an absolute path; give the folder in which bpffs is mounted, such as /sys/fs/bpf", c.BPFMount)
	}
	switch v := request.PodVerification(c.PodVerification); {
	case v != request.VerifyAuto && v != request.VerifyRequired && v != request.VerifyOff:
		add("--pod-verification %q is unknown; give %s, %s or %s", c.PodVerification, request.VerifyAuto, request.VerifyRequired, request.VerifyOff)
	case v == request.VerifyRequired && c.CaptureBy == CaptureIPTables:
		add("--pod-verification=%s needs the cgroup of each caller, which --capture=%s does not record; give --capture=%s", v, CaptureIPTables, CaptureBoth)
	}
	switch c.CaptureHostNetwork {
	case HostNetworkNone:
	case HostNetworkBound, HostNetworkAll:
		if c.CaptureBy == CaptureIPTables || c.PodVerification == string(request.VerifyOff) {
			add("--capture-host-network=%s needs the cgroup of each caller, because all pods in the host network have the address of the node; give neither --capture=%s nor --pod-verification=%s with it", c.CaptureHostNetwork, CaptureIPTables, request.VerifyOff)
		}
		if c.PodUID == "" {
			add("--capture-host-network=%s needs --pod-uid: NMI is in the host network itself, and must not capture its own requests", c.CaptureHostNetwork)
		}
	default:
		add("--capture-host-network %q is unknown; give %s, %s or %s", c.CaptureHostNetwork, HostNetworkNone, HostNetworkBound, HostNetworkAll)
	}
	return errors.Join(append(problems, c.validateCapturePorts())...)
}

func (c Config) validateCapturePorts() error {
	problems := []error{validatePort("nmi-port", c.ListenPort), validatePort("nmi-bpf-port", c.BPFPort), validatePort("metadata-port", c.MetadataPort)}
	if c.ListenPort == c.BPFPort {
		problems = append(problems, fmt.Errorf("--nmi-port and --nmi-bpf-port are both %d; choose different ports", c.ListenPort))
	}
	return errors.Join(problems...)
}

func (c Config) validatePorts() error {
	problems := []error{validatePort("http-probe-port", c.ProbePort), validatePort("prometheus-port", c.PrometheusPort)}
	if c.ProbePort == c.PrometheusPort || c.Profile && (c.ProbePort == server.ProfilePort || c.PrometheusPort == server.ProfilePort) {
		problems = append(problems, fmt.Errorf("--http-probe-port %d and --prometheus-port %d must differ from each other and, with --enable-profile, from the port of pprof, %d; choose other ports", c.ProbePort, c.PrometheusPort, server.ProfilePort))
	}
	return errors.Join(problems...)
}

func validatePort(flag string, port int) error {
	if port < 1 || port > 65535 {
		return fmt.Errorf("--%s %d is not a port; give one from 1 to 65535", flag, port)
	}
	return nil
}

func (c Config) validateDurations() error {
	var problems []error
	for _, d := range []struct {
		flag            string
		value, min, max time.Duration
	}{
		{"iptables-sync-interval", c.SyncInterval, time.Second, 10 * time.Minute},
		{"assignment-wait", c.AssignmentWait, 0, request.MaxAssignmentWait},
		{"pod-lookup-timeout", c.PodLookupTimeout, 100 * time.Millisecond, 20 * time.Second},
		{"shutdown-timeout", c.ShutdownTimeout, time.Second, 5 * time.Minute},
	} {
		if d.value < d.min || d.value > d.max {
			problems = append(problems, fmt.Errorf("--%s %s is out of range; give a duration from %s to %s", d.flag, d.value, d.min, d.max))
		}
	}
	return errors.Join(problems...)
}

// pinDir is where package bpf pins its programs.
func (c Config) pinDir() string { return filepath.Join(c.BPFMount, "podidentity") }

// linksFile is where package links remembers its table.
func (c Config) linksFile() string { return filepath.Join(c.StateDir, links.FileName) }

// confirmsAddresses reports whether the address of a caller has to be confirmed if its cgroup is unknown.
func (c Config) confirmsAddresses() bool {
	return c.PodVerification == string(request.VerifyAuto)
}

func (c Config) capturesHostNetwork() bool { return c.CaptureHostNetwork != HostNetworkNone }

func (c Config) standard() bool { return strings.EqualFold(c.OperationMode, ModeStandard) }

// rules returns the settings that the decision needs.
func (c Config) rules() identity.Rules {
	r := identity.Rules{Mode: identity.Managed, ForceNamespaced: true, AllowCrossNamespaceSecrets: c.AllowCrossNamespaceSecrets, ExceptUnlabelledHostPods: c.CaptureHostNetwork == HostNetworkBound}
	if c.standard() {
		r.Mode, r.ForceNamespaced = identity.Standard, c.ForceNamespaced
	}
	return r
}

// maxAssignmentWait returns how long a request may wait for an assignment.
func (c Config) maxAssignmentWait() time.Duration {
	if c.standard() {
		return c.AssignmentWait
	}
	return 0
}

// checkKubenet returns an error if the file KubeletConfig says that the node uses kubenet, or if the file exists but
// cannot be read. It checks nothing if AllowKubenet is set or KubeletConfig is empty. With kubenet a pod with NET_RAW
// can take the address of another pod by ARP. Where the cgroup of a caller is unknown, NMI identifies pods by their
// address, so that pod could then get the tokens of the other pod.
func (c Config) checkKubenet() error {
	if c.AllowKubenet || c.KubeletConfig == "" {
		return nil
	}
	text, err := os.ReadFile(c.KubeletConfig)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the file of --kubelet-config to check whether the node uses kubenet: %w; correct the file, or disable the check with an empty --kubelet-config", err)
	}
	if strings.Contains(string(text), "--network-plugin=kubenet") {
		return fmt.Errorf("%s says that this node uses kubenet, in which a pod can take the address of another pod by ARP; use another network plugin, or drop NET_RAW from all pods and give --allow-network-plugin-kubenet", c.KubeletConfig)
	}
	return nil
}

func (c Config) listen() netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(c.ListenAddress), uint16(c.ListenPort))
}

// listenIdentified returns the address for connections that package bpf redirects.
func (c Config) listenIdentified() netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(c.ListenAddress), uint16(c.BPFPort))
}

func (c Config) imds() netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(c.MetadataIP), uint16(c.MetadataPort))
}

// server returns the settings of package server.
func (c Config) server() server.Config {
	return server.Config{
		Listen: c.listen(), ProbePort: c.ProbePort, PrometheusPort: c.PrometheusPort, Profile: c.Profile,
		IMDS: c.imds(), HeaderOptional: !c.MetadataHeaderRequired, TenantID: c.TenantID, BlockInstanceMetadata: c.BlockInstanceMetadata,
		MaxAssignmentWait: c.maxAssignmentWait(), ShutdownTimeout: c.ShutdownTimeout,
	}
}

// iptables returns the settings of package iptables. The configuration must be valid: see validateCapture. withBPF says whether package bpf captures, too.
func (c Config) iptables(withBPF bool) iptables.Config {
	var identified uint16
	if withBPF {
		identified = uint16(c.BPFPort)
	}
	return iptables.Config{
		IdentifiedPort: identified,
		MetadataIP:     netip.MustParseAddr(c.MetadataIP),
		MetadataPort:   uint16(c.MetadataPort),
		Listen:         c.listen(),
		Backend:        iptables.Backend(c.Backend),
	}
}
