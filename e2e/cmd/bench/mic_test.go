package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestPairsContainEachIdentityOnEachScaleSetOnce(t *testing.T) {
	first, later, late := firstPairs(), laterPairs(), latePairs()
	seen := map[pair]int{}
	for _, p := range slices.Concat(first, later, late) {
		seen[p]++
	}
	if len(seen) != scaleSets*identities || len(first)+len(later)+len(late) != len(seen) {
		t.Errorf("%d + %d + %d pairs, of which %d differ; want %d", len(first), len(later), len(late), len(seen), scaleSets*identities)
	}
	for name, pairs := range map[string][]pair{"first": first, "late": late} {
		inSet := map[int]int{}
		for _, p := range pairs {
			inSet[p.set]++
		}
		for set := range scaleSets {
			if inSet[set] != block {
				t.Errorf("scale set %d has %d of the %s pairs, want %d", set, inSet[set], name, block)
			}
		}
	}
}

func TestProcessorTimeIsUserAndSystemTime(t *testing.T) {
	stat := "4711 (a (strange) name) S 1 4711 4711 0 -1 4194304 100 0 0 0 250 75 3 4 20 0 8 0 12345 1000000 500\n"
	got, err := parseCPU([]byte(stat))
	if want := 3250 * time.Millisecond; err != nil || got != want {
		t.Errorf("processor time %s, error %v, want %s", got, err, want)
	}
	for _, bad := range []string{"", "4711 (name) S 1 2", strings.Replace(stat, " 250 ", " x ", 1)} {
		if got, err := parseCPU([]byte(bad)); err == nil {
			t.Errorf("%q was read as a processor time of %s, want an error", bad, got)
		}
	}
}

func TestMemoryIsInBytes(t *testing.T) {
	now, peak, err := parseMemory("Name:\tmic\nVmPeak:\t  1300000 kB\nVmHWM:\t  204800 kB\nVmRSS:\t  102400 kB\n")
	if err != nil || now != 100<<20 || peak != 200<<20 {
		t.Errorf("%.0f bytes now, %.0f bytes at the peak, error %v; want 100 MiB and 200 MiB", now, peak, err)
	}
	if _, _, err := parseMemory("Name:\tmic\nState:\tZ (zombie)\n"); err == nil {
		t.Error("the status of an ended process, which has no memory figures, was read without an error")
	}
}

func TestRequestsAreCountedOverAllCodesAndHosts(t *testing.T) {
	got, err := readRequests(`# HELP rest_client_requests_total Number of HTTP requests.
# TYPE rest_client_requests_total counter
rest_client_requests_total{code="200",host="10.10.0.1:443",method="GET"} 13
rest_client_requests_total{code="200",host="10.10.0.1:443",method="PATCH"} 400
rest_client_requests_total{code="409",host="10.10.0.1:443",method="PATCH"} 2
rest_client_requests_total{code="201",host="10.10.0.1:443",method="POST"} 1.2e+03
rest_client_requests_total_of_another{code="201",method="POST"} 5
`)
	if want := (requests{all: 1615, writes: 1602}); err != nil || got != want {
		t.Errorf("requests %+v, error %v, want %+v", got, err, want)
	}
	if _, err := readRequests(`rest_client_requests_total{method="GET"} many` + "\n"); err == nil {
		t.Error("a count that is not a number was accepted")
	}
}

func TestOnlyResourcesThatMICWritesAreCounted(t *testing.T) {
	got, err := readWrites(`apiserver_request_total{code="201",dry_run="",group="aadpodidentity.k8s.io",resource="azureassignedidentities",scope="resource",subresource="",verb="POST",version="v1"} 10
apiserver_request_total{code="200",dry_run="",group="aadpodidentity.k8s.io",resource="azureassignedidentities",scope="resource",subresource="status",verb="PATCH",version="v1"} 11
apiserver_request_total{code="200",dry_run="",group="aadpodidentity.k8s.io",resource="azureassignedidentities",scope="cluster",subresource="",verb="WATCH",version="v1"} 100
apiserver_request_total{code="200",dry_run="",group="",resource="configmaps",scope="resource",subresource="",verb="PUT",version="v1"} 3
apiserver_request_total{code="201",dry_run="",group="",resource="pods",scope="resource",subresource="",verb="POST",version="v1"} 1000
`)
	if err != nil || got != 24 {
		t.Errorf("%v writes, error %v, want 24", got, err)
	}
}

// after returns a fixed time plus d.
func after(d time.Duration) time.Time { return time.Unix(1e9, 0).Add(d) }

func event(kind, name, pod, state string) (e watchEvent) {
	e.Type = kind
	e.Object.Metadata.Namespace, e.Object.Metadata.Name = "apps", name
	e.Object.Spec.PodNamespace, e.Object.Spec.Pod = "apps", pod
	e.Object.Status.Status = state
	return e
}

func TestWaitOfAPodEndsWhenItIsAssignedForTheFirstTime(t *testing.T) {
	w := &watcher{created: map[string]time.Time{"apps/a": after(0), "apps/b": after(0), "apps/c": after(0), "apps/early": after(time.Second)},
		assigned: map[string]time.Time{}, live: map[string]struct{}{}}
	w.record(event("ADDED", "a-1", "a", ""), after(time.Second))
	w.record(event("MODIFIED", "a-1", "a", "Assigned"), after(2*time.Second))
	w.record(event("MODIFIED", "a-1", "a", "Assigned"), after(3*time.Second)) // for example, a change of its finalizers
	w.record(event("MODIFIED", "b-1", "b", "Assigned"), after(time.Second))
	w.record(event("DELETED", "b-1", "b", "Assigned"), after(4*time.Second))
	w.record(event("ADDED", "c-1", "c", "Created"), after(4*time.Second))
	w.record(event("MODIFIED", "early-1", "early", "Assigned"), after(0)) // before apps/early counts as created
	all := []string{"apps/a", "apps/b", "apps/c", "apps/early"}
	waits, last := w.took(all)
	if want := []time.Duration{0, time.Second, 2 * time.Second}; !slices.Equal(waits, want) || !last.Equal(after(2*time.Second)) {
		t.Errorf("waits of the pods: %v, the last until %s; want %v, the last until 2 s after the start", waits, last, want)
	}
	if waiting, live, err := w.pending(all); waiting != 1 || live != 3 || err != nil {
		t.Errorf("%d pods wait, %d assignments exist, error %v; want 1 pod (c) and 3 assignments (of a, c and early)", waiting, live, err)
	}
}

func TestWatchContinuesAfterItsEndButNotAfterAnError(t *testing.T) {
	w := &watcher{created: map[string]time.Time{}, assigned: map[string]time.Time{}, live: map[string]struct{}{}}
	const added = `{"type":"ADDED","object":{"metadata":{"namespace":"apps","name":"a-1","resourceVersion":"7"},"spec":{"pod":"a","podNamespace":"apps"},"status":{"status":"Assigned"}}}` + "\n"
	if err := w.readAll(strings.NewReader(added)); err != nil || len(w.live) != 1 || len(w.assigned) != 1 || w.version != "7" {
		t.Errorf("after the end of the stream: error %v, %d assignments, %d Assigned, version %q; want no error, 1, 1 and version 7", err, len(w.live), len(w.assigned), w.version)
	}
	err := w.readAll(strings.NewReader(`{"type":"ERROR","object":{"kind":"Status","status":"Failure","message":"too old"}}`))
	if err == nil || !strings.Contains(err.Error(), "too old") {
		t.Errorf("after an ERROR event: error %v, want one with the message of the event", err)
	}
	if err := w.readAll(strings.NewReader(added[:40])); err == nil {
		t.Error("a stream that ends within an event was read without an error")
	}
}

func TestAtRateKeepsTheRateAndStopsAtTheFirstError(t *testing.T) {
	var done atomic.Int32
	began := time.Now()
	rate, err := atRate(t.Context(), 20, 200, func(int) error { done.Add(1); return nil })
	if err != nil || rate > 220 {
		t.Errorf("%.0f calls per second, error %v, want at most 220", rate, err)
	}
	if took := time.Since(began); done.Load() != 20 || took < 95*time.Millisecond {
		t.Errorf("%d calls in %s, want 20 in at least 95ms", done.Load(), took)
	}
	broken := errors.New("broken")
	_, err = atRate(t.Context(), 1000, 100, func(i int) error {
		if i == 1 {
			return broken
		}
		return nil
	})
	if !errors.Is(err, broken) {
		t.Errorf("error %v, want that of the second call", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := atRate(ctx, 1000, 1, func(int) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("error of a canceled atRate: %v, want context.Canceled", err)
	}
}

func TestComparisonIsPerPod(t *testing.T) {
	v := comparison{patches: 2}
	v.small = round{pods: 2000, replaced: 400, rss: 80 << 20}
	v.small.setWork(work{cpu: time.Second, requests: requests{all: 2000}})
	v.large = round{pods: 20000, replaced: 2000, rss: 116 << 20, p99: 1100 * time.Millisecond, answerP99: 60 * time.Millisecond}
	v.large.setWork(work{cpu: 7 * time.Second, requests: requests{all: 10400}, written: 8000})
	if v.cpuRatio() != 1.4 || v.requestRatio() != 1.04 || v.large.writes != 4 {
		t.Errorf("ratios of the CPU time %v and of the requests %v, writes per replaced pod %v; want 1.4, 1.04 and 4", v.cpuRatio(), v.requestRatio(), v.large.writes)
	}
	if v.perPod() != (116<<20)/20000. || v.marginal() != (36<<20)/18000. {
		t.Errorf("RSS: %v bytes per pod, %v bytes for each additional pod; want 116 MiB for 20,000 pods and 36 MiB for 18,000", v.perPod(), v.marginal())
	}
	for _, g := range v.goals() {
		if !g.met || !strings.HasPrefix(g.String(), "ok ") {
			t.Error(g)
		}
	}
	v.patches, v.large.p99, v.large.rss = 3, 2*time.Second, 120<<20
	v.large.requests = 8
	for _, g := range v.goals() {
		if g.met || !strings.HasPrefix(g.String(), "missed ") {
			t.Error(g)
		}
	}
}
