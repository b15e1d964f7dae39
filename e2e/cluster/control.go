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

// controlServer takes orders for a running cluster on a socket that only root reaches.
type controlServer struct {
	server  *http.Server
	stopped chan struct{} // closed once everything is down
	err     error         // valid from then on
}

func (s *supervisor) listen(end func()) (*controlServer, error) {
	listener, err := net.Listen("unix", controlSocket)
	if err != nil {
		return nil, fmt.Errorf("opening the control socket: %w", err)
	}
	c := &controlServer{stopped: make(chan struct{})}
	orders := http.NewServeMux()
	order := func(pattern string, f func(r *http.Request) error) {
		orders.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := f(r); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
			}
		})
	}
	order("POST /stop", func(*http.Request) error {
		end()
		<-c.stopped
		return c.err
	})
	order("POST /apiserver/stop", func(*http.Request) error {
		s.ops.Lock()
		defer s.ops.Unlock()
		return s.cp.apiserver.stop()
	})
	order("POST /apiserver/start", func(r *http.Request) error {
		s.ops.Lock()
		defer s.ops.Unlock()
		if s.cp.apiserver.ended() == nil {
			return errors.New("the API server is running")
		}
		return s.cp.startAPIServer(r.Context())
	})
	order("POST /nodes/{name}/restart", func(r *http.Request) error {
		s.ops.Lock()
		defer s.ops.Unlock()
		return s.restartNode(r.Context(), r.PathValue("name"))
	})
	c.server = &http.Server{Handler: orders}
	go c.server.Serve(listener)
	return c, nil
}

// finish answers those that wait for the end, and closes.
func (c *controlServer) finish(err error) {
	c.err = err
	close(c.stopped)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = c.server.Shutdown(ctx)
}

// control gives the running cluster's supervisor an order and waits until it is carried out.
func control(ctx context.Context, order string) error {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", controlSocket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://supervisor"+order, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	var urlErr *url.Error
	if errors.As(err, &urlErr) {
		err = urlErr.Err // the made-up address says nothing
	}
	if err != nil {
		return fmt.Errorf("asking the cluster's supervisor for %s: %w", order, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return errors.New(string(bytes.TrimSpace(text)))
}
