package nmi

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
)

// health is what the probes ask. The zero value is alive and not ready.
type health struct {
	mu       sync.Mutex
	waiting  map[string]string // what is missing -> why
	shutting bool
}

// The things that have to be in place before NMI is ready.
const (
	needListener = "listener"
	needRules    = "rules"
	needCRDs     = "custom resource definitions"
	needCaches   = "caches"
)

func newHealth() *health {
	return &health{waiting: map[string]string{needListener: "not up yet", needRules: "not verified yet", needCRDs: "not looked for yet", needCaches: "not filled yet"}}
}

// set notes why something is missing; nil means that it is in place.
func (h *health) set(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		delete(h.waiting, what)
		return
	}
	h.waiting[what] = err.Error()
}

// explain notes why something is still missing; of what is in place it says nothing.
func (h *health) explain(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, missing := h.waiting[what]; missing {
		h.waiting[what] = err.Error()
	}
}

func (h *health) shutDown() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.shutting = true
}

// ready returns nil, or what is missing.
func (h *health) ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.shutting {
		return errors.New("shutting down")
	}
	var missing []string
	for _, what := range []string{needListener, needRules, needCRDs, needCaches} {
		if why, ok := h.waiting[what]; ok {
			missing = append(missing, what+": "+why)
		}
	}
	if len(missing) > 0 {
		return errors.New(strings.Join(missing, "; "))
	}
	return nil
}

func (h *health) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := h.ready(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	return mux
}
