package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/podidentity/podidentity/e2e/cluster"
)

// workers is the number of concurrent connections, each from the address of a different pod.
const workers = 16

const target = "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"

// client sends requests from the address of one pod.
type client struct{ http *http.Client }

// client returns a client that connects from the address of the node's i-th pod, and reuses its connection.
func (s *simulatedNode) client(i int) *client {
	dial := cluster.DialFrom("/run/netns/"+s.podsNetns, &net.TCPAddr{IP: net.ParseIP(podIP(s.subnet, i))})
	return &client{&http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 1, DisableCompression: true}}}
}

func (c *client) once(ctx context.Context) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Metadata", "true")
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	return readAll(resp)
}

// figures are the results of one round.
type figures struct {
	perSecond float64
	p50, p99  time.Duration
}

// measure sends requests from all workers for the length of a round, and returns the results. If a request fails, its
// worker stops, and measure returns the error.
func (s *simulatedNode) measure(ctx context.Context, round time.Duration) (figures, error) {
	return measureWorkers(ctx, round, s.client)
}

// measureWorkers is measure with other clients.
func measureWorkers(ctx context.Context, round time.Duration, newClient func(i int) *client) (figures, error) {
	var mu sync.Mutex
	var all []time.Duration
	var failed error
	var wg sync.WaitGroup
	start := time.Now()
	end := start.Add(round)
	for i := range workers {
		c := newClient(i)
		wg.Go(func() {
			defer c.http.CloseIdleConnections()
			var took []time.Duration
			var err error
			for err == nil && time.Now().Before(end) {
				began := time.Now()
				_, err = c.once(ctx)
				took = append(took, time.Since(began))
			}
			mu.Lock()
			defer mu.Unlock()
			all, failed = append(all, took...), errors.Join(failed, err)
		})
	}
	wg.Wait()
	elapsed := time.Since(start)
	if failed != nil {
		return figures{}, failed
	}
	slices.Sort(all)
	return figures{perSecond: float64(len(all)) / elapsed.Seconds(), p50: quantile(all, .5), p99: quantile(all, .99)}, nil
}

func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[int(float64(len(sorted)-1)*q)].Round(time.Microsecond)
}

// compare measures NMI and the bare handler in turn. It records the medians of NMI's figures and of the ratios to the
// bare handler, and the memory of NMI.
func (r *environment) compare(ctx context.Context, figures map[string]float64, round time.Duration, rounds int) error {
	printLine("\ncached token of NMI, compared with the bare handler, an HTTP server that returns the same body: %d connections kept alive, %d rounds of %s each\n", workers, rounds, round)
	printLine("%5s  %10s %8s %8s   %10s %8s %8s   %6s %6s", "round", "NMI req/s", "p50", "p99", "bare req/s", "p50", "p99", "req/s", "p99")
	var rps, p99, nmiRPS, nmiP50, nmiP99 []float64
	for i := range rounds + 1 {
		nmi, err := r.nmi.measure(ctx, round)
		if err != nil {
			return fmt.Errorf("measuring NMI: %w", err)
		}
		bare, err := r.bare.measure(ctx, round)
		if err != nil {
			return fmt.Errorf("measuring the bare handler, the HTTP server that NMI is compared with: %w", err)
		}
		if i == 0 {
			continue // the first round is a warm-up and does not count
		}
		printLine("%5d  %10.0f %8s %8s   %10.0f %8s %8s   %6.2f %6.2f", i, nmi.perSecond, nmi.p50, nmi.p99, bare.perSecond, bare.p50, bare.p99,
			nmi.perSecond/bare.perSecond, float64(nmi.p99)/float64(bare.p99))
		rps = append(rps, nmi.perSecond/bare.perSecond)
		p99 = append(p99, float64(nmi.p99)/float64(bare.p99))
		nmiRPS = append(nmiRPS, nmi.perSecond)
		nmiP50 = append(nmiP50, float64(nmi.p50.Microseconds()))
		nmiP99 = append(nmiP99, float64(nmi.p99.Microseconds()))
	}
	rss, peak, err := r.nmiProcess.memory()
	if err != nil {
		return err
	}
	rss, peak = rss/(1<<20), peak/(1<<20)
	figures["nmi.cached.rps"] = median(nmiRPS)
	figures["nmi.cached.p50_us"] = median(nmiP50)
	figures["nmi.cached.p99_us"] = median(nmiP99)
	figures["nmi.cached.rps_ratio"] = median(rps)
	figures["nmi.cached.p99_ratio"] = median(p99)
	figures["nmi.rss_mib"] = rss
	figures["nmi.rss_peak_mib"] = peak
	printLine("\nmedians of NMI: %.0f requests/s, p50 %.0f µs, p99 %.0f µs", median(nmiRPS), median(nmiP50), median(nmiP99))
	printLine("NMI compared with the bare handler: %.2f times the requests/s (goal: at least 0.7), %.2f times the p99 (goal: at most 1.5)", median(rps), median(p99))
	printLine("RSS of NMI: %.1f MiB after the load, %.1f MiB at its peak (goal: under 40 MiB)", rss, peak)
	return nil
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
