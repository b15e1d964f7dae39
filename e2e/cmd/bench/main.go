// Command bench measures NMI and prints the figures, and writes them to a file as one flat JSON object.
//
// It runs NMI on a node of its own, a network namespace beside the test cluster: with the cluster's real API server,
// a stand-in for IMDS, 250 pods (Pod objects, and addresses in a second namespace from which requests come) and 5,000
// identities with their bindings. Beside it stands a bare net/http handler in namespaces of the same shape, behind the
// same rules, that returns the same bytes. Both are measured in turn within one run, so that the ratio holds on a noisy
// machine.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/podidentity/podidentity/e2e/cluster"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "bare" {
		exit(bare(os.Args[2:]))
	}
	out := flag.String("o", "bench.json", "`file` for the figures")
	seconds := flag.Float64("seconds", 3, "length of one round")
	rounds := flag.Int("rounds", 7, "rounds for each of the two")
	identities := flag.Int("identities", 5000, "AzureIdentities in the cluster")
	profiles := flag.String("profiles", "", "`folder` for a CPU and a heap profile of NMI under load")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	figures, err := run(ctx, time.Duration(*seconds*float64(time.Second)), *rounds, *identities, *profiles)
	if err == nil {
		err = write(*out, figures)
	}
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func write(file string, figures map[string]float64) error {
	text, err := json.MarshalIndent(figures, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func run(ctx context.Context, round time.Duration, rounds, identities int, profiles string) (map[string]float64, error) {
	figures := map[string]float64{}
	return figures, withRig(ctx, identities, func(r *rig) error {
		calls, slowest, err := r.burst(ctx)
		if err != nil {
			return err
		}
		say("\n%d pods of one identity asked at once: %d call(s) to IMDS, the last answer after %s", pods, calls, slowest.Round(time.Millisecond))
		figures["nmi.burst250.imds_calls"] = float64(calls)
		if err := r.startBare(ctx); err != nil {
			return err
		}
		if err := r.compare(ctx, figures, round, rounds); err != nil || profiles == "" {
			return err
		}
		return r.profile(ctx, profiles, 5*time.Second)
	})
}

// withRig starts a cluster, fills it, starts NMI beside it, and takes all down again when do is done.
func withRig(ctx context.Context, identities int, do func(*rig) error) (err error) {
	c, err := cluster.Start(ctx, cluster.Options{WithoutAzure: true, Progress: func(line string) { say("   %s", line) }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	if _, err := c.Kubectl(ctx, "apply", "--server-side", "-f", filepath.Join(repo(), "deploy", "podidentity", "crds")); err != nil {
		return err
	}
	say("making %d identities with bindings and %d pods", identities, pods)
	if err := makeObjects(ctx, c, identities); err != nil {
		return err
	}
	r, err := newRig(ctx, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	if err := r.startNMI(ctx); err != nil {
		return err
	}
	return do(r)
}

// compare measures the two in turn and notes the medians of the ratios.
func (r *rig) compare(ctx context.Context, figures map[string]float64, round time.Duration, rounds int) error {
	say("\ncached token, %d connections kept alive, %d rounds of %s each\n", workers, rounds, round)
	say("%5s  %10s %8s %8s   %10s %8s %8s   %6s %6s", "round", "NMI req/s", "p50", "p99", "bare req/s", "p50", "p99", "req/s", "p99")
	var rps, p99, nmiRPS, nmiP50, nmiP99 []float64
	for i := range rounds + 1 {
		nmi, err := r.nmi.measure(ctx, round)
		if err != nil {
			return fmt.Errorf("NMI: %w", err)
		}
		bare, err := r.bare.measure(ctx, round)
		if err != nil {
			return fmt.Errorf("bare handler: %w", err)
		}
		if i == 0 {
			continue // the first warms both up
		}
		say("%5d  %10.0f %8s %8s   %10.0f %8s %8s   %6.2f %6.2f", i, nmi.perSecond, nmi.p50, nmi.p99, bare.perSecond, bare.p50, bare.p99,
			nmi.perSecond/bare.perSecond, float64(nmi.p99)/float64(bare.p99))
		rps = append(rps, nmi.perSecond/bare.perSecond)
		p99 = append(p99, float64(nmi.p99)/float64(bare.p99))
		nmiRPS = append(nmiRPS, nmi.perSecond)
		nmiP50 = append(nmiP50, float64(nmi.p50.Microseconds()))
		nmiP99 = append(nmiP99, float64(nmi.p99.Microseconds()))
	}
	rss, peak, err := r.nmiMemory()
	if err != nil {
		return err
	}
	figures["nmi.cached.rps"] = median(nmiRPS)
	figures["nmi.cached.p50_us"] = median(nmiP50)
	figures["nmi.cached.p99_us"] = median(nmiP99)
	figures["nmi.cached.rps_ratio"] = median(rps)
	figures["nmi.cached.p99_ratio"] = median(p99)
	figures["nmi.rss_mib"] = rss
	figures["nmi.rss_peak_mib"] = peak
	say("\nmedians: %.0f requests/s, p50 %.0f µs, p99 %.0f µs", median(nmiRPS), median(nmiP50), median(nmiP99))
	say("against the bare handler: %.2f of its requests/s (goal: at least 0.7), p99 %.2f times its (goal: at most 1.5)", median(rps), median(p99))
	say("RSS of NMI: %.1f MiB after the load, %.1f MiB at its peak (goal: under 40)", rss, peak)
	return nil
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
