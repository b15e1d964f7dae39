package token

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// IMDS allows one machine 20 identity requests a second and 5 at a time (documented under "Rate limits" of managed
// identities on virtual machines). Beyond that it answers 429 to everybody on the machine.
const (
	imdsRate       = 20
	imdsConcurrent = 5
)

// gate is a transport that keeps this process within IMDS's limits, whoever asks. It counts each attempt on the wire,
// retries too, and stays shut for as long as a 429 said.
type gate struct {
	next    http.RoundTripper
	limiter *rate.Limiter
	slots   chan struct{}

	mu        sync.Mutex
	shutUntil time.Time
}

func newGate(next http.RoundTripper) *gate {
	return &gate{next: next, limiter: rate.NewLimiter(imdsRate, 1), slots: make(chan struct{}, imdsConcurrent)}
}

// RoundTrip waits for its turn within the request's context. The slot is free again once the body is closed.
func (g *gate) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx := r.Context()
	select {
	case g.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	resp, err := g.pass(ctx, r)
	if err != nil {
		<-g.slots
		return nil, err
	}
	resp.Body = &slotBody{ReadCloser: resp.Body, free: sync.OnceFunc(func() { <-g.slots })}
	return resp, nil
}

func (g *gate) pass(ctx context.Context, r *http.Request) (*http.Response, error) {
	if wait := g.shut(); wait > 0 {
		return nil, &Error{Class: Throttled, Status: http.StatusTooManyRequests, Code: "too_many_requests", Description: "IMDS asked to be left alone", RetryAfter: wait}
	}
	if err := g.limiter.Wait(ctx); err != nil {
		return nil, err
	}
	resp, err := g.next.RoundTrip(r)
	if err == nil && resp.StatusCode == http.StatusTooManyRequests {
		g.close(retryAfter(resp.Header))
	}
	return resp, err
}

// shut returns how long the gate is still to be left alone.
func (g *gate) shut() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Until(g.shutUntil)
}

func (g *gate) close(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if until := time.Now().Add(d); until.After(g.shutUntil) {
		g.shutUntil = until
	}
}

// A 429 without Retry-After closes the gate for a second; one that asks for more than a minute is not believed.
const minShut, maxShut = time.Second, time.Minute

func retryAfter(h http.Header) time.Duration {
	s, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil {
		return minShut
	}
	return min(max(time.Duration(s)*time.Second, minShut), maxShut)
}

type slotBody struct {
	io.ReadCloser
	free func()
}

func (b *slotBody) Close() error {
	defer b.free()
	return b.ReadCloser.Close()
}
