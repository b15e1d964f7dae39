package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// waitForSignal answers readiness probes on a port until ctx ends, so that the pod of "mic uninstall" becomes ready. If
// the process ended earlier, the kubelet would start it again.
func waitForSignal(ctx context.Context, port int) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		return fmt.Errorf("mic uninstall is complete, but MIC cannot listen for readiness probes; give a free port with --http-probe-port: %w", err)
	}
	return serveReadiness(ctx, listener)
}

// serveReadiness answers readiness probes on a listener until ctx ends.
func serveReadiness(ctx context.Context, listener net.Listener) error {
	server := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }),
		ReadHeaderTimeout: 5 * time.Second,
	}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
