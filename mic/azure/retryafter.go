package azure

import (
	"net/http"
	"strconv"
	"time"
)

const (
	// defaultRetryAfter is the wait after a 429 without Retry-After.
	defaultRetryAfter = 10 * time.Second
	// maxRetryAfter bounds the Retry-After of a response. ARM's longest limits are per hour.
	maxRetryAfter = time.Hour
)

// retryAfter returns the time that a response tells the client to wait, or 0 if the response does not specify a time.
func retryAfter(h http.Header) time.Duration {
	for _, name := range []string{"Retry-After-Ms", "X-Ms-Retry-After-Ms"} {
		if ms, err := strconv.ParseInt(h.Get(name), 10, 32); err == nil && ms > 0 {
			return min(time.Duration(ms)*time.Millisecond, maxRetryAfter)
		}
	}
	value := h.Get("Retry-After")
	if s, err := strconv.ParseInt(value, 10, 32); err == nil {
		return min(max(time.Duration(s)*time.Second, 0), maxRetryAfter)
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(time.Until(at), 0), maxRetryAfter)
	}
	return 0
}
