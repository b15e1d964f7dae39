package telemetry

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/record"

	"github.com/podidentity/podidentity/mic/azure"
)

// newTestReporter returns a Reporter, and functions that return its Events and log lines since their last call.
func newTestReporter(t *testing.T) (r *Reporter, events, lines func() []string) {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	recorder := record.NewFakeRecorder(100)
	reported, err := lru.New[string, string](reportedMax)
	if err != nil {
		t.Fatal(err)
	}
	r = &Reporter{log: zap.New(core), broadcaster: record.NewBroadcaster(), recorder: recorder, reported: reported}
	t.Cleanup(r.Shutdown)
	events = func() (got []string) {
		for len(recorder.Events) > 0 {
			got = append(got, <-recorder.Events)
		}
		return got
	}
	lines = func() (got []string) {
		for _, e := range logs.TakeAll() {
			got = append(got, e.Level.String()+" "+e.Message)
		}
		return got
	}
	return r, events, lines
}

var (
	pod     = &corev1.ObjectReference{Kind: "Pod", Namespace: "ns", Name: "web", UID: "pod-uid"}
	binding = &corev1.ObjectReference{Kind: "AzureIdentityBinding", Namespace: "ns", Name: "b", UID: "binding-uid"}
)

func TestAProblemOfAPodIsReportedOnceForEachChange(t *testing.T) {
	r, events, lines := newTestReporter(t)
	first := Problem{ReasonFailed, "denied", binding}
	second := Problem{ReasonInvalid, "no client ID", nil}
	for _, c := range []struct {
		when          string
		problems      []Problem
		events, lines int
	}{
		{"first", []Problem{first}, 2, 1}, // on the pod and on the binding
		{"again", []Problem{first}, 0, 0},
		{"with another one", []Problem{first, second}, 1, 1},
		{"without the first", []Problem{second}, 0, 0},
		{"without any", nil, 0, 0},
		{"after none", []Problem{second}, 1, 1},
	} {
		r.PodProblems(pod, c.problems)
		if e, l := events(), lines(); len(e) != c.events || len(l) != c.lines {
			t.Errorf("%s: Events %q, lines %q", c.when, e, l)
		}
	}
	other := &corev1.ObjectReference{Kind: "Pod", Namespace: "ns", Name: "web-2", UID: "other-uid"}
	r.PodProblems(other, []Problem{first})
	if e := events(); len(e) != 1 || !strings.Contains(e[0], "AssignmentFailed denied") {
		t.Errorf("a problem of another pod with the same binding wrote the Events %q, want one on the pod", e)
	}
}

func TestAProblemOfABindingIsReportedOnceForEachChange(t *testing.T) {
	r, events, lines := newTestReporter(t)
	for _, c := range []struct {
		reason, text string
		reported     int
	}{
		{"", "", 0},
		{ReasonMissing, "no identity", 1},
		{ReasonMissing, "no identity", 0},
		{ReasonInvalid, "no client ID", 1},
		{ReasonMissing, "no identity", 1},
		{"", "", 0},
		{ReasonMissing, "no identity", 1},
	} {
		r.BindingProblem(binding, c.reason, c.text)
		if e, l := events(), lines(); len(e) != c.reported || len(l) != c.reported {
			t.Errorf("%s %s: Events %q, lines %q", c.reason, c.text, e, l)
		}
	}
}

func TestTheResultOfAMachineIsLoggedWhenItChanges(t *testing.T) {
	r, _, lines := newTestReporter(t)
	denied := func(message string) error {
		return &azure.Error{Class: azure.Denied, Code: "AuthorizationFailed", Message: message}
	}
	for _, c := range []struct {
		err  error
		want []string
	}{
		{nil, nil},
		{denied("request 1"), []string{"warn reconciling a machine failed; MIC retries"}},
		{denied("request 2"), nil}, // only the message differs
		{errors.New("API server"), []string{"warn reconciling a machine failed; MIC retries"}},
		{nil, []string{"info reconciling a machine succeeds again"}},
		{nil, nil},
	} {
		r.MachineResult("vmss/nodes", c.err)
		if got := lines(); !slices.Equal(got, c.want) {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}

func TestTheTimerMeasuresOnlyPodsThatWereScheduledAfterItsStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var timer AssignmentTimer
		var got []time.Duration
		observe := func(d time.Duration) { got = append(got, d) }
		timer.Scheduled("early")
		timer.Start()
		timer.Done("early", true, observe)
		timer.Scheduled("a")
		timer.Scheduled("none")
		time.Sleep(3 * time.Second)
		timer.Done("none", false, observe)
		timer.Done("a", true, observe)
		timer.Done("a", true, observe)
		timer.Done("unknown", true, observe)
		if !slices.Equal(got, []time.Duration{3 * time.Second}) {
			t.Errorf("the timer measured %v, want only 3s", got)
		}
	})
}

// values returns the sum of each metric, and the number of observations of each histogram.
func values(t *testing.T, r *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			got[f.GetName()] += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return got
}

func TestEachMetricIsDefinedAndCounts(t *testing.T) {
	r := prometheus.NewRegistry()
	m, err := NewMetrics(r, func() int { return 7 })
	if err != nil {
		t.Fatal(err)
	}
	arm, err := NewARMMetrics(r)
	if err != nil {
		t.Fatal(err)
	}
	failed := errors.New("failed")
	for _, o := range []Operation{Create, Delete, UpdateCopies, UpdateState} {
		if err := m.Wrote(o, time.Now(), nil); err != nil {
			t.Errorf("%s: %v", o, err)
		}
		if err := m.Wrote(o, time.Now(), failed); !errors.Is(err, failed) {
			t.Errorf("%s: %v", o, err)
		}
	}
	m.APIFailed("watch")
	m.Reconciled(time.Second)
	m.BecameLeader()
	m.Assigned(time.Second)
	arm.Called("vm_get", "ok", time.Second)
	arm.Called("vm_get", "denied", time.Second)
	want := map[string]float64{
		"aadpodidentity_assigned_identity_addition_duration_seconds": 1,
		"aadpodidentity_assigned_identity_addition_count":            1,
		"aadpodidentity_assigned_identity_deletion_duration_seconds": 1,
		"aadpodidentity_assigned_identity_deletion_count":            1,
		"aadpodidentity_assigned_identity_update_duration_seconds":   1,
		"aadpodidentity_assigned_identity_update_count":              1,
		"aadpodidentity_kubernetes_api_operations_errors_count":      5,
		"aadpodidentity_cloud_provider_operations_duration_seconds":  2,
		"aadpodidentity_cloud_provider_operations_errors_count":      1,
		"aadpodidentity_mic_cycle_duration_seconds":                  1,
		"aadpodidentity_mic_cycle_count":                             1,
		"aadpodidentity_mic_new_leader_election_count":               1,
		"podidentity_mic_arm_calls_total":                            2,
		"podidentity_mic_assignment_duration_seconds":                1,
		"podidentity_mic_identities_set_aside":                       7,
	}
	if diff := cmp.Diff(want, values(t, r)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, d := range MetricDefinitions() {
		if _, ok := want[d.Name]; !ok || d.Help == "" {
			t.Errorf("%s is not registered, or has no help text", d.Name)
		}
		delete(want, d.Name)
	}
	if len(want) > 0 {
		t.Errorf("not defined: %v", want)
	}
	if _, err := NewMetrics(r, nil); err == nil {
		t.Error("NewMetrics registered the metrics twice without an error")
	}
}
