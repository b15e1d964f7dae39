package server

import (
	"net"
	"net/http"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// Config has the settings of a Server.
type Config struct {
	Listen netip.AddrPort // for requests of pods; the same port on loopback is for programs of the node
	// Identified is for connections that IdentifyCaller identifies; all others are closed. The zero value means none.
	Identified     netip.AddrPort
	IdentifyCaller func(net.Conn) (request.Caller, error)
	ProbePort      int  // on loopback
	PrometheusPort int  // on all addresses
	Profile        bool // serve pprof on loopback

	IMDS                  netip.AddrPort
	HeaderOptional        bool   // accept requests without a Metadata header
	TenantID              string // for /metadata/identity/info; if empty, NMI forwards the request to IMDS
	BlockInstanceMetadata bool   // refuse /metadata/instance

	MaxAssignmentWait time.Duration // how long a request may wait for an assignment
	ShutdownTimeout   time.Duration // how long requests in flight have to end
}

// Server serves the requests of pods.
type Server struct {
	cfg       Config
	pods      *http.Server // nil before Start
	requests  *request.Processor
	upstream  *metadata.Upstream
	metrics   *telemetry.Metrics
	logs      telemetry.Loggers
	onRefused func(*corev1.Pod, *metadata.Error) // may be nil
}

// New returns a Server. If onRefused is not nil, the Server calls it for each token request of a known pod that gets an
// error response.
func New(cfg Config, requests *request.Processor, metrics *telemetry.Metrics, logs telemetry.Loggers, onRefused func(*corev1.Pod, *metadata.Error)) *Server {
	return &Server{cfg: cfg, requests: requests, upstream: metadata.NewUpstream(cfg.IMDS), metrics: metrics, logs: logs, onRefused: onRefused}
}

// ServeHTTP serves one request of a pod.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.serve(w, r, s.handle) }

func (s *Server) serve(w http.ResponseWriter, r *http.Request, handle func(*requestContext, *http.Request)) {
	c := newRequestContext(w)
	defer c.free()
	s.metrics.InFlight.Inc()
	handle(c, r)
	s.metrics.InFlight.Dec()
	took := time.Since(c.start)
	s.metrics.ObserveRequest(c.req.Route, c.status, took)
	s.logRequest(c, took)
}

func (s *Server) handle(c *requestContext, r *http.Request) {
	if !c.readCaller(r) {
		return
	}
	var refusal *metadata.Error
	if c.req, refusal = metadata.Parse(r, metadata.Rules{HeaderOptional: s.cfg.HeaderOptional}); refusal != nil {
		if c.req.Route == metadata.RouteToken {
			s.metrics.CountDecision(refusal.Reason)
		}
		c.refuse(refusal)
		return
	}
	switch {
	case c.req.Route == metadata.RouteToken:
		s.handleToken(c, r)
	case c.req.Route == metadata.RouteInfo && s.cfg.TenantID != "":
		c.reason = identity.Allowed
		metadata.WriteInfo(c, s.cfg.TenantID)
	case c.req.Route == metadata.RouteInstance && s.cfg.BlockInstanceMetadata:
		c.refuse(metadata.Forbidden(identity.RouteBlocked, "Instance metadata is blocked for pods (--block-instance-metadata of NMI, chart value nmi.blockInstanceMetadata)"))
	default:
		c.reason = identity.Forwarding
		if refusal := s.upstream.Forward(c, r, c.req); refusal != nil {
			c.refuse(refusal)
		}
	}
}

func (s *Server) handleToken(c *requestContext, r *http.Request) {
	tokens, refusal := s.requests.ForCaller(r.Context(), &c.Record, c.caller, c.req)
	if !s.finishTokenRequest(c, r, refusal) {
		return
	}
	if len(tokens) > 1 {
		metadata.WriteTokens(c, tokens, time.Now())
		return
	}
	tokens[0].Write(c, time.Now())
}

// finishTokenRequest counts the result of a token request. It writes the error response, if any, and reports whether
// the caller must write the tokens.
func (s *Server) finishTokenRequest(c *requestContext, r *http.Request, refusal *metadata.Error) bool {
	if r.Context().Err() != nil {
		// The client closed the connection, so nobody would receive a response.
		c.reason, c.status = identity.ClientGone, statusClientGone
		s.metrics.CountDecision(c.reason)
		return false
	}
	if refusal != nil {
		s.metrics.CountDecision(refusal.Reason)
		c.refuse(refusal)
		if c.Pod != nil && s.onRefused != nil {
			s.onRefused(c.Pod, refusal)
		}
		return false
	}
	c.reason = c.Reason
	s.metrics.CountDecision(c.reason)
	return true
}
