package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

const (
	// step is the pause before each request of the replacement of one pod, except the first (see workload.replace).
	step = 500 * time.Millisecond
	// maxDuration is how long a call in atRate may take without lowering the rate. It is twice the sum of the three
	// pauses in the replacement of one pod.
	maxDuration = 6 * step
	// quiet is how long MIC is idle before its memory is measured.
	quiet = 10 * time.Second
)

// round has the measurements of a period in which pods are replaced at a steady rate.
type round struct {
	pods, replaced       int
	rate                 float64       // replaced pods per second
	p50, p99             time.Duration // from the creation of a pod until it is Assigned
	answerP50, answerP99 time.Duration // response time of the API server to the creation of a pod
	cpu                  time.Duration // of MIC, for one replaced pod
	requests, writes     float64       // of MIC, for one replaced pod
	rss, peak            float64       // of MIC, bytes
}

// round replaces n pods, at most m.rate pods per second (see atRate), and returns the measurements.
func (m *micMeasurement) round(ctx context.Context, n int) (round, error) {
	r := round{pods: m.workload.count(), replaced: n}
	began, err := m.work(ctx)
	if err := errors.Join(err, m.begin(ctx)); err != nil {
		return r, err
	}
	profiled := m.profileCPU(ctx, fmt.Sprintf("mic-cpu-%d.pprof", r.pods), time.Duration(float64(n)/m.rate*float64(time.Second)))
	old, now := m.workload.choose(m.pairs, n)
	before := m.workload.count()
	if r.rate, err = atRate(ctx, n, m.rate, func(i int) error { return m.workload.replace(ctx, old[i], now[i], step) }); err != nil {
		return r, err
	}
	waits, _, err := m.waitAssigned(ctx, m.workload.since(before))
	if err != nil {
		return r, err
	}
	ended, err := m.work(ctx)
	if err != nil {
		return r, err
	}
	r.setWork(ended.minus(began))
	answers := m.workload.answers()
	r.p50, r.p99 = quantile(waits, .5), quantile(waits, .99)
	r.answerP50, r.answerP99 = quantile(answers, .5), quantile(answers, .99)
	time.Sleep(quiet)
	if r.rss, r.peak, err = m.mic.memory(); err != nil {
		return r, err
	}
	return r, errors.Join(<-profiled, m.profile(ctx, fmt.Sprintf("mic-heap-%d.pprof", r.pods), "heap?gc=1"))
}

// setWork sets the work for one replaced pod. w is the work for all replaced pods.
func (r *round) setWork(w work) {
	n := r.replaced
	r.cpu, r.requests, r.writes = w.cpu/time.Duration(n), w.all/float64(n), w.written/float64(n)
}

func printRoundsHeader() {
	printLine("\npods replaced at a steady rate; CPU, requests and writes: MIC's work for one replaced pod, until its assignment is deleted and the new pod is Assigned\n")
	printLine("%6s %8s %6s   %17s   %17s   %6s %8s %6s   %6s", "", "", "", "Assigned after", "API server's", "", "", "", "")
	printLine("%6s %8s %6s   %8s %8s   %8s %8s   %6s %8s %6s   %6s", "", "", "", "", "", "answer", "", "CPU", "", "", "RSS")
	printLine("%6s %8s %6s   %8s %8s   %8s %8s   %6s %8s %6s   %6s", "pods", "replaced", "/s", "p50", "p99", "p50", "p99", "ms", "requests", "writes", "MiB")
}

func (r round) print() {
	printLine("%6d %8d %6.1f   %8s %8s   %8s %8s   %6.2f %8.2f %6.2f   %6.1f", r.pods, r.replaced, r.rate, r.p50.Round(time.Millisecond), r.p99.Round(time.Millisecond),
		r.answerP50.Round(100*time.Microsecond), r.answerP99.Round(100*time.Microsecond), milliseconds(r.cpu), r.requests, r.writes, r.rss/(1<<20))
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (r round) note(figures map[string]float64, prefix string) {
	figures[prefix+"assign.p50_s"], figures[prefix+"assign.p99_s"] = r.p50.Seconds(), r.p99.Seconds()
	figures[prefix+"api_answer.p50_s"], figures[prefix+"api_answer.p99_s"] = r.answerP50.Seconds(), r.answerP99.Seconds()
	figures[prefix+"api_writes_per_pod"], figures[prefix+"api_requests_per_pod"] = r.writes, r.requests
	figures[prefix+"cpu_ms_per_pod"] = milliseconds(r.cpu)
	figures[prefix+"rss_mib"], figures[prefix+"rss_peak_mib"] = r.rss/(1<<20), r.peak/(1<<20)
}

// profileCPU writes a CPU profile in the background, if profiles are enabled. It returns a channel that receives the
// error of the profile, or nil.
func (m *micMeasurement) profileCPU(ctx context.Context, name string, length time.Duration) <-chan error {
	done := make(chan error, 1)
	go func() { done <- m.profile(ctx, name, fmt.Sprintf("profile?seconds=%.0f", length.Seconds())) }()
	return done
}

// profile writes a profile of MIC, if profiles are enabled.
func (m *micMeasurement) profile(ctx context.Context, name, path string) error {
	if m.profiles == "" {
		return nil
	}
	text, err := m.get(ctx, micProfiles+path)
	if err != nil {
		return fmt.Errorf("profiling MIC: %w", err)
	}
	return os.WriteFile(filepath.Join(m.profiles, name), []byte(text), 0o644)
}

// atRate calls do n times, waits for all calls, and returns how many calls per second it started. It starts rate calls
// per second, and no more calls after the first error. At most rate*maxDuration calls are concurrent: if calls take
// longer than maxDuration, atRate starts fewer than rate calls per second.
func atRate(ctx context.Context, n int, rate float64, do func(i int) error) (float64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	inFlight := make(chan struct{}, max(1, int(rate*maxDuration.Seconds())))
	began := time.Now()
	for i := range n {
		select {
		case <-time.After(time.Until(began.Add(time.Duration(float64(i) / rate * float64(time.Second))))):
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
		select {
		case inFlight <- struct{}{}:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
		wg.Go(func() {
			defer func() { <-inFlight }()
			if err := do(i); err != nil {
				cancel(err)
			}
		})
	}
	took := time.Since(began)
	wg.Wait()
	return float64(n) / took.Seconds(), context.Cause(ctx)
}
