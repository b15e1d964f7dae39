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

// Metrics has NMI's registry and the metrics in it.
type Metrics struct {
	Registry           *prometheus.Registry
	Decisions          *prometheus.CounterVec
	InFlight           prometheus.Gauge
	PodLookups         prometheus.Histogram
	RefusedConnections prometheus.Counter
	Repairs            *prometheus.CounterVec
	SyncErrors         prometheus.Counter
	Unidentified       prometheus.Counter // connections whose pod the kernel did not record
	MovedAddresses     prometheus.Counter

	requestDuration  *prometheus.HistogramVec
	imdsDuration     *prometheus.HistogramVec
	imdsErrors       *prometheus.CounterVec
	apiErrors        *prometheus.CounterVec
	cacheRequests    *prometheus.CounterVec
	upstreamRequests *prometheus.CounterVec
	upstreamDuration *prometheus.HistogramVec
	captures         *prometheus.GaugeVec
	unconfirmed      *prometheus.CounterVec
}

// NewMetrics returns Metrics whose registry has the metrics of the Go runtime, of the process and of NMI, except those
// that AddCacheSize, AddStaleWatches and AddAssignmentWaits add.
func NewMetrics() *Metrics {
	m := &Metrics{
		Registry:           prometheus.NewRegistry(),
		Decisions:          decisions.NewCounterVec(),
		InFlight:           inFlight.NewGauge(),
		PodLookups:         podLookups.NewHistogram(),
		RefusedConnections: refusedConnections.NewCounter(),
		Repairs:            repairs.NewCounterVec(),
		SyncErrors:         syncErrors.NewCounter(),
		Unidentified:       unidentifiedConnections.NewCounter(),
		MovedAddresses:     movedAddresses.NewCounter(),
		requestDuration:    requestDuration.NewHistogramVec(),
		imdsDuration:       imdsDuration.NewHistogramVec(),
		imdsErrors:         imdsErrors.NewCounterVec(),
		apiErrors:          apiErrors.NewCounterVec(),
		cacheRequests:      cacheRequests.NewCounterVec(),
		upstreamRequests:   upstreamRequests.NewCounterVec(),
		upstreamDuration:   upstreamDuration.NewHistogramVec(),
		captures:           captures.NewGaugeVec(),
		unconfirmed:        unconfirmedAddresses.NewCounterVec(),
	}
	m.Registry.MustRegister(m.Decisions, m.InFlight, m.PodLookups, m.RefusedConnections, m.Repairs, m.SyncErrors, m.Unidentified, m.MovedAddresses, m.requestDuration, m.imdsDuration,
		m.imdsErrors, m.apiErrors, m.cacheRequests, m.upstreamRequests, m.upstreamDuration, m.captures, m.unconfirmed,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// SetCaptures sets how NMI captures the requests of pods.
func (m *Metrics) SetCaptures(iptables, bpf bool) {
	for kind, active := range map[string]bool{"iptables": iptables, "bpf": bpf} {
		gauge := m.captures.WithLabelValues(kind)
		gauge.Set(0)
		if active {
			gauge.Set(1)
		}
	}
}

// CountUnconfirmed counts a request that was refused because its address is not confirmed.
func (m *Metrics) CountUnconfirmed(cause string) { m.unconfirmed.WithLabelValues(cause).Inc() }

// AddCacheSize adds the gauge of the token cache's size, which it reads from length.
func (m *Metrics) AddCacheSize(length func() int) {
	m.Registry.MustRegister(cacheEntries.NewGaugeFunc(func() float64 { return float64(length()) }))
}

// AddStaleWatches adds the gauge of stale watches, which it reads from count.
func (m *Metrics) AddStaleWatches(count func() int) {
	m.Registry.MustRegister(staleWatches.NewGaugeFunc(func() float64 { return float64(count()) }))
}

// AddAssignmentWaits adds the histogram of assignment waits, and returns a function that observes a wait. It is called
// in standard mode only.
func (m *Metrics) AddAssignmentWaits() func(outcome string, duration time.Duration) {
	waits := assignmentWaits.NewHistogramVec()
	m.Registry.MustRegister(waits)
	return func(outcome string, duration time.Duration) {
		waits.WithLabelValues(outcome).Observe(duration.Seconds())
	}
}

// ObserveRequest observes a request of a pod, or of a program of the node.
func (m *Metrics) ObserveRequest(route metadata.Route, status int, duration time.Duration) {
	m.requestDuration.WithLabelValues(string(route), strconv.Itoa(status)).Observe(duration.Seconds())
}

// Operations at the API server whose failures are counted.
const (
	APIWatch        = "watch"
	APIListPods     = "list_pods"
	APIWriteEvent   = "write_event"
	APIRequestToken = "request_token"
	APIReadSecret   = "read_secret"
)

// CountAPIFailure counts a failed request to the API server.
func (m *Metrics) CountAPIFailure(operation string) { m.apiErrors.WithLabelValues(operation).Inc() }

// CountDecision counts the result of a token request.
func (m *Metrics) CountDecision(r identity.Reason) { m.Decisions.WithLabelValues(string(r)).Inc() }

// CacheResult implements token.Observer.
func (m *Metrics) CacheResult(o token.Origin) { m.cacheRequests.WithLabelValues(string(o)).Inc() }

// FetchDone implements token.Observer.
func (m *Metrics) FetchDone(source token.Source, class token.Class, d time.Duration) {
	outcome := string(class)
	if outcome == "" {
		outcome = "ok"
	}
	m.upstreamRequests.WithLabelValues(string(source), outcome).Inc()
	m.upstreamDuration.WithLabelValues(string(source)).Observe(d.Seconds())
	if source != token.Managed {
		return
	}
	m.imdsDuration.WithLabelValues(string(source)).Observe(d.Seconds())
	if class != "" {
		m.imdsErrors.WithLabelValues(string(source)).Inc()
	}
}
