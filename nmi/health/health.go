// Package health responds to the liveness and readiness probes of NMI. NMI is ready only if it can both capture the
// requests of pods and respond to these requests. While NMI is not ready, the response to the readiness probe says what
// is missing and why.
package health

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
)

// Health records what NMI still needs to be ready.
type Health struct {
	mu       sync.Mutex
	missing  map[string]string // reason why a part is missing, by part; the parts are the constants below
	stopping bool
}

// The parts that NMI needs to be ready.
const (
	Listener = "listener"
	Rules    = "rules"
	CRDs     = "custom resource definitions"
	Caches   = "caches"
	Links    = "network links" // only if NMI sets it
)

// New returns a Health for which everything but Links is missing.
func New() *Health {
	return &Health{missing: map[string]string{Listener: "not open yet", Rules: "not installed yet", CRDs: "not checked yet", Caches: "not synced yet"}}
}

// Set records the state of a part. The parameter what is one of the constants above. If err is nil, the part is
// present. Otherwise the part is missing because of err.
func (h *Health) Set(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		delete(h.missing, what)
		return
	}
	h.missing[what] = err.Error()
}

// Explain replaces the reason why a part is missing. If the part is present, Explain does nothing. The parameter what
// is one of the constants above.
func (h *Health) Explain(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, missing := h.missing[what]; missing {
		h.missing[what] = err.Error()
	}
}

// ShutDown records that NMI is shutting down. From then on NMI is not ready.
func (h *Health) ShutDown() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stopping = true
}

// Ready returns nil if NMI is ready. Otherwise it returns an error that says what is missing, or that NMI is shutting
// down.
func (h *Health) Ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopping {
		return errors.New("NMI is shutting down")
	}
	var missing []string
	for _, what := range []string{Listener, Rules, CRDs, Caches, Links} {
		if reason, ok := h.missing[what]; ok {
			missing = append(missing, what+": "+reason)
		}
	}
	if len(missing) > 0 {
		return errors.New(strings.Join(missing, "; "))
	}
	return nil
}

// Handler serves /healthz and /readyz.
func (h *Health) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := h.Ready(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	return mux
}
