package azure

import (
	"net/http"
	"strconv"
	"time"
)

const (
	// defaultRetryAfter is how long a 429 counts that does not say how long.
	defaultRetryAfter = 10 * time.Second
	// maxRetryAfter bounds what an answer can ask for. ARM's longest limits are by the hour.
	maxRetryAfter = time.Hour
)

// retryAfter returns how long an answer asks to wait; 0 if it does not say.
func retryAfter(h http.Header) time.Duration {
	for _, name := range []string{"Retry-After-Ms", "X-Ms-Retry-After-Ms"} {
		if ms, err := strconv.ParseInt(h.Get(name), 10, 32); err == nil && ms > 0 {
			return min(time.Duration(ms)*time.Millisecond, maxRetryAfter)
		}
	}
	said := h.Get("Retry-After")
	if s, err := strconv.ParseInt(said, 10, 32); err == nil {
		return min(max(time.Duration(s)*time.Second, 0), maxRetryAfter)
	}
	if at, err := http.ParseTime(said); err == nil {
		return min(max(time.Until(at), 0), maxRetryAfter)
	}
	return 0
}
