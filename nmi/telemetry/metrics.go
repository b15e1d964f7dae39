package telemetry

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/token"
)

// Names of all metrics. Those of the first group are the predecessor's and mean what they meant, except that their
// labels hold nothing that a client chooses: operation_type is one of a few routes, not the path, and there is no label
// for the resource.
const (
	MetricRequests   = "aadpodidentity_nmi_operations_duration_seconds"
	MetricIMDS       = "aadpodidentity_imds_operations_duration_seconds"
	MetricIMDSErrors = "aadpodidentity_imds_operations_errors_count"
	MetricAPIErrors  = "aadpodidentity_kubernetes_api_operations_errors_count"

	MetricDecisions   = "podidentity_nmi_decisions_total"
	MetricInFlight    = "podidentity_nmi_requests_in_flight"
	MetricCache       = "podidentity_nmi_token_cache_requests_total"
	MetricCacheSize   = "podidentity_nmi_token_cache_entries"
	MetricUpstream    = "podidentity_nmi_upstream_requests_total"
	MetricRepairs     = "podidentity_nmi_iptables_repairs_total"
	MetricSyncErrors  = "podidentity_nmi_iptables_sync_errors_total"
	MetricLookups     = "podidentity_nmi_pod_lookup_duration_seconds"
	MetricConnections = "podidentity_nmi_connections_refused_total"
	MetricStale       = "podidentity_nmi_stale_watches"
	MetricFetches     = "podidentity_nmi_upstream_duration_seconds"
	MetricWaits       = "podidentity_nmi_assignment_wait_seconds" // standard mode
)

// Metrics is NMI's one registry and what is in it.
type Metrics struct {
	Registry    *prometheus.Registry
	requests    *prometheus.HistogramVec
	imds        *prometheus.HistogramVec
	imdsErrors  *prometheus.CounterVec
	apiErrors   *prometheus.CounterVec
	Decisions   *prometheus.CounterVec
	InFlight    prometheus.Gauge
	cache       *prometheus.CounterVec
	upstream    *prometheus.CounterVec
	fetches     *prometheus.HistogramVec
	Repairs     *prometheus.CounterVec
	SyncErrors  prometheus.Counter
	Lookups     prometheus.Histogram
	Connections prometheus.Counter
}

func NewMetrics() *Metrics {
	// A cached token takes tenths of a millisecond, a held request many seconds.
	buckets := []float64{.0002, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	m := &Metrics{
		Registry: prometheus.NewRegistry(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: MetricRequests, Buckets: buckets,
			Help: "Time to answer a request of a pod, by what it was for and the status it got."}, []string{"operation_type", "status_code"}),
		imds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: MetricIMDS, Buckets: buckets,
			Help: "Time of a fetch from the machine's metadata service, retries included."}, []string{"operation_type"}),
		imdsErrors: counter(MetricIMDSErrors, "Fetches from the machine's metadata service that failed.", "operation_type"),
		apiErrors:  counter(MetricAPIErrors, "Questions to the API server that failed.", "operation_type"),
		Decisions:  counter(MetricDecisions, "Requests for a token by how they ended.", "reason"),
		InFlight:   prometheus.NewGauge(prometheus.GaugeOpts{Name: MetricInFlight, Help: "Requests of pods that are being answered."}),
		fetches: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: MetricFetches, Buckets: buckets,
			Help: "Time of a fetch from a source of tokens, retries included."}, []string{"source"}),
		cache:      counter(MetricCache, "Questions to the token cache by how they were answered: hit, fetched, shared with another's fetch, failed.", "result"),
		upstream:   counter(MetricUpstream, "Fetches from sources of tokens by outcome.", "source", "outcome"),
		Repairs:    counter(MetricRepairs, "Things that were found missing or changed on the node and put right.", "what"),
		SyncErrors: prometheus.NewCounter(prometheus.CounterOpts{Name: MetricSyncErrors, Help: "Looks at the rules that failed."}),
		Lookups: prometheus.NewHistogram(prometheus.HistogramOpts{Name: MetricLookups, Buckets: buckets,
			Help: "Time to find the pod behind an address."}),
		Connections: prometheus.NewCounter(prometheus.CounterOpts{Name: MetricConnections, Help: "Connections that were closed at once because their source, or all together, had too many."}),
	}
	m.Registry.MustRegister(m.requests, m.imds, m.imdsErrors, m.apiErrors, m.Decisions, m.InFlight, m.cache, m.upstream, m.fetches,
		m.Repairs, m.SyncErrors, m.Lookups, m.Connections,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// CacheSize adds a gauge that reads the number of tokens held.
func (m *Metrics) CacheSize(length func() int) {
	m.Registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: MetricCacheSize, Help: "Keys that the token cache holds."},
		func() float64 { return float64(length()) }))
}

// AssignmentWaits adds a histogram of how long requests waited for an assignment, and returns what fills it.
func (m *Metrics) AssignmentWaits() func(outcome string, took time.Duration) {
	waits := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: MetricWaits, Buckets: []float64{.01, .05, .1, .25, .5, 1, 2.5, 5, 10, 15, 20, 30, 60},
		Help: "Time that requests were held until their identity was assigned, by how that ended: assigned, timeout, refused, gone (the client)."}, []string{"outcome"})
	m.Registry.MustRegister(waits)
	return func(outcome string, took time.Duration) { waits.WithLabelValues(outcome).Observe(took.Seconds()) }
}

// StaleWatches adds a gauge that reads how many watches hear nothing.
func (m *Metrics) StaleWatches(count func() int) {
	m.Registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: MetricStale, Help: "Watches of the cluster that hear nothing from the API server at the moment."},
		func() float64 { return float64(count()) }))
}

func (m *Metrics) Request(route metadata.Route, status int, took time.Duration) {
	m.requests.WithLabelValues(string(route), strconv.Itoa(status)).Observe(took.Seconds())
}

// Operations of the API server that are counted when they fail.
const (
	APIWatch        = "watch"
	APIListPods     = "list_pods"
	APIWriteEvent   = "write_event"
	APIRequestToken = "request_token"
	APIReadSecret   = "read_secret"
)

func (m *Metrics) APIFailed(operation string) { m.apiErrors.WithLabelValues(operation).Inc() }

func (m *Metrics) Decision(r identity.Reason) { m.Decisions.WithLabelValues(string(r)).Inc() }

// CacheAnswered implements token.Observer.
func (m *Metrics) CacheAnswered(o token.Origin) { m.cache.WithLabelValues(string(o)).Inc() }

// SourceAsked implements token.Observer.
func (m *Metrics) SourceAsked(source token.Source, class token.Class, d time.Duration) {
	outcome := string(class)
	if outcome == "" {
		outcome = "ok"
	}
	m.upstream.WithLabelValues(string(source), outcome).Inc()
	m.fetches.WithLabelValues(string(source)).Observe(d.Seconds())
	if source != token.Managed {
		return
	}
	m.imds.WithLabelValues(string(source)).Observe(d.Seconds())
	if class != "" {
		m.imdsErrors.WithLabelValues(string(source)).Inc()
	}
}
