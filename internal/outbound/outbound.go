// Package outbound contains what the HTTP clients of NMI and MIC for Azure have in common. It protects Azure against
// requests before the time that its Retry-After names. It protects the clients against data races of the Azure SDK's
// retries, and against certificate bundles that hold no certificate.
package outbound

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"
)

// RetryAfterGate says whether requests may be sent to a server. When the server responds with Retry-After, the client
// closes the gate with Extend for that time. The zero value is open.
type RetryAfterGate struct {
	mu          sync.Mutex
	closedUntil time.Time
}

// Remaining returns how long the gate is still closed. It is zero or less if the gate is open.
func (g *RetryAfterGate) Remaining() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Until(g.closedUntil)
}

// Extend closes the gate for at least the duration. It never shortens the time that the gate is already closed.
func (g *RetryAfterGate) Extend(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if until := time.Now().Add(d); until.After(g.closedUntil) {
		g.closedUntil = until
	}
}

// WithOwnBody returns a copy of the request that has its own body, or the request itself if it has no body. Attempts
// must not share a body: if a response arrives early, net/http may still read the body of one attempt while the Azure
// SDK already rewinds it for the next.
func WithOwnBody(r *http.Request) (*http.Request, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return r, nil
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	own := r.WithContext(r.Context())
	own.Body, own.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	own.GetBody = nil
	return own, nil
}

// RootCAs returns the certificates of the system and those of the PEM file that the flag --ca-bundle names. It returns
// nil, which means those of the system, if file is "". If the certificates of the system cannot be read, it returns
// only those of the file.
func RootCAs(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading --ca-bundle: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("--ca-bundle %s holds no certificate in PEM form", file)
	}
	return pool, nil
}
