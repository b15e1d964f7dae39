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
	Registry           *prometheus.Registry
	requests           *prometheus.HistogramVec
	imds               *prometheus.HistogramVec
	imdsErrors         *prometheus.CounterVec
	apiErrors          *prometheus.CounterVec
	Decisions          *prometheus.CounterVec
	InFlight           prometheus.Gauge
	cache              *prometheus.CounterVec
	upstream           *prometheus.CounterVec
	fetches            *prometheus.HistogramVec
	Repairs            *prometheus.CounterVec
	SyncErrors         prometheus.Counter
	PodLookups         prometheus.Histogram
	RefusedConnections prometheus.Counter
}

// NewMetrics returns a new registry with the metrics of every mode, and those of the Go runtime and the process.
func NewMetrics() *Metrics {
	m := &Metrics{
		Registry:           prometheus.NewRegistry(),
		requests:           requestDuration.NewHistogramVec(),
		imds:               imdsDuration.NewHistogramVec(),
		imdsErrors:         imdsErrors.NewCounterVec(),
		apiErrors:          apiErrors.NewCounterVec(),
		Decisions:          decisions.NewCounterVec(),
		InFlight:           inFlight.NewGauge(),
		cache:              cacheRequests.NewCounterVec(),
		upstream:           upstreamRequests.NewCounterVec(),
		fetches:            upstreamDuration.NewHistogramVec(),
		Repairs:            repairs.NewCounterVec(),
		SyncErrors:         syncErrors.NewCounter(),
		PodLookups:         podLookups.NewHistogram(),
		RefusedConnections: refusedConnections.NewCounter(),
	}
	m.Registry.MustRegister(m.requests, m.imds, m.imdsErrors, m.apiErrors, m.Decisions, m.InFlight, m.cache, m.upstream, m.fetches,
		m.Repairs, m.SyncErrors, m.PodLookups, m.RefusedConnections,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// AddCacheSize adds a gauge that reads the number of tokens held.
func (m *Metrics) AddCacheSize(length func() int) {
	m.Registry.MustRegister(cacheEntries.NewGaugeFunc(func() float64 { return float64(length()) }))
}

// AddAssignmentWaits adds a histogram of how long requests waited for an assignment, and returns what fills it.
func (m *Metrics) AddAssignmentWaits() func(outcome string, took time.Duration) {
	waits := assignmentWaits.NewHistogramVec()
	m.Registry.MustRegister(waits)
	return func(outcome string, took time.Duration) { waits.WithLabelValues(outcome).Observe(took.Seconds()) }
}

// AddStaleWatches adds a gauge that reads how many watches hear nothing.
func (m *Metrics) AddStaleWatches(count func() int) {
	m.Registry.MustRegister(staleWatches.NewGaugeFunc(func() float64 { return float64(count()) }))
}

func (m *Metrics) ObserveRequest(route metadata.Route, status int, took time.Duration) {
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

func (m *Metrics) CountAPIFailure(operation string) { m.apiErrors.WithLabelValues(operation).Inc() }

func (m *Metrics) CountDecision(r identity.Reason) { m.Decisions.WithLabelValues(string(r)).Inc() }

// CacheResult implements token.Observer.
func (m *Metrics) CacheResult(o token.Origin) { m.cache.WithLabelValues(string(o)).Inc() }

// FetchDone implements token.Observer.
func (m *Metrics) FetchDone(source token.Source, class token.Class, d time.Duration) {
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
