package nmi

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
	metricRequests   = "aadpodidentity_nmi_operations_duration_seconds"
	metricIMDS       = "aadpodidentity_imds_operations_duration_seconds"
	metricIMDSErrors = "aadpodidentity_imds_operations_errors_count"
	metricAPIErrors  = "aadpodidentity_kubernetes_api_operations_errors_count"

	metricDecisions   = "podidentity_nmi_decisions_total"
	metricInFlight    = "podidentity_nmi_requests_in_flight"
	metricCache       = "podidentity_nmi_token_cache_requests_total"
	metricCacheSize   = "podidentity_nmi_token_cache_entries"
	metricUpstream    = "podidentity_nmi_upstream_requests_total"
	metricRepairs     = "podidentity_nmi_iptables_repairs_total"
	metricSyncErrors  = "podidentity_nmi_iptables_sync_errors_total"
	metricLookups     = "podidentity_nmi_pod_lookup_duration_seconds"
	metricConnections = "podidentity_nmi_connections_refused_total"
	metricStale       = "podidentity_nmi_stale_watches"
	metricFetches     = "podidentity_nmi_upstream_duration_seconds"
	metricWaits       = "podidentity_nmi_assignment_wait_seconds" // standard mode
)

// metrics is NMI's one registry and what is in it.
type metrics struct {
	registry    *prometheus.Registry
	requests    *prometheus.HistogramVec
	imds        *prometheus.HistogramVec
	imdsErrors  *prometheus.CounterVec
	apiErrors   *prometheus.CounterVec
	decisions   *prometheus.CounterVec
	inFlight    prometheus.Gauge
	cache       *prometheus.CounterVec
	upstream    *prometheus.CounterVec
	fetches     *prometheus.HistogramVec
	repairs     *prometheus.CounterVec
	syncErrors  prometheus.Counter
	lookups     prometheus.Histogram
	connections prometheus.Counter
}

func newMetrics() *metrics {
	// A cached token takes tenths of a millisecond, a held request many seconds.
	buckets := []float64{.0002, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: metricRequests, Buckets: buckets,
			Help: "Time to answer a request of a pod, by what it was for and the status it got."}, []string{"operation_type", "status_code"}),
		imds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: metricIMDS, Buckets: buckets,
			Help: "Time of a fetch from the machine's metadata service, retries included."}, []string{"operation_type"}),
		imdsErrors: counter(metricIMDSErrors, "Fetches from the machine's metadata service that failed.", "operation_type"),
		apiErrors:  counter(metricAPIErrors, "Questions to the API server that failed.", "operation_type"),
		decisions:  counter(metricDecisions, "Requests for a token by how they ended.", "reason"),
		inFlight:   prometheus.NewGauge(prometheus.GaugeOpts{Name: metricInFlight, Help: "Requests of pods that are being answered."}),
		fetches: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: metricFetches, Buckets: buckets,
			Help: "Time of a fetch from a source of tokens, retries included."}, []string{"source"}),
		cache:      counter(metricCache, "Questions to the token cache by how they were answered: hit, fetched, shared with another's fetch, failed.", "result"),
		upstream:   counter(metricUpstream, "Fetches from sources of tokens by outcome.", "source", "outcome"),
		repairs:    counter(metricRepairs, "Things that were found missing or changed on the node and put right.", "what"),
		syncErrors: prometheus.NewCounter(prometheus.CounterOpts{Name: metricSyncErrors, Help: "Looks at the rules that failed."}),
		lookups: prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricLookups, Buckets: buckets,
			Help: "Time to find the pod behind an address."}),
		connections: prometheus.NewCounter(prometheus.CounterOpts{Name: metricConnections, Help: "Connections that were closed at once because their source, or all together, had too many."}),
	}
	m.registry.MustRegister(m.requests, m.imds, m.imdsErrors, m.apiErrors, m.decisions, m.inFlight, m.cache, m.upstream, m.fetches,
		m.repairs, m.syncErrors, m.lookups, m.connections,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// cacheSize adds a gauge that reads the number of tokens held.
func (m *metrics) cacheSize(length func() int) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricCacheSize, Help: "Keys that the token cache holds."},
		func() float64 { return float64(length()) }))
}

// assignmentWaits adds a histogram of how long requests waited for an assignment, and returns what fills it.
func (m *metrics) assignmentWaits() func(outcome string, took time.Duration) {
	waits := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: metricWaits, Buckets: []float64{.01, .05, .1, .25, .5, 1, 2.5, 5, 10, 15, 20, 30, 60},
		Help: "Time that requests were held until their identity was assigned, by how that ended: assigned, timeout, refused, gone (the client)."}, []string{"outcome"})
	m.registry.MustRegister(waits)
	return func(outcome string, took time.Duration) { waits.WithLabelValues(outcome).Observe(took.Seconds()) }
}

// staleWatches adds a gauge that reads how many watches hear nothing.
func (m *metrics) staleWatches(count func() int) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricStale, Help: "Watches of the cluster that hear nothing from the API server at the moment."},
		func() float64 { return float64(count()) }))
}

func (m *metrics) request(route metadata.Route, status int, took time.Duration) {
	m.requests.WithLabelValues(string(route), strconv.Itoa(status)).Observe(took.Seconds())
}

// Operations of the API server that are counted when they fail.
const (
	apiWatch        = "watch"
	apiListPods     = "list_pods"
	apiWriteEvent   = "write_event"
	apiRequestToken = "request_token"
	apiReadSecret   = "read_secret"
)

func (m *metrics) apiFailed(operation string) { m.apiErrors.WithLabelValues(operation).Inc() }

func (m *metrics) decision(r identity.Reason) { m.decisions.WithLabelValues(string(r)).Inc() }

// CacheAnswered implements token.Observer.
func (m *metrics) CacheAnswered(o token.Origin) { m.cache.WithLabelValues(string(o)).Inc() }

// SourceAsked implements token.Observer.
func (m *metrics) SourceAsked(source token.Source, class token.Class, d time.Duration) {
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
