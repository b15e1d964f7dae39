// Package outbound is what NMI and MIC both need where they talk to Azure over HTTP, each through a client of its own.
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

// Door is shut for a while after somebody asked to be left alone. The zero value is open.
type Door struct {
	mu        sync.Mutex
	shutUntil time.Time
}

// Shut returns how long it is still to be left alone; zero or less if it is not.
func (d *Door) Shut() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return time.Until(d.shutUntil)
}

// Close shuts it for at least that long.
func (d *Door) Close(wait time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if until := time.Now().Add(wait); until.After(d.shutUntil) {
		d.shutUntil = until
	}
}

// WithOwnBody returns the request with a body of its own. After an answer that came early net/http may still be reading
// the body, while the Azure library already rewinds it for the next attempt.
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

// RootCAs returns what TLS connections are verified with where the flag --ca-bundle names a file of certificates (PEM)
// that are trusted besides the system's; nil, which is what the system trusts, where it names none.
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
