package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/podidentity/podidentity/iptables"
)

// bare runs the bare handler that NMI is compared with: an HTTP server that responds to each request with the contents
// of a file. In its network namespace it installs the same iptables rules as NMI.
func bare(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: bench bare FILE")
	}
	answer, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	listen := netip.MustParseAddrPort("169.254.25.79:2579")
	capture, err := iptables.New(iptables.Config{MetadataIP: netip.MustParseAddr("169.254.169.254"), MetadataPort: 80, Listen: listen})
	if err != nil {
		return err
	}
	if err := capture.EnsureLink(ctx); err != nil {
		return err
	}
	l, err := net.Listen("tcp", listen.String())
	if err != nil {
		return err
	}
	length := strconv.Itoa(len(answer))
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Header().Set("Content-Length", length)
		_, _ = w.Write(answer)
	})}
	go func() {
		<-ctx.Done()
		_ = server.Close()
	}()
	if err := capture.Install(ctx); err != nil {
		return err
	}
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving on %s: %w", listen, err)
	}
	return nil
}
