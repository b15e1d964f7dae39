package mic

import (
	"errors"
	"fmt"
	"regexp"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Config is the configuration of MIC. DefaultConfig returns the defaults; cmd/mic/options defines the flags.
type Config struct {
	Kubeconfig string // empty: the service account of the pod
	Namespace  string // in which MIC runs and stores its ledgers

	CloudConfig string   // path of azure.json; empty: MIC reads only environment variables
	CABundle    string   // file of CA certificates to trust for Azure, in addition to the system's
	UserAgent   string   // start of the User-Agent of requests to Azure
	Immutable   []string // client IDs of identities that are never detached

	ForceNamespaced   bool          // a binding applies only to pods of its own namespace
	ReconcileInterval time.Duration // longest time between checks of a machine, unless a check fails
	DetachDelay       time.Duration // minimum time that an identity stays attached to a machine whose pods do not need it

	QPS     float32 // requests per second to the API server
	Burst   int
	Workers int // pods that are reconciled concurrently

	ProbePort      int // health, on all addresses
	PrometheusPort int // metrics, on all addresses
	Profile        bool

	LeaderElection LeaderElection
}

// LeaderElection configures how several MICs elect the one that reconciles.
type LeaderElection struct {
	Instance  string // this MIC's name in the lease
	Namespace string // of the lease
	Name      string // of the lease
	Duration  time.Duration
}

// DefaultConfig returns the defaults. A setting that means the same as in AAD Pod Identity has the same default, except
// QPS: with the 5 requests per second of AAD Pod Identity, MIC would need 13 minutes for 2,000 pods, because each pod
// takes two writes.
func DefaultConfig() Config {
	return Config{
		ReconcileInterval: 3 * time.Minute,
		DetachDelay:       2 * time.Minute,
		QPS:               200,
		Burst:             400,
		Workers:           32,
		ProbePort:         8080,
		PrometheusPort:    8888,
		LeaderElection:    LeaderElection{Name: "aad-pod-identity-mic", Duration: 15 * time.Second},
	}
}

// profilePort is the port on loopback where MIC serves pprof if Config.Profile is set.
const profilePort = 6060

var guid = regexp.MustCompile(`^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$`)

// Validate returns all mistakes in the configuration, one sentence each.
func (c Config) Validate() error {
	var problems []error
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	port := func(flag string, p int) {
		if p < 1 || p > 65535 {
			bad("--%s %d is not a port; give one from 1 to 65535", flag, p)
		}
	}
	within := func(flag string, d, minimum, maximum time.Duration) {
		if d < minimum || d > maximum {
			bad("--%s %s is out of range; give a time from %s to %s", flag, d, minimum, maximum)
		}
	}
	number := func(flag string, n float64, minimum, maximum int) {
		if !(n >= float64(minimum) && n <= float64(maximum)) { // NaN is not in any range
			bad("--%s %v is out of range; give a number from %d to %d", flag, n, minimum, maximum)
		}
	}
	if c.Namespace == "" {
		bad("MIC's own namespace is missing; give --namespace, or set MIC_POD_NAMESPACE from the pod's metadata.namespace")
	} else if len(validation.IsDNS1123Label(c.Namespace)) > 0 {
		bad("--namespace %q is not the name of a namespace; give the one that MIC runs in", c.Namespace)
	}
	for _, id := range c.Immutable {
		if !guid.MatchString(id) {
			bad("--immutable-user-msis: %q is not a client ID; give client IDs, which are GUIDs (az identity show --query clientId prints them), with commas between them", id)
		}
	}
	within("identity-assignment-reconcile-interval", c.ReconcileInterval, 10*time.Second, time.Hour)
	within("detach-delay", c.DetachDelay, 0, time.Hour)
	number("client-qps", float64(c.QPS), 1, 10000)
	number("client-burst", float64(c.Burst), 1, 20000)
	number("workers", float64(c.Workers), 1, 1000)
	port("http-probe-port", c.ProbePort)
	port("prometheus-port", c.PrometheusPort)
	if c.ProbePort == c.PrometheusPort || c.Profile && (c.ProbePort == profilePort || c.PrometheusPort == profilePort) {
		bad("--http-probe-port %d and --prometheus-port %d must differ from each other and, with --enable-profile, from %d, the port of the profiler", c.ProbePort, c.PrometheusPort, profilePort)
	}
	lead := c.LeaderElection
	if lead.Instance == "" {
		bad("the name of this MIC in the lease is missing; give --leader-election-instance")
	}
	// The default of --leader-election-namespace is the value of --namespace. If both are missing, the error about
	// --namespace is enough.
	if c.Namespace != "" && len(validation.IsDNS1123Label(lead.Namespace)) > 0 {
		bad("--leader-election-namespace %q is not the name of a namespace; give one that MIC may write leases in", lead.Namespace)
	}
	if len(validation.IsDNS1123Subdomain(lead.Name)) > 0 {
		bad("--leader-election-name %q cannot be the name of a lease; give lower-case letters, digits, hyphens and dots", lead.Name)
	}
	within("leader-election-duration", lead.Duration, 5*time.Second, 5*time.Minute)
	return errors.Join(problems...)
}
