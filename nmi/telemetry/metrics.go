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

// NewMetrics returns a new registry with the metrics of every mode, and those of the Go runtime and the process.
func NewMetrics() *Metrics {
	m := &Metrics{
		Registry:    prometheus.NewRegistry(),
		requests:    requestDuration.NewHistogramVec(),
		imds:        imdsDuration.NewHistogramVec(),
		imdsErrors:  imdsErrors.NewCounterVec(),
		apiErrors:   apiErrors.NewCounterVec(),
		Decisions:   decisions.NewCounterVec(),
		InFlight:    inFlight.NewGauge(),
		cache:       cacheRequests.NewCounterVec(),
		upstream:    upstreamRequests.NewCounterVec(),
		fetches:     upstreamDuration.NewHistogramVec(),
		Repairs:     repairs.NewCounterVec(),
		SyncErrors:  syncErrors.NewCounter(),
		Lookups:     podLookups.NewHistogram(),
		Connections: refusedConnections.NewCounter(),
	}
	m.Registry.MustRegister(m.requests, m.imds, m.imdsErrors, m.apiErrors, m.Decisions, m.InFlight, m.cache, m.upstream, m.fetches,
		m.Repairs, m.SyncErrors, m.Lookups, m.Connections,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// CacheSize adds a gauge that reads the number of tokens held.
func (m *Metrics) CacheSize(length func() int) {
	m.Registry.MustRegister(cacheEntries.NewGaugeFunc(func() float64 { return float64(length()) }))
}

// AssignmentWaits adds a histogram of how long requests waited for an assignment, and returns what fills it.
func (m *Metrics) AssignmentWaits() func(outcome string, took time.Duration) {
	waits := assignmentWaits.NewHistogramVec()
	m.Registry.MustRegister(waits)
	return func(outcome string, took time.Duration) { waits.WithLabelValues(outcome).Observe(took.Seconds()) }
}

// StaleWatches adds a gauge that reads how many watches hear nothing.
func (m *Metrics) StaleWatches(count func() int) {
	m.Registry.MustRegister(staleWatches.NewGaugeFunc(func() float64 { return float64(count()) }))
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
