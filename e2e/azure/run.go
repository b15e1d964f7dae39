package azure

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// maxSocketPath is the kernel's limit for the path of a unix socket, in bytes: the size
// of sun_path without the terminating null byte.
const maxSocketPath = 107

// Run serves until the context ends, then returns nil. If it cannot open one of the
// listeners, it returns the error and serves no request. If a server fails later, Run
// stops the others and returns the error.
func Run(ctx context.Context, cfg Config) error {
	return run(ctx, cfg, time.Now)
}

// run is Run with a clock, so that tests need not wait until tokens expire.
func run(ctx context.Context, cfg Config, now func() time.Time) error {
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("fake Azure: configuration: %w", err)
	}
	st, err := openState(cfg.StateDir, certificateHosts(cfg))
	if err != nil {
		return fmt.Errorf("fake Azure: %w", err)
	}
	ls, err := listen(cfg)
	if err != nil {
		return fmt.Errorf("fake Azure: %w", err)
	}
	defer ls.close()
	return serve(ctx, ls, servers(ctx, cfg, st, ls, now))
}

// listeners are owned by run. The servers close them, too: a second close has no effect.
type listeners struct{ imds, entra, control net.Listener }

func (l *listeners) close() {
	for _, one := range []net.Listener{l.imds, l.entra, l.control} {
		if one != nil {
			_ = one.Close()
		}
	}
}

func listen(cfg Config) (_ *listeners, err error) {
	l := &listeners{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.imds, err = net.Listen("tcp", cfg.IMDSAddr); err != nil {
		return nil, fmt.Errorf("listening on %s for IMDS: %w", cfg.IMDSAddr, err)
	}
	if l.entra, err = net.Listen("tcp", cfg.EntraAddr); err != nil {
		return nil, fmt.Errorf("listening on %s for Entra ID: %w", cfg.EntraAddr, err)
	}
	if l.control, err = listenUnix(cfg.ControlSocket); err != nil {
		return nil, err
	}
	return l, nil
}

// listenUnix listens on the Unix socket path. It replaces a socket that an ended process left
// there, and fails if a running process uses it.
func listenUnix(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("control socket %s: the path is %d bytes long, the kernel allows %d", path, len(path), maxSocketPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	conn, err := net.Dial("unix", path)
	switch {
	case err == nil:
		_ = conn.Close()
		return nil, fmt.Errorf("control socket %s is in use by a running process", path)
	case errors.Is(err, syscall.ECONNREFUSED):
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("removing the stale control socket: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return l, nil
}

// servers creates the parts of the fake Azure and connects them. It returns the HTTP
// servers in the order of the fields of listeners.
func servers(ctx context.Context, cfg Config, st *state, ls *listeners, now func() time.Time) []*http.Server {
	iss := newIssuer(st.signing, now)
	arm := NewARM(ARMOptions{Now: now, Verify: iss.verify, Tenant: cfg.Tenant})
	dir, sw, rec := newDirectory(cfg, arm), newSwitches(arm), newRecorder(now)
	metadata := newIMDS(dir, iss, now)
	login := &entra{dir: dir, issuer: iss, now: now}
	keys, err := iss.keys(st.caPEM)
	if err != nil {
		panic(err) // encoding an RSA key cannot fail
	}
	imdsService := &service{
		name: serviceIMDS, dir: dir, switches: sw, rec: rec, now: now,
		classify: imdsClass, admit: newLimiter(now).admit, annotate: func(*requestContext) {}, answer: metadata.answer, fail: metadata.fail,
	}
	entraService := &service{
		name: serviceEntra, dir: dir, switches: sw, rec: rec, now: now, classify: entraClass,
		admit:    func(string, string, bool) (func(), bool) { return func() {}, true },
		annotate: login.annotate, answer: login.answer, fail: login.fail,
	}
	api := &control{dir: dir, arm: arm, switches: sw, rec: rec, keys: keys,
		addresses: Addresses{IMDS: ls.imds.Addr().String(), Entra: ls.entra.Addr().String()}}
	out := []*http.Server{
		{Handler: imdsService, ConnState: imdsService.connState},
		{Handler: behindTLS(arm, entraService), ConnState: entraService.connState, TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{st.tls},
		}},
		{Handler: api.handler()},
	}
	for _, s := range out {
		// When ctx ends, the base context ends the requests that hang because of a fault.
		// ErrorLog, in which a server reports connections with invalid data, is discarded:
		// connState counts each connection to IMDS, Entra ID and ARM, also these.
		s.BaseContext = func(net.Listener) context.Context { return ctx }
		s.ErrorLog = log.New(io.Discard, "", 0)
		s.ReadHeaderTimeout = 30 * time.Second
		s.IdleTimeout = 5 * time.Minute
	}
	return out
}

// behindTLS distinguishes requests to the fake Entra ID and to the fake ARM by their
// path, not by their host name: clients may use the same host name for both.
func behindTLS(arm, entra http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.EqualFold(segment(r.URL.Path, 0), "subscriptions") {
			arm.ServeHTTP(w, r)
			return
		}
		entra.ServeHTTP(w, r)
	})
}

// serve runs the servers. It stops all when the context ends or one of them fails,
// and returns the first error.
func serve(ctx context.Context, ls *listeners, servers []*http.Server) error {
	ended := make(chan error, len(servers))
	for i, start := range []func() error{
		func() error { return servers[0].Serve(ls.imds) },
		func() error { return servers[1].ServeTLS(ls.entra, "", "") },
		func() error { return servers[2].Serve(ls.control) },
	} {
		go func() {
			if err := start(); !errors.Is(err, http.ErrServerClosed) {
				ended <- fmt.Errorf("fake Azure: serving %s: %w", []string{"IMDS", "Entra ID and ARM", "the control API"}[i], err)
				return
			}
			ended <- nil
		}()
	}
	var first error
	running := len(servers)
	select {
	case <-ctx.Done():
	case first = <-ended:
		running--
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	for _, s := range servers {
		if s.Shutdown(grace) != nil {
			_ = s.Close()
		}
	}
	for range running {
		if err := <-ended; first == nil {
			first = err
		}
	}
	return first
}
