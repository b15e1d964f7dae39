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

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
)

// Limits of the server. Pods are hostile until proven otherwise.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	// writeTimeout is longer than any request is held: for the caches, for the pod, and for a token.
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
	metrics       *metrics
	log           *zap.Logger
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
var exchanges = sync.Pool{New: func() any { return &exchange{fields: make([]zap.Field, 0, 16)} }}

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

// ServeHTTP answers one request and writes its line in the log.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := exchanges.Get().(*exchange)
	defer exchanges.Put(x)
	*x = exchange{ResponseWriter: w, id: requestID(), start: time.Now(), fields: x.fields[:0]}
	w.Header()["X-Ms-Request-Id"] = []string{x.id}
	s.metrics.inFlight.Inc()
	s.answer(x, r)
	s.metrics.inFlight.Dec()
	took := time.Since(x.start)
	s.metrics.request(x.req.Route, x.status, took)
	s.logLine(x, took)
}

func (s *server) answer(x *exchange, r *http.Request) {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		x.refuse(metadata.Unavailable(identity.PodUnknown, "The address of the caller is unreadable", time.Second))
		return
	}
	x.source = peer.Addr().Unmap()
	var refusal *metadata.Error
	if x.req, refusal = metadata.Parse(r, s.rules); refusal != nil {
		if x.req.Route == metadata.RouteToken {
			s.metrics.decision(refusal.Reason)
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

// answerToken is the way of a token request: who calls, what it may have, the token, the answer.
func (s *server) answerToken(x *exchange, r *http.Request) {
	answer, refusal := s.tokens.get(r.Context(), &x.caller, x.source, x.req)
	if r.Context().Err() != nil {
		// Nobody is left to answer.
		x.reason, x.status = identity.ClientGone, statusClientGone
		s.metrics.decision(x.reason)
		return
	}
	if refusal != nil {
		s.metrics.decision(refusal.Reason)
		x.refuse(refusal)
		return
	}
	x.reason = x.caller.reason
	s.metrics.decision(x.reason)
	answer.Write(x, time.Now())
}

// statusClientGone stands in log and metrics for a request whose client left; it is never sent.
const statusClientGone = 499

func (s *server) logLine(x *exchange, took time.Duration) {
	entry := s.log.Check(zap.InfoLevel, "request")
	if entry == nil {
		return
	}
	fields := append(x.fields, zap.String(keyRequest, x.id), zap.String(keyRoute, string(x.req.Route)), zap.Int(keyStatus, x.status),
		zap.String(keyReason, string(x.reason)), zap.Stringer(keySource, x.source))
	if x.detail != "" {
		fields = append(fields, zap.String(keyDetail, x.detail))
	}
	if x.pod != nil {
		fields = append(fields, zap.String(keyNamespace, x.pod.Namespace), zap.String(keyPod, x.pod.Name), zap.String(keyPodUID, string(x.pod.UID)))
	}
	if x.identity != nil {
		fields = append(fields, zap.String(keyIdentity, x.identity.Key()), zap.String(keyClientID, shorten(x.identity.ClientID)))
	} else if asked := x.req.Selector.ClientID; asked != "" {
		fields = append(fields, zap.String(keyClientID, shorten(asked)))
	}
	if x.req.Resource != "" {
		fields = append(fields, zap.String(keyResource, clip(x.req.Resource)))
	}
	if x.origin != "" {
		fields = append(fields, zap.String(keyCache, string(x.origin)))
	}
	x.fields = append(fields, zap.Float64(keyDurationMS, float64(took.Microseconds())/1000))
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

// newHTTPServer puts the limits around a handler.
func newHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		// What the server says here is about broken connections, and pods can cause any number of those.
		ErrorLog: log.New(io.Discard, "", 0),
	}
}
