package nmi

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/iptables"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/server"
)

// Config is everything NMI can be told. DefaultConfig has the defaults; cmd/nmi makes flags of the fields.
type Config struct {
	Node       string // name of the Node object of this machine
	Kubeconfig string // empty: the account of the pod

	OperationMode   string        // ModeManaged or ModeStandard, in any case
	ForceNamespaced bool          // implied by managed mode
	AssignmentWait  time.Duration // how long a request waits for MIC to assign its identity; standard mode only

	ListenAddress    string // link-local, not used by anything else on the node
	ListenPort       int
	MetadataIP       string
	MetadataPort     int
	Backend          string        // iptables.Backend
	SyncInterval     time.Duration // between two looks at the rules
	ProbePort        int           // health, on loopback
	PrometheusPort   int           // metrics, on all addresses
	PodLookupTimeout time.Duration // how long a request waits for its pod to become known
	ShutdownTimeout  time.Duration // how long requests under way have to end

	BlockInstanceMetadata  bool
	MetadataHeaderRequired bool
	AllowKubenet           bool
	KubeletConfig          string
	TenantID               string
	UserAgent              string
	Profile                bool // pprof, on loopback

	Authority                  string // of Entra ID, where an identity names none
	CABundle                   string // file; trusted for Entra ID besides the system's
	ManagedIdentityBy          string // what IMDS is told a managed identity by: ByClientID or ByResourceID
	AllowCrossNamespaceSecrets bool
	HostToken                  bool // serve /host/token, on loopback
	Events                     bool // tell refusals as Events of pods
}

// DefaultConfig returns the defaults. Where a setting means what it meant in the predecessor, its default is kept.
func DefaultConfig() Config {
	return Config{
		OperationMode:          ModeManaged,
		AssignmentWait:         25 * time.Second,
		ListenAddress:          "169.254.25.79",
		ListenPort:             2579,
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

// Ways of telling IMDS which managed identity is meant. Both are in the AzureIdentity. The resource ID stays the same
// when an identity is deleted and made again under its name.
const (
	ByClientID   = "client-id"
	ByResourceID = "resource-id"
)

// Operation modes.
const (
	ModeManaged  = "managed"  // identities are attached to the machines beforehand
	ModeStandard = "standard" // MIC attaches them
)

// Validate reports all that is wrong with the configuration, one sentence each.
func (c Config) Validate() error {
	var problems []error
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	port := func(flag string, p int) {
		if p < 1 || p > 65535 {
			bad("--%s %d is not a port; give one from 1 to 65535", flag, p)
		}
	}
	within := func(flag string, d, least, most time.Duration) {
		if d < least || d > most {
			bad("--%s %s is out of range; give a time from %s to %s", flag, d, least, most)
		}
	}
	if c.Node == "" {
		bad("the name of this node is missing; give --node, or set NODE_NAME from the pod's spec.nodeName")
	}
	if !c.standard() && !strings.EqualFold(c.OperationMode, ModeManaged) {
		bad("--operation-mode %q is unknown; give %s, or %s where MIC runs", c.OperationMode, ModeManaged, ModeStandard)
	}
	if ip, err := netip.ParseAddr(c.ListenAddress); err != nil || !ip.Is4() || !ip.IsLinkLocalUnicast() {
		bad("--nmi-listen-address %q is not a link-local IPv4 address; give one of 169.254.0.0/16 that nothing else on the node uses, such as 169.254.25.79", c.ListenAddress)
	}
	if ip, err := netip.ParseAddr(c.MetadataIP); err != nil || !ip.Is4() {
		bad("--metadata-ip %q is not an IPv4 address; on Azure it is 169.254.169.254", c.MetadataIP)
	} else if c.MetadataIP == c.ListenAddress {
		bad("--nmi-listen-address and --metadata-ip are both %s; NMI needs an address of its own", c.MetadataIP)
	}
	if _, err := iptables.ParseBackend(c.Backend); err != nil {
		bad("--iptables-backend: %w", err)
	}
	port("nmi-port", c.ListenPort)
	port("metadata-port", c.MetadataPort)
	port("http-probe-port", c.ProbePort)
	port("prometheus-port", c.PrometheusPort)
	if c.ProbePort == c.PrometheusPort || c.Profile && (c.ProbePort == server.ProfilePort || c.PrometheusPort == server.ProfilePort) {
		bad("--http-probe-port, --prometheus-port and the profiler's %d must differ", server.ProfilePort)
	}
	if _, err := identity.ParseAuthority(c.Authority); err != nil {
		bad("--authority-host: %w", err)
	}
	if c.ManagedIdentityBy != ByClientID && c.ManagedIdentityBy != ByResourceID {
		bad("--managed-identity-by %q is unknown; give %s or %s", c.ManagedIdentityBy, ByClientID, ByResourceID)
	}
	within("iptables-sync-interval", c.SyncInterval, time.Second, 10*time.Minute)
	within("assignment-wait", c.AssignmentWait, 0, request.MaxAssignmentWait)
	within("pod-lookup-timeout", c.PodLookupTimeout, 100*time.Millisecond, 20*time.Second)
	within("shutdown-timeout", c.ShutdownTimeout, time.Second, 5*time.Minute)
	return errors.Join(problems...)
}

func (c Config) standard() bool { return strings.EqualFold(c.OperationMode, ModeStandard) }

// rules are the settings that take part in the decision.
func (c Config) rules() identity.Rules {
	r := identity.Rules{Mode: identity.Managed, ForceNamespaced: true, AllowCrossNamespaceSecrets: c.AllowCrossNamespaceSecrets}
	if c.standard() {
		r.Mode, r.ForceNamespaced = identity.Standard, c.ForceNamespaced
	}
	return r
}

// maxAssignmentWait is how long a request may wait for an assignment.
func (c Config) maxAssignmentWait() time.Duration {
	if c.standard() {
		return c.AssignmentWait
	}
	return 0
}

// checkKubenet refuses a node whose pods are plugged by kubenet: there a pod with NET_RAW can take another pod's
// address by ARP, and the address is what NMI knows a pod by.
func (c Config) checkKubenet() error {
	if c.AllowKubenet || c.KubeletConfig == "" {
		return nil
	}
	text, err := os.ReadFile(c.KubeletConfig)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading --kubelet-config to find out whether the node uses kubenet: %w", err)
	}
	if strings.Contains(string(text), "--network-plugin=kubenet") {
		return fmt.Errorf("%s says that this node uses kubenet, where a pod can take the address of another by ARP; use another network plugin, or drop NET_RAW from all pods and give --allow-network-plugin-kubenet", c.KubeletConfig)
	}
	return nil
}

func (c Config) listen() netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(c.ListenAddress), uint16(c.ListenPort))
}

func (c Config) imds() netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(c.MetadataIP), uint16(c.MetadataPort))
}

// server is what the configuration says about serving.
func (c Config) server() server.Config {
	return server.Config{
		Listen: c.listen(), ProbePort: c.ProbePort, PrometheusPort: c.PrometheusPort, Profile: c.Profile,
		IMDS: c.imds(), HeaderOptional: !c.MetadataHeaderRequired, TenantID: c.TenantID, BlockInstance: c.BlockInstanceMetadata,
		MaxAssignmentWait: c.maxAssignmentWait(), ShutdownTimeout: c.ShutdownTimeout,
	}
}

// Capture returns what the configuration says about rules on the node.
func (c Config) Capture() iptables.Config {
	return iptables.Config{
		MetadataIP:   netip.MustParseAddr(c.MetadataIP),
		MetadataPort: uint16(c.MetadataPort),
		Listen:       c.listen(),
		Backend:      iptables.Backend(c.Backend),
	}
}
