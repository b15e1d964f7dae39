package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/podidentity/podidentity/e2e/cluster"
)

// workers is how many connections ask at the same time, each from the address of another pod.
const workers = 16

const target = "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"

// client asks from the address of one pod.
type client struct{ http *http.Client }

// client returns one that connects from the i-th address in the station's namespace of pods, and keeps its connection.
func (s *station) client(i int) *client {
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

// figures of one round.
type figures struct {
	perSecond float64
	p50, p99  time.Duration
}

// measure asks from all workers for the length of a round.
func (s *station) measure(ctx context.Context, round time.Duration) (figures, error) {
	var mu sync.Mutex
	var all []time.Duration
	var failed error
	var wg sync.WaitGroup
	start := time.Now()
	end := start.Add(round)
	for i := range workers {
		c := s.client(i)
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
	at := func(q float64) time.Duration { return all[int(float64(len(all)-1)*q)].Round(time.Microsecond) }
	return figures{perSecond: float64(len(all)) / elapsed.Seconds(), p50: at(.5), p99: at(.99)}, nil
}
