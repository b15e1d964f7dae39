package azure

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	tenant = "11111111-1111-1111-1111-111111111111"
	// Each caller has its own loopback address.
	nodeA, podA   = "127.0.1.1", "127.0.2.7"
	nodeB, podB   = "127.0.3.1", "127.0.4.7"
	unknownSource = "127.0.99.1"
	tokenQuery    = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
)

var (
	system = Identity{ClientID: guid(1), ObjectID: guid(2)}
	red    = userAssigned("red", 10)
	blue   = userAssigned("blue", 20)
)

func guid(n int) string { return fmt.Sprintf("00000000-0000-0000-0000-%012d", n) }

func userAssigned(name string, n int) Identity {
	return Identity{ClientID: guid(n), ObjectID: guid(n + 1), ResourceID: "/subscriptions/s/resourceGroups/Group/providers/" +
		"Microsoft.ManagedIdentity/userAssignedIdentities/" + name}
}

// stateDir is shared by all tests, because generating keys is slow.
var stateDir string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "azure")
	if err != nil {
		panic(err)
	}
	stateDir = dir
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// clock is a time that tests advance. It starts with the current time, because
// Client.Verify checks the times of tokens with the real clock.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// fakeAzure is a running fake Azure with two nodes, a and b.
type fakeAzure struct {
	*Client
	t     *testing.T
	clock *clock
	at    Addresses
}

func prefixes(node, pods string) []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix(node + "/32"), netip.MustParsePrefix(pods)}
}

func testConfig(dir string) Config {
	return Config{
		IMDSAddr: "127.0.0.1:0", EntraAddr: "127.0.0.1:0", ControlSocket: filepath.Join(dir, "control"), StateDir: stateDir,
		EntraHosts: []string{"login.fake-azure.test"}, Tenant: tenant,
		Nodes: []Node{
			{Name: "a", Sources: prefixes(nodeA, "127.0.2.0/24"), ProviderID: "azure:///subscriptions/sub/resourceGroups/rg/providers/" +
				"Microsoft.Compute/virtualMachineScaleSets/set/virtualMachines/3"},
			{Name: "b", Sources: prefixes(nodeB, "127.0.4.0/24")},
		},
	}
}

func start(t *testing.T, change ...func(*Config)) *fakeAzure {
	t.Helper()
	dir, err := os.MkdirTemp("", "azure") // not t.TempDir: the path of a unix socket must be short
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(dir)
	for _, c := range change {
		c(&cfg)
	}
	s := &fakeAzure{Client: Dial(cfg.ControlSocket), t: t, clock: &clock{t: time.Now()}}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, cfg, s.clock.now) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the fake Azure ended with an error: %v", err)
		}
		_ = os.RemoveAll(dir)
	})
	ready, stop := context.WithTimeout(ctx, 30*time.Second)
	defer stop()
	s.must(s.WaitReady(ready))
	s.at, err = s.Addresses(ctx)
	s.must(err)
	return s
}

func (s *fakeAzure) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *fakeAzure) set(pairs ...string) {
	s.t.Helper()
	changes := map[string]string{}
	for _, p := range pairs {
		key, value, _ := strings.Cut(p, "=")
		changes[key] = value
	}
	s.must(s.Set(s.t.Context(), changes))
}

func (s *fakeAzure) add(id Identity, nodes ...string) {
	s.t.Helper()
	s.must(s.AddIdentity(s.t.Context(), id, nodes...))
}

func (s *fakeAzure) stats() Stats {
	s.t.Helper()
	st, err := s.Stats(s.t.Context())
	s.must(err)
	return st
}

func (s *fakeAzure) lastEntry() Entry {
	s.t.Helper()
	entries, err := s.Log(s.t.Context(), 0)
	s.must(err)
	if len(entries) == 0 {
		s.t.Fatal("the request log of the fake Azure is empty")
	}
	return entries[len(entries)-1]
}

// answer is a complete response.
type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) token(t *testing.T) tokenAnswer {
	t.Helper()
	if a.status != 200 {
		t.Fatalf("got status %d, want 200 with a token; body: %s", a.status, a.body)
	}
	var out tokenAnswer
	if err := json.Unmarshal([]byte(a.body), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// dialFrom connects to the fake IMDS from the address source.
func (s *fakeAzure) dialFrom(source string) net.Conn {
	s.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: 10 * time.Second}
	conn, err := d.DialContext(s.t.Context(), "tcp", s.at.IMDS)
	s.must(err)
	return conn
}

// try sends target and headers exactly as written: no client library normalizes the
// path.
func (s *fakeAzure) try(source, method, target string, headers ...string) (answer, error) {
	s.t.Helper()
	conn := s.dialFrom(source)
	defer conn.Close()
	s.must(conn.SetDeadline(time.Now().Add(20 * time.Second)))
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n", method, target)
	for _, h := range headers {
		fmt.Fprintf(conn, "%s\r\n", h)
	}
	fmt.Fprint(conn, "\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(body)}, err
}

func (s *fakeAzure) send(source, method, target string, headers ...string) answer {
	s.t.Helper()
	a, err := s.try(source, method, target, headers...)
	s.must(err)
	return a
}

// get sends a GET request with the header that IMDS requires.
func (s *fakeAzure) get(source, target string) answer {
	s.t.Helper()
	return s.send(source, "GET", target, "Metadata: true")
}

// waitUntil waits until the condition is true, for at most a minute.
func (s *fakeAzure) waitUntil(what string, ok func() bool) {
	s.t.Helper()
	tick, deadline := time.NewTicker(5*time.Millisecond), time.After(time.Minute)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			s.t.Fatalf("waited for a minute, but this did not happen: %s", what)
		}
	}
}
