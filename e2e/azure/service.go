package azure

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"
)

const (
	serviceIMDS  = "imds"
	serviceEntra = "entra"
	serviceARM   = "arm"
)

// services are the services that share the code for faults and counts. ARM has its
// own code for both.
var services = []string{serviceIMDS, serviceEntra}

// classToken is the class of token requests, to IMDS and to Entra ID.
const classToken = "token"

const maxBodyBytes = 1 << 20

// service is the common part of the fake IMDS and the fake Entra ID: it determines the
// caller of each request, applies the faults and writes the log. The two differ in the
// function fields from classify on.
type service struct {
	name     string
	dir      *directory
	switches *switches
	rec      *recorder
	now      func() time.Time

	classify func(*http.Request) string
	admit    func(node, class string, enforce bool) (release func(), ok bool)
	annotate func(*requestContext) // adds the request's contents to the log entry
	answer   func(*requestContext) response
	fail     func(x *requestContext, status int) response // an error in the service's own format
}

// requestContext is a request in progress.
type requestContext struct {
	*http.Request
	caller caller
	class  string
	body   []byte
	faults faults
	entry  *Entry
	trace  trace // Entra ID only
}

// response is a complete response. Status 0 means no response: writeResponse resets
// the connection.
type response struct {
	status      int
	contentType string
	header      map[string]string
	body        []byte
}

func jsonResponse(status int, v any) response {
	return response{status: status, contentType: "application/json; charset=utf-8", body: encode(v)}
}

func textResponse(status int, text string) response {
	return response{status: status, contentType: "text/plain; charset=utf-8", body: []byte(text)}
}

func (s *service) callerOf(remote string) caller {
	addr, err := netip.ParseAddrPort(remote)
	if err != nil {
		return caller{}
	}
	return s.dir.callerOf(addr.Addr())
}

// connState counts connections. It is the server's ConnState hook.
func (s *service) connState(conn net.Conn, state http.ConnState) {
	if state == http.StateNew {
		s.rec.connection(s.name, s.callerOf(conn.RemoteAddr().String()))
	}
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := s.now()
	x := &requestContext{Request: r, caller: s.callerOf(r.RemoteAddr), class: s.classify(r)}
	x.faults = s.switches.consume(s.name, x.class == classToken)
	x.entry = &Entry{
		Time: start, Kind: KindRequest, Service: s.name, Class: x.class,
		Node: x.caller.node, Source: x.caller.source.String(), FromPod: x.caller.fromPod,
		Method: r.Method, Path: truncate(r.RequestURI), Headers: headersOf(r),
	}
	// admit precedes begin: when a test sees in the counts that a request is in flight, the
	// request must already count against the limits.
	release, admitted := s.admit(x.caller.node, x.class, x.faults.limits)
	defer s.rec.begin(s.name, x.class, x.caller)()
	defer release()
	out := s.handle(x, w, r, admitted)
	x.entry.Status = out.status
	x.entry.DurationMS = float64(s.now().Sub(start).Microseconds()) / 1000
	s.rec.finish(*x.entry)
	writeResponse(w, out)
}

// handle returns the response to a request, and completes its log entry except for the
// status and the duration. admitted is false if the request exceeds a limit. handle reads
// the body first: only after the end of the body does net/http detect that the client
// disconnects, which ends a request that hangs.
func (s *service) handle(x *requestContext, w http.ResponseWriter, r *http.Request, admitted bool) response {
	var err error
	x.body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	s.annotate(x)
	if err != nil {
		x.entry.Error = "reading the body: " + err.Error()
		return s.fail(x, http.StatusRequestEntityTooLarge)
	}
	switch {
	case x.faults.drop:
		x.entry.Error = "dropped"
		return response{}
	case x.faults.hang:
		<-r.Context().Done()
		x.entry.Error = "hung until the client disconnected"
		return response{}
	case !sleep(r.Context(), x.faults.latency):
		x.entry.Error = "the client disconnected during the added latency"
		return response{}
	case x.faults.status != 0:
		x.entry.Error = "error status set by the switch throttle or the switch status"
		return s.forcedResponse(x, x.faults.status)
	case !admitted:
		x.entry.Error = "over the rate or concurrency limits of IMDS (switch imds.limits)"
		return s.forcedResponse(x, http.StatusTooManyRequests)
	}
	return s.answer(x)
}

// forcedResponse returns the error response that a switch or a limit causes.
func (s *service) forcedResponse(x *requestContext, status int) response {
	out := s.fail(x, status)
	if x.faults.plainErrors {
		out = textResponse(status, http.StatusText(status)+"\r\n")
	}
	if x.faults.retryAfter > 0 {
		if out.header == nil {
			out.header = map[string]string{}
		}
		out.header["Retry-After"] = strconv.Itoa(x.faults.retryAfter)
	}
	return out
}

// sleep waits for d. It returns false if the context ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func writeResponse(w http.ResponseWriter, out response) {
	if out.status == 0 {
		resetConnection(w)
		return
	}
	for name, value := range out.header {
		w.Header().Set(name, value)
	}
	w.Header().Set("Content-Type", out.contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(out.body)))
	w.WriteHeader(out.status)
	_, _ = w.Write(out.body) // ignore clients that have disconnected
}

// resetConnection resets the TCP connection, so that the client receives neither
// a response nor a regular end. An HTTP/2 connection cannot be hijacked: there,
// resetConnection aborts the handler, which resets only the stream of the request.
func resetConnection(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	raw := conn
	if t, ok := conn.(*tls.Conn); ok {
		raw = t.NetConn()
	}
	if t, ok := raw.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = raw.Close()
}
