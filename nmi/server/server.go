package server

import (
	"encoding/hex"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/podidentity/podidentity/internal/text"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// Config says what is served, and where.
type Config struct {
	Listen         netip.AddrPort // where pods' requests arrive; host tokens are served at its port on loopback
	ProbePort      int            // on loopback
	PrometheusPort int            // on all addresses
	Profile        bool           // pprof, on loopback

	IMDS           netip.AddrPort // of the machine
	HeaderOptional bool           // serve requests without a Metadata header
	TenantID       string         // that /metadata/identity/info tells; empty: what the machine's service says
	BlockInstance  bool           // refuse descriptions of the machine

	MaxAssignmentWait time.Duration // how long a request may wait for an assignment
	ShutdownTimeout   time.Duration // how long requests under way have to end
}

// Server answers pods. See the package comment for the way of a request.
type Server struct {
	cfg      Config
	pods     *http.Server // once started
	requests *request.Processor
	upstream *metadata.Upstream
	metrics  *telemetry.Metrics
	logs     telemetry.Loggers
	// refused is told of each pod that gets no token.
	onRefused func(*corev1.Pod, *metadata.Error)
}

// New returns a server that gives out tokens. refused is told of each pod that gets none; it may be nil.
func New(cfg Config, requests *request.Processor, metrics *telemetry.Metrics, logs telemetry.Loggers, onRefused func(*corev1.Pod, *metadata.Error)) *Server {
	return &Server{cfg: cfg, requests: requests, upstream: metadata.NewUpstream(cfg.IMDS), metrics: metrics, logs: logs, onRefused: onRefused}
}

// requestContext is one request and what became of it, for the log.
type requestContext struct {
	http.ResponseWriter
	id             string
	start          time.Time
	source         netip.Addr
	req            metadata.Request
	status         int
	request.Caller // filled in by the token route
	reason         identity.Reason
	detail         string
	fields         []zap.Field // of the log line
}

// Exchanges are used again: they are the largest thing that a cached token costs.
var requestContexts = sync.Pool{New: func() any { return &requestContext{fields: make([]zap.Field, 0, 20)} }}

// WriteHeader remembers the status.
func (c *requestContext) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

// Unwrap lets the reverse proxy flush.
func (c *requestContext) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *requestContext) refuse(e *metadata.Error) {
	c.reason, c.detail = e.Reason, e.Detail
	if c.detail == "" {
		c.detail = e.Description
	}
	e.Write(c)
}

// ServeHTTP answers one request of a pod.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.serve(w, r, s.handle) }

// serve answers one request, counts it and writes its line in the log.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, answer func(*requestContext, *http.Request)) {
	c := requestContexts.Get().(*requestContext)
	defer requestContexts.Put(c)
	*c = requestContext{ResponseWriter: w, id: requestID(), start: time.Now(), fields: c.fields[:0]}
	w.Header()["X-Ms-Request-Id"] = []string{c.id}
	s.metrics.InFlight.Inc()
	answer(c, r)
	s.metrics.InFlight.Dec()
	took := time.Since(c.start)
	s.metrics.ObserveRequest(c.req.Route, c.status, took)
	s.logLine(c, took)
}

func (s *Server) handle(c *requestContext, r *http.Request) {
	if !c.readSource(r) {
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
	case c.req.Route == metadata.RouteInstance && s.cfg.BlockInstance:
		c.refuse(metadata.Forbidden(identity.RouteBlocked, "Descriptions of the machine are not given to pods on this cluster"))
	default:
		c.reason = identity.Forwarding
		if refusal := s.upstream.Forward(c, r, c.req); refusal != nil {
			c.refuse(refusal)
		}
	}
}

// readSource notes where the request comes from, or refuses it.
func (c *requestContext) readSource(r *http.Request) bool {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		c.refuse(metadata.Unavailable(identity.PodUnknown, "The address of the caller is unreadable", time.Second))
		return false
	}
	c.source = peer.Addr().Unmap()
	return true
}

// handleToken is the way of a token request: who calls, what it may have, the token, the answer.
func (s *Server) handleToken(c *requestContext, r *http.Request) {
	tokens, refusal := s.requests.ForAddress(r.Context(), &c.Caller, c.source, c.req)
	if !s.finishTokenRequest(c, r, refusal) {
		return
	}
	if len(tokens) > 1 {
		metadata.WriteTokens(c, tokens, time.Now())
		return
	}
	tokens[0].Write(c, time.Now())
}

// finishTokenRequest notes how a request for a token ended, and answers it unless there is a token to answer with.
func (s *Server) finishTokenRequest(c *requestContext, r *http.Request, refusal *metadata.Error) bool {
	if r.Context().Err() != nil {
		// Nobody is left to answer.
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
	c.reason = c.Caller.Reason
	s.metrics.CountDecision(c.reason)
	return true
}

// statusClientGone stands in log and metrics for a request whose client left; it is never sent.
const statusClientGone = 499

// logLine writes the one line of a request. Where a token was asked for it is the audit's, if that is on.
func (s *Server) logLine(c *requestContext, took time.Duration) {
	var entry *zapcore.CheckedEntry
	if c.req.Route == metadata.RouteToken || c.req.Route == metadata.RouteHostToken {
		if c.status == http.StatusOK {
			entry = s.logs.Audit.Check(zap.InfoLevel, "token issued")
		} else {
			entry = s.logs.Audit.Check(zap.WarnLevel, "token refused")
		}
	}
	if entry == nil {
		entry = s.logs.Main.Check(zap.InfoLevel, "request")
	}
	if entry == nil {
		return
	}
	fields := append(c.fields, zap.String(telemetry.KeyRequestID, c.id), zap.String(telemetry.KeyRoute, string(c.req.Route)), zap.Int(telemetry.KeyStatus, c.status),
		zap.String(telemetry.KeyReason, string(c.reason)), zap.Stringer(telemetry.KeySource, c.source))
	if c.detail != "" {
		fields = append(fields, zap.String(telemetry.KeyDetail, c.detail))
	}
	if c.Pod != nil {
		fields = append(fields, zap.String(telemetry.KeyNamespace, c.Pod.Namespace), zap.String(telemetry.KeyPod, c.Pod.Name), zap.String(telemetry.KeyPodUID, string(c.Pod.UID)),
			zap.String(telemetry.KeyAccount, credentials.ServiceAccountOf(c.Pod).Name))
	}
	if c.Identity != nil {
		fields = append(fields, zap.String(telemetry.KeyIdentity, c.Identity.Key()), zap.String(telemetry.KeyClientID, abbreviate(c.Identity.ClientID)))
	} else if asked := c.req.Selector.ClientID; asked != "" {
		fields = append(fields, zap.String(telemetry.KeyClientID, abbreviate(asked)))
	}
	if c.req.Resource != "" {
		fields = append(fields, zap.String(telemetry.KeyResource, truncate(c.req.Resource)))
	}
	if c.Origin != "" {
		fields = append(fields, zap.String(telemetry.KeyCache, string(c.Origin)))
	}
	if c.TokenID != "" {
		fields = append(fields, zap.String(telemetry.KeyTokenID, c.TokenID))
	}
	if c.CorrelationID != "" {
		fields = append(fields, zap.String(telemetry.KeyCorrelationID, truncate(c.CorrelationID)))
	}
	c.fields = append(fields, zap.Float64(telemetry.KeyDuration, float64(took.Microseconds())/1000))
	entry.Write(c.fields...)
}

// requestID makes an ID to find a request by. It guards nothing, so it need not be hard to guess.
func requestID() string {
	var raw [8]byte
	n := rand.Uint64()
	for i := range raw {
		raw[i] = byte(n >> (8 * i))
	}
	return hex.EncodeToString(raw[:])
}

// abbreviate keeps enough of an ID to recognise it and not enough to use it. It bounds the length of a client's text, too.
func abbreviate(id string) string {
	if len(id) <= 8 {
		return id
	}
	return id[:4] + "…" + id[len(id)-4:]
}

// truncate bounds a client's text in a log line; the encoder escapes it.
func truncate(s string) string { return text.Truncate(s, 256) }
