package nmi

import (
	"encoding/hex"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// Limits of the server. Pods are hostile until proven otherwise.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	// writeTimeout is longer than any request is held: for the caches, for the pod, and for a token. The time that one
	// may wait for an assignment comes on top.
	writeTimeout = 75 * time.Second
	// Clients ask once in hours; a connection kept for the next time would only take memory.
	idleTimeout    = 20 * time.Second
	maxHeaderBytes = 16 << 10
)

// server answers pods. See the package comment for the way of a request.
type server struct {
	rules    metadata.Rules
	tokens   *tokens
	upstream *metadata.Upstream
	tenantID string
	// blockInstance refuses descriptions of the machine.
	blockInstance bool
	metrics       *telemetry.Metrics
	logs          telemetry.Loggers
	// refused is told of each pod that gets no token.
	refused func(*corev1.Pod, *metadata.Error)
}

// exchange is one request and what became of it, for the log.
type exchange struct {
	http.ResponseWriter
	id     string
	start  time.Time
	source netip.Addr
	req    metadata.Request
	status int
	caller // filled in by the token route
	reason identity.Reason
	detail string
	fields []zap.Field // of the log line
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
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.serve(w, r, s.answer) }

// serve answers one request, counts it and writes its line in the log.
func (s *server) serve(w http.ResponseWriter, r *http.Request, answer func(*exchange, *http.Request)) {
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

func (s *server) answer(x *exchange, r *http.Request) {
	if !x.readSource(r) {
		return
	}
	var refusal *metadata.Error
	if x.req, refusal = metadata.Parse(r, s.rules); refusal != nil {
		if x.req.Route == metadata.RouteToken {
			s.metrics.Decision(refusal.Reason)
		}
		x.refuse(refusal)
		return
	}
	switch {
	case x.req.Route == metadata.RouteToken:
		s.answerToken(x, r)
	case x.req.Route == metadata.RouteInfo && s.tenantID != "":
		x.reason = identity.Allowed
		metadata.WriteInfo(x, s.tenantID)
	case x.req.Route == metadata.RouteInstance && s.blockInstance:
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
func (s *server) answerToken(x *exchange, r *http.Request) {
	tokens, refusal := s.tokens.get(r.Context(), &x.caller, x.source, x.req)
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
func (s *server) concluded(x *exchange, r *http.Request, refusal *metadata.Error) bool {
	if r.Context().Err() != nil {
		// Nobody is left to answer.
		x.reason, x.status = identity.ClientGone, statusClientGone
		s.metrics.Decision(x.reason)
		return false
	}
	if refusal != nil {
		s.metrics.Decision(refusal.Reason)
		x.refuse(refusal)
		if x.pod != nil && s.refused != nil {
			s.refused(x.pod, refusal)
		}
		return false
	}
	x.reason = x.caller.reason
	s.metrics.Decision(x.reason)
	return true
}

// statusClientGone stands in log and metrics for a request whose client left; it is never sent.
const statusClientGone = 499

// logLine writes the one line of a request. Where a token was asked for it is the audit's, if that is on.
func (s *server) logLine(x *exchange, took time.Duration) {
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
	if x.pod != nil {
		fields = append(fields, zap.String(telemetry.KeyNamespace, x.pod.Namespace), zap.String(telemetry.KeyPod, x.pod.Name), zap.String(telemetry.KeyPodUID, string(x.pod.UID)),
			zap.String(telemetry.KeyAccount, serviceAccountOf(x.pod).Name))
	}
	if x.identity != nil {
		fields = append(fields, zap.String(telemetry.KeyIdentity, x.identity.Key()), zap.String(telemetry.KeyClientID, telemetry.Shorten(x.identity.ClientID)))
	} else if asked := x.req.Selector.ClientID; asked != "" {
		fields = append(fields, zap.String(telemetry.KeyClientID, telemetry.Shorten(asked)))
	}
	if x.req.Resource != "" {
		fields = append(fields, zap.String(telemetry.KeyResource, telemetry.Clip(x.req.Resource)))
	}
	if x.origin != "" {
		fields = append(fields, zap.String(telemetry.KeyCache, string(x.origin)))
	}
	if x.tokenID != "" {
		fields = append(fields, zap.String(telemetry.KeyTokenID, x.tokenID))
	}
	if x.correlationID != "" {
		fields = append(fields, zap.String(telemetry.KeyEntra, telemetry.Clip(x.correlationID)))
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

// newHTTPServer puts the limits around a handler whose requests may be held for so long.
func newHTTPServer(h http.Handler, held time.Duration) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout + held,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		// What the server says here is about broken connections, and pods can cause any number of those.
		ErrorLog: log.New(io.Discard, "", 0),
	}
}
