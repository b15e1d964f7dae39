package main

import (
	"fmt"
	"time"
)

// goal is the text of a goal, and whether it is met.
type goal struct {
	what string
	met  bool
}

func (g goal) String() string {
	if g.met {
		return "ok      " + g.what
	}
	return "missed  " + g.what
}

// comparison is what was measured in the small and in the large cluster.
type comparison struct {
	small, large round
	patches      int // greatest number of PATCHes for one scale set in a phase where many pods need identities at once
}

func (v comparison) cpuRatio() float64     { return float64(v.large.cpu) / float64(v.small.cpu) }
func (v comparison) requestRatio() float64 { return v.large.requests / v.small.requests }
func (v comparison) perPod() float64       { return v.large.rss / float64(v.large.pods) }

// marginal is the memory for one more pod.
func (v comparison) marginal() float64 {
	return (v.large.rss - v.small.rss) / float64(v.large.pods-v.small.pods)
}

// apiTime estimates the part of the time of an assignment that the API server takes: two sequential writes. Each write
// is assumed to take the p99 of the API server's response times to the creation of a pod.
func (v comparison) apiTime() time.Duration { return 2 * v.large.answerP99 }

func (v comparison) goals() []goal {
	return []goal{
		{fmt.Sprintf("p99 until Assigned: %.3f s (goal: under 1 s plus %.3f s for the API server's responses to two writes)", v.large.p99.Seconds(), v.apiTime().Seconds()),
			v.large.p99 < time.Second+v.apiTime()},
		{fmt.Sprintf("PATCHes for one scale set in a burst: %d (goal: at most 2)", v.patches), v.patches <= 2},
		{fmt.Sprintf("MIC's work for one replaced pod, in a cluster of %d pods compared with %d: %.2f times the CPU time, %.2f times the requests (goal: each under 1.5)",
			v.large.pods, v.small.pods, v.cpuRatio(), v.requestRatio()), v.cpuRatio() < 1.5 && v.requestRatio() < 1.5},
		{fmt.Sprintf("RSS of MIC: %.2f KiB per pod (goal: under 6) at %d pods, %.2f KiB for each additional pod", v.perPod()/1024, v.large.pods, v.marginal()/1024), v.perPod() < 6*1024},
	}
}

// report prints for each goal whether it is met, and records its figures.
func (v comparison) report(figures map[string]float64) {
	figures["mic.patches_per_vmss"] = float64(v.patches)
	figures["mic.work_ratio_2k_20k"] = v.cpuRatio()
	figures["mic.request_ratio_2k_20k"] = v.requestRatio()
	figures["mic.rss_bytes_per_pod"] = v.perPod()
	figures["mic.rss_bytes_per_pod_marginal"] = v.marginal()
	printLine("")
	for _, g := range v.goals() {
		printLine("%s", g)
	}
}
