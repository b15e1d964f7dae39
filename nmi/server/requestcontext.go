package server

import (
	"encoding/hex"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/request"
)

// statusClientGone is the status, in log and metrics, of a token request whose client closed the connection. NMI never
// sends it.
const statusClientGone = 499

// requestContext is one request and its result, for logging. It is also the ResponseWriter of the request.
type requestContext struct {
	http.ResponseWriter
	id             string
	start          time.Time
	caller         request.Caller
	req            metadata.Request
	request.Record // is filled by a token request
	status         int
	reason         identity.Reason
	detail         string
	fields         []zap.Field // of the log line
}

// requestContexts are pooled: they are the largest allocation of a cached token request.
var requestContexts = sync.Pool{New: func() any { return &requestContext{fields: make([]zap.Field, 0, 20)} }}

func newRequestContext(w http.ResponseWriter) *requestContext {
	c := requestContexts.Get().(*requestContext)
	*c = requestContext{ResponseWriter: w, id: requestID(), start: time.Now(), fields: c.fields[:0]}
	w.Header()["X-Ms-Request-Id"] = []string{c.id}
	return c
}

// free returns the context to the pool. The caller must not use it afterwards.
func (c *requestContext) free() { requestContexts.Put(c) }

// WriteHeader records the status.
func (c *requestContext) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

// Unwrap lets the reverse proxy flush.
func (c *requestContext) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// refuse writes an error response.
func (c *requestContext) refuse(e *metadata.Error) {
	c.reason, c.detail = e.Reason, e.Detail
	if c.detail == "" {
		c.detail = e.Description
	}
	e.Write(c)
}

// readCaller records who opened the connection. It refuses the request and returns false if the address of the client is
// not valid.
func (c *requestContext) readCaller(r *http.Request) bool {
	if caller, ok := r.Context().Value(callerKey{}).(request.Caller); ok {
		c.caller = caller
		return true
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		c.refuse(metadata.Unavailable(identity.PodUnknown, "The address of the caller is not valid: "+err.Error(), time.Second))
		return false
	}
	c.caller = request.Caller{Address: peer.Addr().Unmap()}
	return true
}

// requestID returns a new ID for the log line and the response of a request. It protects nothing, so it may be
// predictable.
func requestID() string {
	var raw [8]byte
	n := rand.Uint64()
	for i := range raw {
		raw[i] = byte(n >> (8 * i))
	}
	return hex.EncodeToString(raw[:])
}
