package token

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
)

func TestAnAuthorityOnTheNodeIsRefused(t *testing.T) {
	s := startEntraID(t)
	e := newTestEntra(t, s, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)}))
	e.authorities.forbidden = isNodeAddress
	for _, authority := range []string{s.URL, strings.Replace(s.URL, "127.0.0.1", "localhost", 1), strings.Replace(s.URL, "127.0.0.1", "[::ffff:127.0.0.1]", 1)} {
		p := s.principal(Secret)
		p.Authority = authority
		failed := mustFail(t, e, callFor(p))
		if failed.Class != Denied || !strings.HasPrefix(failed.Detail, authority+": ") || !strings.Contains(failed.Detail, "of the node itself") {
			t.Errorf("the authority %s was not refused as an address of the node: %+v", authority, failed)
		}
	}
	if s.discovered != 0 {
		t.Error("the authority received a request")
	}
}

func TestAddressesOfTheNodeAreRecognized(t *testing.T) {
	for text, want := range map[string]bool{
		"127.0.0.1": true, "127.9.9.9": true, "::1": true, "::ffff:127.0.0.1": true, "169.254.169.254": true, "fe80::1%eth0": true,
		"0.0.0.0": true, "::": true, "224.0.0.1": true, "ff02::1": true, "168.63.129.16": true, "::ffff:168.63.129.16": true,
		"10.0.0.1": false, "20.190.128.1": false, "2603:1006::1": false, "::ffff:20.190.128.1": false,
	} {
		if isNodeAddress(netip.MustParseAddr(text)) != want {
			t.Errorf("isNodeAddress(%s) returned %t", text, !want)
		}
	}
}

// connectProxy starts a proxy that connects every CONNECT request to one server. The parameter to is the address of
// that server. connectProxy returns the URL of the proxy, and the method and host of the last request to it.
func connectProxy(t *testing.T, to string) (*url.URL, *atomic.Value) {
	asked := &atomic.Value{}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Method + " " + r.Host)
		behind, err := net.Dial("tcp", to)
		if err != nil {
			t.Error(err)
			return
		}
		w.WriteHeader(http.StatusOK)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		go func() {
			io.Copy(behind, conn)
			behind.Close()
		}()
		io.Copy(conn, behind)
		conn.Close()
	}))
	t.Cleanup(proxy.Close)
	u, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	return u, asked
}

func TestAProxyMayRunOnTheNodeButMustNotReachNodeAddresses(t *testing.T) {
	s := startEntraID(t)
	proxy, asked := connectProxy(t, strings.TrimPrefix(s.URL, "https://"))
	e := newTestEntra(t, s, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)}))
	e.authorities.forbidden = isNodeAddress
	e.authorities.proxy = func(*http.Request) (*url.URL, error) { return proxy, nil }
	p := s.principal(Secret)
	p.Authority = "https://example.com" // a name in the certificate of the fake Entra ID
	if _, err := e.Fetch(t.Context(), callFor(p)); err != nil || asked.Load() != "CONNECT example.com:443" {
		t.Errorf("a proxy on the node must be allowed: got %v, the proxy was asked for %v", err, asked.Load())
	}
	p.Authority = "https://169.254.169.254"
	if failed := mustFail(t, e, callFor(p)); failed.Class != Denied || asked.Load() != "CONNECT example.com:443" {
		t.Errorf("a node address must not be requested from the proxy: got %v, the proxy was asked for %v", failed, asked.Load())
	}
}

func TestNoCredentialIsSentWithoutHTTPS(t *testing.T) {
	s := startEntraID(t)
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a request arrived without https") }))
	t.Cleanup(plain.Close)
	s.discover = func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"token_endpoint":"`+plain.URL+`/token","authorization_endpoint":"`+s.URL+`","issuer":"`+s.URL+`"}`)
	}
	e := newTestEntra(t, s, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)}))
	if failed := mustFail(t, e, callFor(s.principal(Secret))); failed.Class != Denied || !strings.Contains(failed.Detail, "without https") {
		t.Errorf("for a token endpoint without https: got %+v", failed)
	}
}

func TestAnUntrustedCertificateIsNotAcceptedAsEntraID(t *testing.T) {
	s := startEntraID(t)
	e := newTestEntra(t, s, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)}))
	strict, err := newAuthorities(nil)
	if err != nil {
		t.Fatal(err)
	}
	strict.forbidden = e.authorities.forbidden
	e.transport.Transport = strict
	if failed := mustFail(t, e, callFor(s.principal(Secret))); failed.Class != Unavailable || s.discovered != 0 {
		t.Errorf("for an untrusted certificate: got %+v", failed)
	}
}
