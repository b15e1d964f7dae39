package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"
)

// micPlan is how to measure MIC.
type micPlan struct {
	few, many                 int     // pods
	fewReplaced, manyReplaced int     // of those, how many are replaced
	rate                      float64 // replaced pods per second
	burst                     int     // pods that are replaced as fast as possible
	args                      string  // flags for MIC besides the required ones
	profiles                  string  // a folder; "" for none
}

const (
	// aadPodIdentityTime is how long AAD Pod Identity took until aadPodIdentityPods pods on one scale set were
	// Assigned, with ARM at 0 delay.
	aadPodIdentityPods = 400
	aadPodIdentityTime = 160 * time.Second
)

// measureMIC measures MIC, in this order: the workload that AAD Pod Identity was measured with; the start of MIC in a
// cluster with pods; a small cluster in operation; its growth to a large cluster; the large cluster in operation; pods
// with new identities that are created at once; and pods that are replaced at once. If p.many is 0, the cluster stays
// small, and measureMIC leaves out the growth, the large cluster and the pods with new identities.
func measureMIC(ctx context.Context, p micPlan, figures map[string]float64) (err error) {
	printLine("\nMIC: %d nodes in %d scale sets, %d identities, ARM at 0 delay", scaleSets*nodesInSet, scaleSets, identities)
	r, err := newMICEnvironment(ctx, strings.Fields(p.args))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	m := &micMeasurement{micEnvironment: r, micPlan: p, figures: figures, pairs: firstPairs()}
	phases := []func(context.Context) error{m.compare, m.install, m.small}
	if p.many > 0 {
		phases = append(phases, m.grow, m.large, m.addNewIdentities)
	}
	for _, phase := range append(phases, m.replaceAtOnce) {
		if err := phase(ctx); err != nil {
			return err
		}
	}
	if p.many > 0 {
		m.comparison.report(figures)
	}
	return nil
}

// micMeasurement is the state of the measurement of MIC.
type micMeasurement struct {
	*micEnvironment
	micPlan
	figures map[string]float64

	pairs      []pair // a pod that replaces another gets one of these
	comparison comparison
}

// begin resets the counts of ARM and the response times of the API server before a phase.
func (m *micMeasurement) begin(ctx context.Context) error {
	m.workload.answers()
	_, err := m.armCalls(ctx)
	return err
}

// assigned waits until all of the pods are Assigned. It returns the time from began until the last one was Assigned,
// and the greatest numbers of calls of ARM for one scale set.
func (m *micMeasurement) assigned(ctx context.Context, began time.Time, pods []string) (time.Duration, armCalls, error) {
	_, last, err := m.waitAssigned(ctx, pods)
	if err != nil {
		return 0, armCalls{}, err
	}
	calls, err := m.armCalls(ctx)
	return last.Sub(began), calls, err
}

// compare measures the workload that AAD Pod Identity was measured with.
func (m *micMeasurement) compare(ctx context.Context) error {
	if err := errors.Join(m.startMIC(ctx), m.begin(ctx)); err != nil {
		return err
	}
	pairs := slices.DeleteFunc(firstPairs(), func(p pair) bool { return p.set != 0 })
	began := time.Now()
	pods, err := m.workload.fill(ctx, pairs, aadPodIdentityPods)
	if err != nil {
		return err
	}
	took, calls, err := m.assigned(ctx, began, pods)
	printLine("\n%d pods created at once on one scale set, with %d identities: all Assigned after %.1f s (AAD Pod Identity: %.0f s); %d PATCHes, %d GETs",
		aadPodIdentityPods, len(pairs), took.Seconds(), aadPodIdentityTime.Seconds(), calls.patches, calls.gets)
	m.figures["mic.compare400_s"] = took.Seconds()
	m.comparison.patches = max(m.comparison.patches, calls.patches)
	return err
}

// install stops MIC, creates pods, starts MIC, and measures the time until all of these pods are Assigned.
func (m *micMeasurement) install(ctx context.Context) error {
	m.stopMIC()
	pairs := slices.DeleteFunc(firstPairs(), func(p pair) bool { return p.set == 0 })
	pods, err := m.workload.fill(ctx, pairs, m.few-m.workload.count())
	if err := errors.Join(err, m.begin(ctx)); err != nil {
		return err
	}
	began := time.Now()
	if err := m.startMIC(ctx); err != nil {
		return err
	}
	took, calls, err := m.assigned(ctx, began, pods)
	printLine("MIC started in a cluster where %d pods on %d scale sets wait: all Assigned after %.1f s; at most %d PATCHes and %d GETs for one scale set",
		len(pods), scaleSets-1, took.Seconds(), calls.patches, calls.gets)
	m.figures["mic.install_s"] = took.Seconds()
	m.comparison.patches = max(m.comparison.patches, calls.patches)
	return err
}

// small measures the cluster with few pods in operation.
func (m *micMeasurement) small(ctx context.Context) (err error) {
	printRoundsHeader()
	if m.comparison.small, err = m.round(ctx, m.fewReplaced); err == nil {
		m.comparison.small.print()
		m.comparison.small.note(m.figures, "mic.small.")
	}
	return err
}

// grow adds pods until the cluster is large, while MIC runs.
func (m *micMeasurement) grow(ctx context.Context) error {
	if err := m.begin(ctx); err != nil {
		return err
	}
	m.pairs = append(m.pairs, laterPairs()...)
	began := time.Now()
	pods, err := m.workload.fill(ctx, laterPairs(), m.many-m.workload.count()-podsAtOnce)
	if err != nil {
		return err
	}
	made := time.Since(began)
	took, calls, err := m.assigned(ctx, began, pods)
	perSecond := float64(len(pods)) / took.Seconds()
	printLine("%*s%d more pods created in %.0f s: all Assigned after %.0f s, %.0f per second; at most %d PATCHes and %d GETs for one scale set", 7, "",
		len(pods), made.Seconds(), took.Seconds(), perSecond, calls.patches, calls.gets)
	m.figures["mic.fill_s"], m.figures["mic.fill.pods_per_s"] = took.Seconds(), perSecond
	m.figures["mic.fill.patches_per_vmss"] = float64(calls.patches)
	return err
}

// large measures the cluster with many pods in operation.
func (m *micMeasurement) large(ctx context.Context) (err error) {
	if m.comparison.large, err = m.round(ctx, m.manyReplaced); err == nil {
		m.comparison.large.print()
		m.comparison.large.note(m.figures, "mic.")
	}
	return err
}

// podsAtOnce is the number of pods that addNewIdentities creates at once: two for each pair of latePairs.
const podsAtOnce = 2 * scaleSets * block

// addNewIdentities creates pods at once with identities that are new to their scale sets.
func (m *micMeasurement) addNewIdentities(ctx context.Context) error {
	if err := m.begin(ctx); err != nil {
		return err
	}
	began := time.Now()
	pods, err := m.workload.fill(ctx, latePairs(), podsAtOnce)
	if err != nil {
		return err
	}
	took, calls, err := m.assigned(ctx, began, pods)
	printLine("\n%d pods created at once, with %d identities that are new to each scale set: all Assigned after %.1f s; at most %d PATCHes and %d GETs for one scale set",
		len(pods), block, took.Seconds(), calls.patches, calls.gets)
	m.figures["mic.newcomers_s"] = took.Seconds()
	m.comparison.patches = max(m.comparison.patches, calls.patches)
	return err
}

// replaceAtOnce replaces pods as fast as possible.
func (m *micMeasurement) replaceAtOnce(ctx context.Context) error {
	if err := m.begin(ctx); err != nil {
		return err
	}
	old, now := m.workload.choose(m.pairs, m.burst)
	before := m.workload.count()
	began := time.Now()
	if err := inParallel(len(old), func(i int) error { return m.workload.replace(ctx, old[i], now[i], 0) }); err != nil {
		return err
	}
	made := time.Since(began)
	waits, last, err := m.waitAssigned(ctx, m.workload.since(before))
	if err != nil {
		return err
	}
	p50, p99, answers := quantile(waits, .5), quantile(waits, .99), m.workload.answers()
	printLine("%d pods replaced at once, in %.1f s: Assigned after p50 %.2f s, p99 %.2f s, all after %.1f s; response of the API server p50 %s, p99 %s", len(old),
		made.Seconds(), p50.Seconds(), p99.Seconds(), last.Sub(began).Seconds(), quantile(answers, .5), quantile(answers, .99))
	m.figures["mic.rush.p50_s"], m.figures["mic.rush.p99_s"], m.figures["mic.rush_s"] = p50.Seconds(), p99.Seconds(), last.Sub(began).Seconds()
	return nil
}
