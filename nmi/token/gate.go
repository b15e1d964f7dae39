package token

import (
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/podidentity/podidentity/internal/outbound"
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
	next       http.RoundTripper
	limiter    *rate.Limiter
	slots      slots
	retryAfter outbound.RetryAfterGate
}

func newGate(next http.RoundTripper) *gate {
	return &gate{next: next, limiter: rate.NewLimiter(imdsRate, 1), slots: make(slots, imdsConcurrent)}
}

// RoundTrip waits for its turn within the request's context.
func (g *gate) RoundTrip(r *http.Request) (*http.Response, error) { return g.slots.send(r, g.pass) }

func (g *gate) pass(r *http.Request) (*http.Response, error) {
	if wait := g.retryAfter.Remaining(); wait > 0 {
		return nil, &Error{Class: Throttled, Status: http.StatusTooManyRequests, Code: "too_many_requests", Description: "IMDS asked to be left alone", RetryAfter: wait}
	}
	if err := g.limiter.Wait(r.Context()); err != nil {
		return nil, err
	}
	resp, err := g.next.RoundTrip(r)
	if err == nil && resp.StatusCode == http.StatusTooManyRequests {
		g.retryAfter.Extend(retryAfter(resp.Header))
	}
	return resp, err
}

// slots bound how many requests are under way.
type slots chan struct{}

// send waits for a slot within the request's context. The slot is free again once the answer's body is closed.
func (s slots) send(r *http.Request, next func(*http.Request) (*http.Response, error)) (*http.Response, error) {
	select {
	case s <- struct{}{}:
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	resp, err := next(r)
	if err != nil {
		<-s
		return nil, err
	}
	resp.Body = &slotBody{ReadCloser: resp.Body, free: sync.OnceFunc(func() { <-s })}
	return resp, nil
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
