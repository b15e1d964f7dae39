package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// hostTokenHandler serves /host/token, where programs of the node request tokens for pods of the node. The Azure
// provider of the Secrets Store CSI driver does this to mount the secrets of a pod before the pod starts.
//
// Everything that can connect to the loopback address of the node may send such a request: programs of the node and
// pods in the host network. As with AAD Pod Identity, the request may name any pod of the node. --host-token=false
// disables the route on nodes that do not need it. The decision is the same as for a request that the pod sends itself.
type hostTokenHandler struct{ *Server }

// ServeHTTP serves one request of a program of the node.
func (s hostTokenHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.serve(w, r, s.handle) }

func (s hostTokenHandler) handle(c *requestContext, r *http.Request) {
	if !c.readCaller(r) {
		return
	}
	var refusal *metadata.Error
	c.req, refusal = metadata.ParseHostToken(r)
	if refusal == nil && !c.caller.Address.IsLoopback() {
		refusal = metadata.Forbidden(identity.RouteBlocked, "Only programs of this node may request tokens for its pods")
	}
	if refusal != nil {
		s.metrics.CountDecision(refusal.Reason)
		c.refuse(refusal)
		return
	}
	tokens, refusal := s.requests.ForPodName(r.Context(), &c.Record, c.caller.Address, c.req)
	if s.finishTokenRequest(c, r, refusal) {
		tokens[0].WriteHostToken(c, time.Now())
	}
}

// hostTokenRetryInterval is the time between two attempts to serve /host/token. An attempt fails if another program
// uses the port, such as AAD Pod Identity during a migration.
const hostTokenRetryInterval = 5 * time.Second

// ServeHostTokens listens on loopback and serves /host/token until ctx ends. After a failure it retries and does not
// stop NMI, because the requests of pods do not depend on this route.
func (s *Server) ServeHostTokens(ctx context.Context) {
	address := fmt.Sprintf("127.0.0.1:%d", s.cfg.Listen.Port())
	for logged := false; ; logged = true {
		l, err := net.Listen("tcp4", address)
		if err == nil {
			s.logs.Main.Info("serving /host/token to programs of this node", zap.String(telemetry.KeyAddress, address))
			if err = s.serveHostTokens(ctx, l); err == nil {
				return
			}
		}
		if !logged {
			hint := ""
			if errors.Is(err, syscall.EADDRINUSE) {
				hint = "; another NMI may use the port; --host-token=false disables the route"
			}
			s.logs.Main.Warn("cannot serve /host/token; NMI retries"+hint, zap.String(telemetry.KeyAddress, address), zap.Error(err))
		}
		select {
		case <-time.After(hostTokenRetryInterval):
		case <-ctx.Done():
			return
		}
	}
}

// serveHostTokens serves requests until ctx ends. Then it waits until the requests in flight have ended, at most for
// ShutdownTimeout, and returns nil. It returns an error if serving fails before ctx ends.
func (s *Server) serveHostTokens(ctx context.Context, l net.Listener) error {
	server := newHTTPServer(hostTokenHandler{s}, s.cfg.MaxAssignmentWait)
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.ShutdownTimeout)
		defer cancel()
		_ = server.Shutdown(ending) // requests that are still in flight end with the process
	})
	err := server.Serve(s.limited(l, newConnectionLimiter(), nil))
	if !stop() {
		<-ended
		return nil
	}
	return err
}
