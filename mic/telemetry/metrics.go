package telemetry

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/podidentity/podidentity/internal/metric"
	"github.com/podidentity/podidentity/mic/azure"
)

// Operation is a write of an AzureAssignedIdentity. The names are those of AAD Pod Identity.
type Operation string

// The writes of an AzureAssignedIdentity.
const (
	Create       Operation = "assigned_identity_addition"
	Delete       Operation = "assigned_identity_deletion"
	UpdateCopies Operation = "assigned_identity_update"
	UpdateState  Operation = "update_azure_assigned_identity_status"
)

// WatchOperation is the value of the label operation_type with which the metric of failed requests counts failed
// watches.
const WatchOperation = "watch"

var (
	shortTimes = []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	longTimes  = []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 900}
)

// armOperations are the operations with which an azure.Observer is called.
var armOperations = []string{"vm_get", "vm_update", "vm_poll", "vmss_get", "vmss_update", "vmss_poll"}

// The metrics of MIC. Those that begin with aadpodidentity_ are the metrics of AAD Pod Identity. A cycle of AAD Pod
// Identity went over the whole cluster; here a cycle is one reconcile of one machine. The lengths of the queues and the
// waiting times in them are metrics of controller-runtime: workqueue_depth and others, with name pods, machines or
// bindings.
var (
	additionTime = metric.Definition{Name: "aadpodidentity_assigned_identity_addition_duration_seconds", Type: metric.Histogram, Buckets: shortTimes,
		Help: "Time to create an AzureAssignedIdentity."}
	additions = metric.Definition{Name: "aadpodidentity_assigned_identity_addition_count", Type: metric.Counter,
		Help: "AzureAssignedIdentity objects created."}
	deletionTime = metric.Definition{Name: "aadpodidentity_assigned_identity_deletion_duration_seconds", Type: metric.Histogram, Buckets: shortTimes,
		Help: "Time to delete an AzureAssignedIdentity."}
	deletions = metric.Definition{Name: "aadpodidentity_assigned_identity_deletion_count", Type: metric.Counter,
		Help: "AzureAssignedIdentity objects deleted."}
	updateTime = metric.Definition{Name: "aadpodidentity_assigned_identity_update_duration_seconds", Type: metric.Histogram, Buckets: shortTimes,
		Help: "Time to update the copies of an AzureIdentity and its binding in an AzureAssignedIdentity."}
	updates = metric.Definition{Name: "aadpodidentity_assigned_identity_update_count", Type: metric.Counter,
		Help: "AzureAssignedIdentity objects whose copies of an AzureIdentity and its binding were updated."}
	apiErrors = metric.Definition{Name: "aadpodidentity_kubernetes_api_operations_errors_count", Type: metric.Counter, Labels: []string{"operation_type"},
		Help:   "Failed writes of AzureAssignedIdentity objects and failed watches.",
		Values: map[string][]string{"operation_type": {string(Create), string(Delete), string(UpdateCopies), string(UpdateState), WatchOperation}}}
	cloudTime = metric.Definition{Name: "aadpodidentity_cloud_provider_operations_duration_seconds", Type: metric.Histogram, Buckets: longTimes,
		Labels: []string{"operation_type"}, Help: "Time of calls to Azure Resource Manager.",
		Values: map[string][]string{"operation_type": armOperations}}
	cloudErrors = metric.Definition{Name: "aadpodidentity_cloud_provider_operations_errors_count", Type: metric.Counter, Labels: []string{"operation_type"},
		Help:   "Calls to Azure Resource Manager that failed.",
		Values: map[string][]string{"operation_type": armOperations}}
	cycleTime = metric.Definition{Name: "aadpodidentity_mic_cycle_duration_seconds", Type: metric.Histogram, Buckets: longTimes,
		Help: "Time of one reconcile of one VM or VMSS, including the updates that it sent."}
	cycles = metric.Definition{Name: "aadpodidentity_mic_cycle_count", Type: metric.Counter,
		Help: "Reconciles of a VM or VMSS."}
	newLeader = metric.Definition{Name: "aadpodidentity_mic_new_leader_election_count", Type: metric.Counter,
		Help: "Times that this process became the leader."}
	armCalls = metric.Definition{Name: "podidentity_mic_arm_calls_total", Type: metric.Counter, Labels: []string{"operation", "outcome"},
		Help: "Calls to Azure Resource Manager by outcome.",
		Values: map[string][]string{"operation": armOperations, "outcome": {"ok", string(azure.NotFound), string(azure.Throttled), string(azure.Conflict),
			string(azure.BadIdentity), string(azure.Denied), string(azure.Unavailable), string(azure.Invalid)}}}
	assignmentTime = metric.Definition{Name: "podidentity_mic_assignment_duration_seconds", Type: metric.Histogram, Buckets: longTimes,
		Help: "Time from when MIC observed a scheduled pod until all of its identities were Assigned."}
	setAside = metric.Definition{Name: "podidentity_mic_identities_set_aside", Type: metric.Gauge,
		Help: "Identities that Azure refused to attach or detach, over all machines. MIC retries each after a growing delay."}
)

// MetricDefinitions returns all metrics of MIC.
func MetricDefinitions() []metric.Definition {
	return []metric.Definition{additionTime, additions, deletionTime, deletions, updateTime, updates, apiErrors,
		cloudTime, cloudErrors, cycleTime, cycles, newLeader, armCalls, assignmentTime, setAside}
}

// Metrics count what a Controller does.
type Metrics struct {
	writeTime map[Operation]prometheus.Histogram
	writes    map[Operation]prometheus.Counter
	apiErrors *prometheus.CounterVec
	cycleTime prometheus.Histogram
	cycles    prometheus.Counter
	newLeader prometheus.Counter
	assigned  prometheus.Histogram
}

// NewMetrics registers the metrics. setAsideCount is called at each scrape.
func NewMetrics(r prometheus.Registerer, setAsideCount func() int) (*Metrics, error) {
	m := &Metrics{
		writeTime: map[Operation]prometheus.Histogram{
			Create: additionTime.NewHistogram(), Delete: deletionTime.NewHistogram(), UpdateCopies: updateTime.NewHistogram(),
		},
		writes: map[Operation]prometheus.Counter{
			Create: additions.NewCounter(), Delete: deletions.NewCounter(), UpdateCopies: updates.NewCounter(),
		},
		apiErrors: apiErrors.NewCounterVec(),
		cycleTime: cycleTime.NewHistogram(),
		cycles:    cycles.NewCounter(),
		newLeader: newLeader.NewCounter(),
		assigned:  assignmentTime.NewHistogram(),
	}
	all := []prometheus.Collector{m.apiErrors, m.cycleTime, m.cycles, m.newLeader, m.assigned,
		setAside.NewGaugeFunc(func() float64 { return float64(setAsideCount()) })}
	for _, h := range m.writeTime {
		all = append(all, h)
	}
	for _, c := range m.writes {
		all = append(all, c)
	}
	return m, register(r, all...)
}

func register(r prometheus.Registerer, all ...prometheus.Collector) error {
	var errs []error
	for _, c := range all {
		errs = append(errs, r.Register(c))
	}
	return errors.Join(errs...)
}

// APIFailed counts a request to the API server, or a watch, that failed.
func (m *Metrics) APIFailed(operation string) { m.apiErrors.WithLabelValues(operation).Inc() }

// Wrote counts a write of an AzureAssignedIdentity that began at start, and returns err.
func (m *Metrics) Wrote(o Operation, start time.Time, err error) error {
	if err != nil {
		m.APIFailed(string(o))
		return err
	}
	if c := m.writes[o]; c != nil {
		c.Inc()
		m.writeTime[o].Observe(time.Since(start).Seconds())
	}
	return nil
}

// Reconciled counts a reconcile of a machine.
func (m *Metrics) Reconciled(took time.Duration) {
	m.cycles.Inc()
	m.cycleTime.Observe(took.Seconds())
}

// BecameLeader counts a term as the leader.
func (m *Metrics) BecameLeader() { m.newLeader.Inc() }

// Assigned records how long a pod waited until all of its identities were Assigned.
func (m *Metrics) Assigned(after time.Duration) { m.assigned.Observe(after.Seconds()) }

// ARMMetrics count calls to Azure Resource Manager. They are an azure.Observer.
type ARMMetrics struct {
	time   *prometheus.HistogramVec
	errors *prometheus.CounterVec
	calls  *prometheus.CounterVec
}

// NewARMMetrics registers the metrics of calls to Azure Resource Manager.
func NewARMMetrics(r prometheus.Registerer) (*ARMMetrics, error) {
	m := &ARMMetrics{time: cloudTime.NewHistogramVec(), errors: cloudErrors.NewCounterVec(), calls: armCalls.NewCounterVec()}
	return m, register(r, m.time, m.errors, m.calls)
}

// Called implements azure.Observer.
func (m *ARMMetrics) Called(operation, outcome string, d time.Duration) {
	m.time.WithLabelValues(operation).Observe(d.Seconds())
	m.calls.WithLabelValues(operation, outcome).Inc()
	if outcome != "ok" {
		m.errors.WithLabelValues(operation).Inc()
	}
}
