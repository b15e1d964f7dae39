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

// IMDS allows one VM 20 identity requests per second and 5 concurrent ones (documented under "Rate limits" of managed
// identities on virtual machines). Above that it answers 429 to all processes on the VM.
const (
	imdsRate       = 20
	imdsConcurrent = 5
)

// imdsLimiter is a transport that keeps the token requests of this process within the limits of IMDS. It counts each
// attempt on the wire, including retries. After a 429 it refuses requests with an [Error] of class Throttled for the
// time that the function retryAfter returns. But it still sends a request that already waited for the rate limiter when
// the 429 arrived.
type imdsLimiter struct {
	next       http.RoundTripper
	limiter    *rate.Limiter
	slots      semaphore
	retryAfter outbound.RetryAfterGate
}

func newIMDSLimiter(next http.RoundTripper) *imdsLimiter {
	return &imdsLimiter{next: next, limiter: rate.NewLimiter(imdsRate, 1), slots: make(semaphore, imdsConcurrent)}
}

// RoundTrip implements http.RoundTripper. It waits until the limits admit the request, or its context ends.
func (g *imdsLimiter) RoundTrip(r *http.Request) (*http.Response, error) {
	return g.slots.roundTrip(r, g.roundTrip)
}

func (g *imdsLimiter) roundTrip(r *http.Request) (*http.Response, error) {
	if wait := g.retryAfter.Remaining(); wait > 0 {
		return nil, &Error{Class: Throttled, Status: http.StatusTooManyRequests, Code: "too_many_requests", Description: "NMI did not send the request, because IMDS responded to an earlier request with status 429", RetryAfter: wait}
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

// semaphore bounds the number of concurrent requests.
type semaphore chan struct{}

// roundTrip waits for a free slot, at most until the context of the request ends, and then calls next. The slot becomes
// free when next fails or when the caller closes the body of the response.
func (s semaphore) roundTrip(r *http.Request, next func(*http.Request) (*http.Response, error)) (*http.Response, error) {
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
	resp.Body = &releasingBody{ReadCloser: resp.Body, free: sync.OnceFunc(func() { <-s })}
	return resp, nil
}

// After a 429, requests stop for the time in Retry-After, but at least for minRetryAfter and at most for maxRetryAfter.
// If Retry-After is missing or is not a number of seconds, they stop for minRetryAfter.
const minRetryAfter, maxRetryAfter = time.Second, time.Minute

func retryAfter(h http.Header) time.Duration {
	s, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil {
		return minRetryAfter
	}
	return min(max(time.Duration(s)*time.Second, minRetryAfter), maxRetryAfter)
}

type releasingBody struct {
	io.ReadCloser
	free func()
}

func (b *releasingBody) Close() error {
	defer b.free()
	return b.ReadCloser.Close()
}
