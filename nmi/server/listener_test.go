package server

import (
	"net"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/podidentity/podidentity/nmi/limit"
)

func TestOneSourceCannotTakeAllConnections(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := prometheus.NewCounter(prometheus.CounterOpts{Name: "x"})
	l := newLimitedListener(inner, refused)
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
