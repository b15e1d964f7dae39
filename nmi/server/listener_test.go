package server

import (
	"errors"
	"net"
	"net/http"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/podidentity/podidentity/nmi/limit"
	"github.com/podidentity/podidentity/nmi/request"
)

func TestOneSourceCannotTakeAllConnections(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := prometheus.NewCounter(prometheus.CounterOpts{Name: "x"})
	l := &limitedListener{Listener: inner, limiter: newConnectionLimiter(), refused: refused}
	defer l.Close()
	accepted := make(chan net.Conn, 2*limit.MaxConnectionsPerSource)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	var first net.Conn
	for i := range limit.MaxConnectionsPerSource {
		dial("127.0.0.2")
		if c := <-accepted; i == 0 {
			first = c
		}
	}
	over := dial("127.0.0.2")
	if _, err := over.Read(make([]byte, 1)); err == nil || testutil.ToFloat64(refused) != 1 {
		t.Errorf("reading from the connection beyond the limit: %v, with %v counted as refused; want an error and 1", err, testutil.ToFloat64(refused))
	}
	dial("127.0.0.3")
	<-accepted
	first.Close()
	first.Close() // must not reduce the counts a second time
	dial("127.0.0.2")
	<-accepted
	over = dial("127.0.0.2")
	if _, err := over.Read(make([]byte, 1)); err == nil {
		t.Error("a connection that was closed twice reduced the counts twice")
	}
}

// All connections of this listener come from one address, as those of pods in the host network do.
func TestConnectionsAreCountedByPodAndClosedIfNobodyIsKnownToHaveOpenedThem(t *testing.T) {
	inner := newPipeListener("10.0.0.1:40000")
	var next request.Caller
	var unknown error
	refused, unidentified := prometheus.NewCounter(prometheus.CounterOpts{Name: "x"}), prometheus.NewCounter(prometheus.CounterOpts{Name: "y"})
	l := &limitedListener{
		Listener: inner, limiter: newConnectionLimiter(), refused: refused, unidentified: unidentified,
		identify: func(net.Conn) (request.Caller, error) { return next, unknown },
	}
	callers := make(chan request.Caller)
	server := &http.Server{ConnContext: withCaller, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		callers <- r.Context().Value(callerKey{}).(request.Caller)
	})}
	go server.Serve(l)
	defer server.Close()
	// ask sends a request and returns its caller, or false if the connection is closed.
	ask := func() (request.Caller, bool) {
		conn, err := inner.dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := conn.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
			return request.Caller{}, false
		}
		return <-callers, true
	}
	for range limit.MaxConnectionsPerSource {
		next = request.Caller{PodUID: "a", ContainerID: "c"}
		if got, ok := ask(); !ok || got != next {
			t.Fatalf("got %+v, %t; want %+v", got, ok, next)
		}
	}
	if _, ok := ask(); ok || testutil.ToFloat64(refused) != 1 {
		t.Error("a connection of a pod beyond the limit stays open")
	}
	next = request.Caller{PodUID: "b"}
	if got, ok := ask(); !ok || got != next {
		t.Errorf("another pod: %+v, %t", got, ok)
	}
	unknown = errors.New("no record")
	if _, ok := ask(); ok || testutil.ToFloat64(unidentified) != 1 {
		t.Error("a connection that nobody is known to have opened stays open")
	}
}
