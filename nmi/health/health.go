package health

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
)

// Health is what the probes ask. The zero value is alive and not ready.
type Health struct {
	mu       sync.Mutex
	waiting  map[string]string // what is missing -> why
	shutting bool
}

// The things that have to be in place before NMI is ready.
const (
	Listener = "listener"
	Rules    = "rules"
	CRDs     = "custom resource definitions"
	Caches   = "caches"
)

func New() *Health {
	return &Health{waiting: map[string]string{Listener: "not up yet", Rules: "not verified yet", CRDs: "not looked for yet", Caches: "not filled yet"}}
}

// Set notes why something is missing; nil means that it is in place.
func (h *Health) Set(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		delete(h.waiting, what)
		return
	}
	h.waiting[what] = err.Error()
}

// Explain notes why something is still missing; of what is in place it says nothing.
func (h *Health) Explain(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, missing := h.waiting[what]; missing {
		h.waiting[what] = err.Error()
	}
}

func (h *Health) ShutDown() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.shutting = true
}

// Ready returns nil, or what is missing.
func (h *Health) Ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.shutting {
		return errors.New("shutting down")
	}
	var missing []string
	for _, what := range []string{Listener, Rules, CRDs, Caches} {
		if why, ok := h.waiting[what]; ok {
			missing = append(missing, what+": "+why)
		}
	}
	if len(missing) > 0 {
		return errors.New(strings.Join(missing, "; "))
	}
	return nil
}

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
