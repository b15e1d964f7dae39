package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

// controlServer executes requests to a running cluster. It receives them on a socket that only root can connect to.
type controlServer struct {
	server  *http.Server
	stopped chan struct{} // closed by finish
	err     error         // valid after stopped is closed
}

// serveControl opens the control socket and serves it. POST /stop calls end and responds when finish is called.
func (s *supervisor) serveControl(end func()) (*controlServer, error) {
	listener, err := net.Listen("unix", controlSocket)
	if err != nil {
		return nil, fmt.Errorf("opening the control socket: %w", err)
	}
	c := &controlServer{stopped: make(chan struct{})}
	mux := http.NewServeMux()
	handle := func(pattern string, f func(r *http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := f(r); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
			}
		})
	}
	handle("POST /stop", func(*http.Request) error {
		end()
		<-c.stopped
		return c.err
	})
	handle("POST /apiserver/stop", func(*http.Request) error {
		s.requests.Lock()
		defer s.requests.Unlock()
		return s.cp.apiserver.stop()
	})
	handle("POST /apiserver/start", func(r *http.Request) error {
		s.requests.Lock()
		defer s.requests.Unlock()
		if s.cp.apiserver.ended() == nil {
			return errors.New("cannot start the API server: it is running")
		}
		return s.cp.startAPIServer(r.Context())
	})
	handle("POST /nodes/{name}/restart", func(r *http.Request) error {
		s.requests.Lock()
		defer s.requests.Unlock()
		return s.restartNode(r.Context(), r.PathValue("name"))
	})
	c.server = &http.Server{Handler: mux}
	go func() { _ = c.server.Serve(listener) }()
	return c, nil
}

// finish sends err, the result of stopping the cluster, to the requests that wait for the end of the cluster, and
// closes the socket.
func (c *controlServer) finish(err error) {
	c.err = err
	close(c.stopped)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = c.server.Shutdown(ctx)
}

// control sends a request to the supervisor of the running cluster and waits until the supervisor has executed it.
func control(ctx context.Context, path string) error {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", controlSocket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://supervisor"+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	var urlErr *url.Error
	if errors.As(err, &urlErr) {
		err = urlErr.Err // without the URL, whose host is invented
	}
	if err != nil {
		return fmt.Errorf("sending POST %s to the cluster's supervisor: %w", path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return fmt.Errorf("POST %s to the cluster's supervisor: %s", path, bytes.TrimSpace(text))
}
