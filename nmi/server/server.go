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

	Held     time.Duration // how long a request may wait for an assignment
	Shutdown time.Duration // how long requests under way have to end
}

// Server answers pods. See the package comment for the way of a request.
type Server struct {
	cfg      Config
	pods     *http.Server // once started
	tokens   *request.Tokens
	upstream *metadata.Upstream
	metrics  *telemetry.Metrics
	logs     telemetry.Loggers
	// refused is told of each pod that gets no token.
	refused func(*corev1.Pod, *metadata.Error)
}

// New returns a server that gives out tokens. refused is told of each pod that gets none; it may be nil.
func New(cfg Config, tokens *request.Tokens, metrics *telemetry.Metrics, logs telemetry.Loggers, refused func(*corev1.Pod, *metadata.Error)) *Server {
	return &Server{cfg: cfg, tokens: tokens, upstream: metadata.NewUpstream(cfg.IMDS), metrics: metrics, logs: logs, refused: refused}
}

// exchange is one request and what became of it, for the log.
type exchange struct {
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
var exchanges = sync.Pool{New: func() any { return &exchange{fields: make([]zap.Field, 0, 20)} }}

// WriteHeader remembers the status.
func (x *exchange) WriteHeader(status int) {
	x.status = status
	x.ResponseWriter.WriteHeader(status)
}

// Unwrap lets the reverse proxy flush.
func (x *exchange) Unwrap() http.ResponseWriter { return x.ResponseWriter }

func (x *exchange) refuse(e *metadata.Error) {
	x.reason, x.detail = e.Reason, e.Detail
	if x.detail == "" {
		x.detail = e.Description
	}
	e.Write(x)
}

// ServeHTTP answers one request of a pod.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.serve(w, r, s.answer) }

// serve answers one request, counts it and writes its line in the log.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, answer func(*exchange, *http.Request)) {
	x := exchanges.Get().(*exchange)
	defer exchanges.Put(x)
	*x = exchange{ResponseWriter: w, id: requestID(), start: time.Now(), fields: x.fields[:0]}
	w.Header()["X-Ms-Request-Id"] = []string{x.id}
	s.metrics.InFlight.Inc()
	answer(x, r)
	s.metrics.InFlight.Dec()
	took := time.Since(x.start)
	s.metrics.Request(x.req.Route, x.status, took)
	s.logLine(x, took)
}

func (s *Server) answer(x *exchange, r *http.Request) {
	if !x.readSource(r) {
		return
	}
	var refusal *metadata.Error
	if x.req, refusal = metadata.Parse(r, metadata.Rules{HeaderOptional: s.cfg.HeaderOptional}); refusal != nil {
		if x.req.Route == metadata.RouteToken {
			s.metrics.Decision(refusal.Reason)
		}
		x.refuse(refusal)
		return
	}
	switch {
	case x.req.Route == metadata.RouteToken:
		s.answerToken(x, r)
	case x.req.Route == metadata.RouteInfo && s.cfg.TenantID != "":
		x.reason = identity.Allowed
		metadata.WriteInfo(x, s.cfg.TenantID)
	case x.req.Route == metadata.RouteInstance && s.cfg.BlockInstance:
		x.refuse(metadata.Forbidden(identity.RouteBlocked, "Descriptions of the machine are not given to pods on this cluster"))
	default:
		x.reason = identity.Forwarding
		if refusal := s.upstream.Pass(x, r, x.req); refusal != nil {
			x.refuse(refusal)
		}
	}
}

// readSource notes where the request comes from, or refuses it.
func (x *exchange) readSource(r *http.Request) bool {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		x.refuse(metadata.Unavailable(identity.PodUnknown, "The address of the caller is unreadable", time.Second))
		return false
	}
	x.source = peer.Addr().Unmap()
	return true
}

// answerToken is the way of a token request: who calls, what it may have, the token, the answer.
func (s *Server) answerToken(x *exchange, r *http.Request) {
	tokens, refusal := s.tokens.ForAddress(r.Context(), &x.Caller, x.source, x.req)
	if !s.concluded(x, r, refusal) {
		return
	}
	if len(tokens) > 1 {
		metadata.WriteTokens(x, tokens, time.Now())
		return
	}
	tokens[0].Write(x, time.Now())
}

// concluded notes how a request for a token ended, and answers it unless there is a token to answer with.
func (s *Server) concluded(x *exchange, r *http.Request, refusal *metadata.Error) bool {
	if r.Context().Err() != nil {
		// Nobody is left to answer.
		x.reason, x.status = identity.ClientGone, statusClientGone
		s.metrics.Decision(x.reason)
		return false
	}
	if refusal != nil {
		s.metrics.Decision(refusal.Reason)
		x.refuse(refusal)
		if x.Pod != nil && s.refused != nil {
			s.refused(x.Pod, refusal)
		}
		return false
	}
	x.reason = x.Caller.Reason
	s.metrics.Decision(x.reason)
	return true
}

// statusClientGone stands in log and metrics for a request whose client left; it is never sent.
const statusClientGone = 499

// logLine writes the one line of a request. Where a token was asked for it is the audit's, if that is on.
func (s *Server) logLine(x *exchange, took time.Duration) {
	var entry *zapcore.CheckedEntry
	if x.req.Route == metadata.RouteToken || x.req.Route == metadata.RouteHostToken {
		if x.status == http.StatusOK {
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
	fields := append(x.fields, zap.String(telemetry.KeyRequest, x.id), zap.String(telemetry.KeyRoute, string(x.req.Route)), zap.Int(telemetry.KeyStatus, x.status),
		zap.String(telemetry.KeyReason, string(x.reason)), zap.Stringer(telemetry.KeySource, x.source))
	if x.detail != "" {
		fields = append(fields, zap.String(telemetry.KeyDetail, x.detail))
	}
	if x.Pod != nil {
		fields = append(fields, zap.String(telemetry.KeyNamespace, x.Pod.Namespace), zap.String(telemetry.KeyPod, x.Pod.Name), zap.String(telemetry.KeyPodUID, string(x.Pod.UID)),
			zap.String(telemetry.KeyAccount, credentials.ServiceAccountOf(x.Pod).Name))
	}
	if x.Identity != nil {
		fields = append(fields, zap.String(telemetry.KeyIdentity, x.Identity.Key()), zap.String(telemetry.KeyClientID, abbreviate(x.Identity.ClientID)))
	} else if asked := x.req.Selector.ClientID; asked != "" {
		fields = append(fields, zap.String(telemetry.KeyClientID, abbreviate(asked)))
	}
	if x.req.Resource != "" {
		fields = append(fields, zap.String(telemetry.KeyResource, truncate(x.req.Resource)))
	}
	if x.Origin != "" {
		fields = append(fields, zap.String(telemetry.KeyCache, string(x.Origin)))
	}
	if x.TokenID != "" {
		fields = append(fields, zap.String(telemetry.KeyTokenID, x.TokenID))
	}
	if x.CorrelationID != "" {
		fields = append(fields, zap.String(telemetry.KeyEntra, truncate(x.CorrelationID)))
	}
	x.fields = append(fields, zap.Float64(telemetry.KeyDurationMS, float64(took.Microseconds())/1000))
	entry.Write(x.fields...)
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
