package mic

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Names of all metrics. Those of the first group are the predecessor's. Its cycle went over the whole cluster; here it
// is one look at one machine. How long the queues are and how long keys wait in them is in controller-runtime's own
// metrics: workqueue_depth and others, with name pods, machines or bindings.
const (
	metricAdditionTime  = "aadpodidentity_assigned_identity_addition_duration_seconds"
	metricAdditions     = "aadpodidentity_assigned_identity_addition_count"
	metricDeletionTime  = "aadpodidentity_assigned_identity_deletion_duration_seconds"
	metricDeletions     = "aadpodidentity_assigned_identity_deletion_count"
	metricUpdateTime    = "aadpodidentity_assigned_identity_update_duration_seconds"
	metricUpdates       = "aadpodidentity_assigned_identity_update_count"
	metricAPIErrors     = "aadpodidentity_kubernetes_api_operations_errors_count"
	metricCloudTime     = "aadpodidentity_cloud_provider_operations_duration_seconds"
	metricCloudErrors   = "aadpodidentity_cloud_provider_operations_errors_count"
	metricCycleTime     = "aadpodidentity_mic_cycle_duration_seconds"
	metricCycles        = "aadpodidentity_mic_cycle_count"
	metricNewLeader     = "aadpodidentity_mic_new_leader_election_count"
	metricARMCalls      = "podidentity_mic_arm_calls_total"
	metricAssignedAfter = "podidentity_mic_assignment_duration_seconds"
	metricSetAside      = "podidentity_mic_identities_set_aside"
)

// operation is a write of an assignment, by the predecessor's names.
type operation string

const (
	addition     operation = "assigned_identity_addition"
	deletion     operation = "assigned_identity_deletion"
	change       operation = "assigned_identity_update"
	changeStatus operation = "update_azure_assigned_identity_status"
)

type metrics struct {
	took       map[operation]prometheus.Histogram
	done       map[operation]prometheus.Counter
	apiErrors  *prometheus.CounterVec
	cycleTime  prometheus.Histogram
	cycles     prometheus.Counter
	leaders    prometheus.Counter
	assignedIn prometheus.Histogram
}

var (
	shortTimes = []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	longTimes  = []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 900}
)

func newMetrics(r prometheus.Registerer, setAside func() int) (*metrics, error) {
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		took: map[operation]prometheus.Histogram{
			addition: histogram(metricAdditionTime, "Time to create an AzureAssignedIdentity.", shortTimes),
			deletion: histogram(metricDeletionTime, "Time to delete an AzureAssignedIdentity.", shortTimes),
			change:   histogram(metricUpdateTime, "Time to bring the copies in an AzureAssignedIdentity up to date.", shortTimes),
		},
		done: map[operation]prometheus.Counter{
			addition: counter(metricAdditions, "AzureAssignedIdentity objects created."),
			deletion: counter(metricDeletions, "AzureAssignedIdentity objects deleted."),
			change:   counter(metricUpdates, "AzureAssignedIdentity objects whose copies were brought up to date."),
		},
		apiErrors:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricAPIErrors, Help: "Questions to the API server that failed."}, []string{"operation_type"}),
		cycleTime:  histogram(metricCycleTime, "Time of one look at a machine and what followed from it, updates of the machine included.", longTimes),
		cycles:     counter(metricCycles, "Looks at machines."),
		leaders:    counter(metricNewLeader, "Times that this process became the leader."),
		assignedIn: histogram(metricAssignedAfter, "Time from when MIC heard of a scheduled pod until all of its identities were Assigned.", longTimes),
	}
	all := []prometheus.Collector{m.apiErrors, m.cycleTime, m.cycles, m.leaders, m.assignedIn,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricSetAside, Help: "Identities that Azure refused, which are tried by themselves and ever more rarely, over all machines."},
			func() float64 { return float64(setAside()) })}
	for _, h := range m.took {
		all = append(all, h)
	}
	for _, n := range m.done {
		all = append(all, n)
	}
	return m, register(r, all...)
}

func register(r prometheus.Registerer, all ...prometheus.Collector) error {
	for _, one := range all {
		if err := r.Register(one); err != nil {
			return err
		}
	}
	return nil
}

func (m *metrics) apiFailed(operation string) { m.apiErrors.WithLabelValues(operation).Inc() }

func (m *metrics) cycle(d time.Duration) {
	m.cycles.Inc()
	m.cycleTime.Observe(d.Seconds())
}

func (m *metrics) leader() { m.leaders.Inc() }

func (m *metrics) assigned(after time.Duration) { m.assignedIn.Observe(after.Seconds()) }

// armMetrics counts calls to Azure Resource Manager. It is an azure.Observer.
type armMetrics struct {
	took   *prometheus.HistogramVec
	failed *prometheus.CounterVec
	calls  *prometheus.CounterVec
}

func newARMMetrics(r prometheus.Registerer) (*armMetrics, error) {
	m := &armMetrics{
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: metricCloudTime, Buckets: longTimes,
			Help: "Time of calls to Azure Resource Manager."}, []string{"operation_type"}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricCloudErrors, Help: "Calls to Azure Resource Manager that failed."}, []string{"operation_type"}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricARMCalls, Help: "Calls to Azure Resource Manager by outcome."},
			[]string{"operation", "outcome"}),
	}
	return m, register(r, m.took, m.failed, m.calls)
}

// Called implements azure.Observer.
func (m *armMetrics) Called(operation, outcome string, d time.Duration) {
	m.took.WithLabelValues(operation).Observe(d.Seconds())
	m.calls.WithLabelValues(operation, outcome).Inc()
	if outcome != "ok" {
		m.failed.WithLabelValues(operation).Inc()
	}
}

// wrote counts a write of an assignment, and returns its error.
func (c *Controller) wrote(o operation, start time.Time, err error) error {
	if err != nil {
		c.metrics.apiFailed(string(o))
		return err
	}
	if n := c.metrics.done[o]; n != nil {
		n.Inc()
		c.metrics.took[o].Observe(time.Since(start).Seconds())
	}
	return nil
}
