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

// Limits of the HTTP servers.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	// writeTimeout is longer than a request that fetches once can wait in total: for the caches, its pod, its
	// credential and a token. A request with several slow fetches can take longer, and its connection then breaks.
	// newHTTPServer adds the time that a request may wait for an assignment.
	writeTimeout = 75 * time.Second
	// Clients request a new token only once in hours. A connection that stays open until then would only use memory.
	idleTimeout    = 20 * time.Second
	maxHeaderBytes = 16 << 10
)

// ProfilePort is the port of pprof, on loopback, if profiling is enabled.
const ProfilePort = 6060

// newHTTPServer returns a server with limits, for requests that may wait for an assignment, at most for
// maxAssignmentWait.
func newHTTPServer(h http.Handler, maxAssignmentWait time.Duration) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout + maxAssignmentWait,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		// Discard the log of the server: it has a line for each broken connection, and pods can break any number of
		// them.
		ErrorLog: log.New(io.Discard, "", 0),
	}
}

// Start serves the listeners in the background and returns at once. probes handles the requests at the listener for
// probes. A server that fails sends its error to the channel.
func (s *Server) Start(l *Listeners, probes http.Handler) <-chan error {
	failed := make(chan error, 5)
	serve := func(what string, s *http.Server, l net.Listener) {
		go func() {
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serving HTTP requests for %s: %w", what, err)
			}
		}()
	}
	s.pods = newHTTPServer(s, s.cfg.MaxAssignmentWait)
	s.pods.ConnContext = withCaller
	limiter := newConnectionLimiter()
	serve("pods", s.pods, s.limited(l.pods, limiter, nil))
	if l.identified != nil {
		serve("identified pods", s.pods, s.limited(l.identified, limiter, s.cfg.IdentifyCaller))
	}
	serve("probes", newHTTPServer(probes, 0), l.probes)
	serve("metrics", newHTTPServer(metricsHandler(s.metrics), 0), l.metrics)
	if l.profile != nil {
		profiles := newHTTPServer(profileHandler(), 0)
		profiles.WriteTimeout = 5 * time.Minute // the client chooses how long a profile takes
		serve("profiles", profiles, l.profile)
	}
	return failed
}

// Shutdown stops accepting requests of pods and waits until those in flight have ended, or until ctx ends.
func (s *Server) Shutdown(ctx context.Context) error { return s.pods.Shutdown(ctx) }

// Close stops accepting requests of pods and closes their connections at once.
func (s *Server) Close() error { return s.pods.Close() }

func metricsHandler(m *telemetry.Metrics) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.Registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

func profileHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}
