package nmi

import (
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestAConfigurationThatCannotWorkIsRefusedWithASentence(t *testing.T) {
	cases := []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no node", func(c *Config) { c.Node = "" }, "--node"},
		{"a wait without end", func(c *Config) { c.AssignmentWait = time.Hour }, "--assignment-wait 1h"},
		{"an unknown mode", func(c *Config) { c.OperationMode = "x" }, `"x"`},
		{"loopback", func(c *Config) { c.ListenAddress = "127.0.0.1" }, "link-local"},
		{"the metadata address itself", func(c *Config) { c.ListenAddress = c.MetadataIP }, "address of its own"},
		{"no address", func(c *Config) { c.MetadataIP = "imds" }, "--metadata-ip"},
		{"a back end that is none", func(c *Config) { c.Backend = "ebtables" }, "--iptables-backend"},
		{"port 0", func(c *Config) { c.ListenPort = 0 }, "--nmi-port 0"},
		{"port 70000", func(c *Config) { c.MetadataPort = 70000 }, "--metadata-port 70000"},
		{"one port for two", func(c *Config) { c.ProbePort = c.PrometheusPort }, "must differ"},
		{"too often", func(c *Config) { c.SyncInterval = time.Millisecond }, "--iptables-sync-interval 1ms"},
		{"too long", func(c *Config) { c.PodLookup = time.Hour }, "--pod-lookup-timeout"},
		{"no time to stop", func(c *Config) { c.Shutdown = 0 }, "--shutdown-timeout"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			config := DefaultConfig()
			config.Node = "n"
			if err := config.Validate(); err != nil {
				t.Fatal(err)
			}
			c.change(&config)
			if err := config.Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v; want something about %q", err, c.want)
			}
		})
	}
}

func TestKubenetIsRefusedUnlessAllowed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kubelet")
	config := Config{KubeletConfig: file}
	if err := config.checkKubenet(); err != nil {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(file, []byte("KUBELET_FLAGS=--network-plugin=kubenet --x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := config.checkKubenet(); err == nil || !strings.Contains(err.Error(), "--allow-network-plugin-kubenet") {
		t.Errorf("got %v", err)
	}
	config.AllowKubenet = true
	if err := config.checkKubenet(); err != nil {
		t.Errorf("allowed: %v", err)
	}
}

func TestOneSourceCannotTakeAllConnections(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := prometheus.NewCounter(prometheus.CounterOpts{Name: "x"})
	l := newFairListener(inner, refused)
	defer l.Close()
	accepted := make(chan net.Conn, 2*maxConnectionsPerSource)
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
	for i := range maxConnectionsPerSource {
		dial("127.0.0.2")
		if c := <-accepted; i == 0 {
			first = c
		}
	}
	over := dial("127.0.0.2")
	if _, err := over.Read(make([]byte, 1)); err == nil || testutil.ToFloat64(refused) != 1 {
		t.Errorf("one more stays open: %v, %v refused", err, testutil.ToFloat64(refused))
	}
	dial("127.0.0.3")
	<-accepted
	first.Close()
	first.Close() // gives one place back, not two
	dial("127.0.0.2")
	<-accepted
	over = dial("127.0.0.2")
	if _, err := over.Read(make([]byte, 1)); err == nil {
		t.Error("a connection closed twice gave two places back")
	}
}

func TestReadinessNamesWhatIsMissing(t *testing.T) {
	h := newHealth()
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		h.handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "listener") || !strings.Contains(body, "caches") {
		t.Errorf("at first: %d %s", code, body)
	}
	for _, what := range []string{needListener, needRules, needCaches} {
		h.set(what, nil)
	}
	h.set(needCRDs, errors.New("the cluster does not have azureidentities"))
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "azureidentities") || strings.Contains(body, "listener") {
		t.Errorf("without CRDs: %d %s", code, body)
	}
	h.set(needCRDs, nil)
	if code, _ := get("/readyz"); code != 200 {
		t.Errorf("with everything: %d", code)
	}
	h.shutDown()
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "shutting down") {
		t.Errorf("at the end: %d %s", code, body)
	}
	if code, _ := get("/healthz"); code != 200 {
		t.Errorf("alive at the end: %d", code)
	}
}
