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

// hostTokenHandler answers /host/token: programs of the node that ask for a token on behalf of one of its pods. The Secrets
// Store CSI driver's Azure provider does, to mount a pod's secrets before it starts.
//
// Who may ask is who can connect to the node's loopback: the node itself and pods in its network. Such a caller may name
// any pod of the node, as it could with the predecessor; --host-token=false takes that away from nodes that do not need
// it. The same decision is made as for the pod itself.
type hostTokenHandler struct{ *Server }

// ServeHTTP answers one request of a program of the node.
func (s hostTokenHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.serve(w, r, s.handle) }

func (s hostTokenHandler) handle(c *requestContext, r *http.Request) {
	if !c.readSource(r) {
		return
	}
	var refusal *metadata.Error
	c.req, refusal = metadata.ParseHostToken(r)
	if refusal == nil && !c.source.IsLoopback() {
		refusal = metadata.Forbidden(identity.RouteBlocked, "Tokens on behalf of pods are given to programs of this node only")
	}
	if refusal != nil {
		s.metrics.CountDecision(refusal.Reason)
		c.refuse(refusal)
		return
	}
	tokens, refusal := s.requests.ForPodName(r.Context(), &c.Caller, c.source, c.req)
	if s.finishTokenRequest(c, r, refusal) {
		tokens[0].WriteHostToken(c, time.Now())
	}
}

// hostTokenRetryInterval is how often a port that somebody else has is tried again. That may be the predecessor, while one
// takes the other's place.
const hostTokenRetryInterval = 5 * time.Second

// ServeHostTokens listens on loopback until ctx ends. A port that is taken is no reason not to serve pods.
func (s *Server) ServeHostTokens(ctx context.Context) {
	address := fmt.Sprintf("127.0.0.1:%d", s.cfg.Listen.Port())
	for logged := false; ; logged = true {
		l, err := net.Listen("tcp4", address)
		if err == nil {
			s.logs.Main.Info("programs of this node may ask for tokens of its pods", zap.String(telemetry.KeyAddress, address))
			server := newHTTPServer(hostTokenHandler{s}, s.cfg.MaxAssignmentWait)
			ended := make(chan struct{})
			stop := context.AfterFunc(ctx, func() {
				defer close(ended)
				ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.ShutdownTimeout)
				defer cancel()
				_ = server.Shutdown(ending) // what is still under way then is cut off
			})
			err = server.Serve(newLimitedListener(l, s.metrics.RefusedConnections))
			if !stop() {
				<-ended
				return
			}
		}
		if !logged {
			hint := ""
			if errors.Is(err, syscall.EADDRINUSE) {
				hint = "; another NMI may have it. It is tried again; --host-token=false does without"
			}
			s.logs.Main.Warn("/host/token is not served"+hint, zap.String(telemetry.KeyAddress, address), zap.Error(err))
		}
		select {
		case <-time.After(hostTokenRetryInterval):
		case <-ctx.Done():
			return
		}
	}
}
