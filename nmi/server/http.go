package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/podidentity/podidentity/nmi/telemetry"
)

// Limits of the server. Pods are hostile until proven otherwise.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	// writeTimeout is longer than any request is held: for the caches, for the pod, and for a token. The time that one
	// may wait for an assignment comes on top.
	writeTimeout = 75 * time.Second
	// Clients ask once in hours; a connection kept for the next time would only take memory.
	idleTimeout    = 20 * time.Second
	maxHeaderBytes = 16 << 10
)

// ProfilePort serves pprof, on loopback only, where it is switched on.
const ProfilePort = 6060

// newHTTPServer puts the limits around a handler whose requests may be held for so long.
func newHTTPServer(h http.Handler, held time.Duration) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout + held,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		// What the server says here is about broken connections, and pods can cause any number of those.
		ErrorLog: log.New(io.Discard, "", 0),
	}
}

// Start serves what arrives at the listeners; probes answers the probes. A failure of one of them arrives at the channel.
func (s *Server) Start(l *Listeners, probes http.Handler) <-chan error {
	failed := make(chan error, 4)
	serve := func(what string, s *http.Server, l net.Listener) {
		go func() {
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serving %s: %w", what, err)
			}
		}()
	}
	s.pods = newHTTPServer(s, s.cfg.MaxAssignmentWait)
	serve("pods", s.pods, newLimitedListener(l.pods, s.metrics.RefusedConnections))
	serve("probes", newHTTPServer(probes, 0), l.probes)
	serve("metrics", newHTTPServer(metricsHandler(s.metrics), 0), l.metrics)
	if l.profile != nil {
		s := newHTTPServer(profiler(), 0)
		s.WriteTimeout = 5 * time.Minute // a profile takes the time it was asked to take
		serve("profiles", s, l.profile)
	}
	return failed
}

// Shutdown lets requests of pods that are under way end, until ctx does.
func (s *Server) Shutdown(ctx context.Context) error { return s.pods.Shutdown(ctx) }

// Close ends all requests of pods.
func (s *Server) Close() error { return s.pods.Close() }

func metricsHandler(m *telemetry.Metrics) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.Registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

func profiler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}
