package token

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
)

const (
	tenant   = "11111111-1111-1111-1111-111111111111"
	clientID = "22222222-2222-2222-2222-222222222222"

	secretValue = "s3cret~Value.with+signs&="
)

// entraID is a fake Entra ID.
type entraID struct {
	*httptest.Server
	discover, answer http.HandlerFunc // if nil, the fake responds like Entra ID

	mu         sync.Mutex
	discovered int
	posts      []post
}

// post is one request for a token.
type post struct {
	path, body string
	header     http.Header
	length     int64
	form       url.Values
}

func startEntraID(t *testing.T) *entraID {
	t.Helper()
	s := &entraID{}
	s.Server = httptest.NewTLSServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *entraID) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet {
		s.mu.Lock()
		s.discovered++
		discover := s.discover
		s.mu.Unlock()
		if discover != nil {
			discover(w, r)
			return
		}
		base := "https://" + r.Host + strings.TrimSuffix(r.URL.Path, "/v2.0/.well-known/openid-configuration")
		fmt.Fprintf(w, `{"token_endpoint":%q,"authorization_endpoint":%q,"issuer":%q}`, base+"/oauth2/v2.0/token", base+"/oauth2/v2.0/authorize", base+"/v2.0")
		return
	}
	body, _ := io.ReadAll(r.Body)
	form, _ := url.ParseQuery(string(body))
	s.mu.Lock()
	s.posts = append(s.posts, post{r.URL.Path, string(body), r.Header, r.ContentLength, form})
	answer, serial := s.answer, len(s.posts)
	s.mu.Unlock()
	if answer != nil {
		answer(w, r)
		return
	}
	giveToken(w, r, serial, "")
}

func giveToken(w http.ResponseWriter, r *http.Request, serial int, padding string) {
	if r.Header.Get("Return-Client-Request-Id") == "true" {
		w.Header().Set("client-request-id", r.Header.Get("client-request-id"))
	}
	claims, _ := json.Marshal(map[string]any{"appid": clientID, "oid": "object", "uti": "unique", "nbf": 1700000000, "serial": serial, "padding": padding})
	token := "e30." + base64.RawURLEncoding.EncodeToString(claims) + ".sig"
	fmt.Fprintf(w, `{"token_type":"Bearer","expires_in":3599,"ext_expires_in":3599,"access_token":%q}`, token)
}

// refuse responds with an error of Entra ID.
func refuse(status int, code string, aad int, more string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		text := fmt.Sprintf("AADSTS%d: no.%s\r\nTrace ID: t\r\nCorrelation ID: cid-1\r\nTimestamp: now", aad, more)
		body, _ := json.Marshal(map[string]any{"error": code, "error_description": text, "error_codes": []int{aad}, "correlation_id": "cid-1", "trace_id": "t"})
		w.Header().Set("Retry-After", "20")
		w.WriteHeader(status)
		w.Write(body)
	}
}

func (s *entraID) sent() []post {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.posts
}

// fakeCredentials has the Secrets and assertions of a test. It implements Secrets and Assertions.
type fakeCredentials struct {
	mu      sync.Mutex
	secrets map[Ref]SecretContent
	reads   int
	err     error             // returned by Secret and Assertion
	tokens  map[string]string // assertions by pod@ServiceAccount
}

func (k *fakeCredentials) Secret(_ context.Context, ref Ref) (SecretContent, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reads++
	return k.secrets[ref], k.err
}

func (k *fakeCredentials) Assertion(_ context.Context, pod string, account Ref) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.tokens[pod+"@"+account.String()], k.err
}

func secretsWith(data map[string][]byte) *fakeCredentials {
	return &fakeCredentials{secrets: map[Ref]SecretContent{{"ns", "name"}: {Data: data, Revision: "1"}}}
}

// newTestEntra returns a source that trusts the fake Entra ID and may connect to loopback.
func newTestEntra(t *testing.T, s *entraID, k *fakeCredentials) *Entra {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	e, err := NewEntra(EntraConfig{RootCAs: roots, UserAgent: "podidentity-test", Secrets: k, Assertions: k})
	if err != nil {
		t.Fatal(err)
	}
	e.authorities.forbidden = func(netip.Addr) bool { return false }
	e.pkcs12 = patientOpener()
	return e
}

func (s *entraID) principal(source Source) Principal {
	return Principal{Source: source, ClientID: clientID, Authority: s.URL, TenantID: tenant, Secret: Ref{"ns", "name"}, Revision: "1"}
}

func callFor(p Principal) Call {
	return Call{Key: Key{Principal: p, Resource: "https://vault.azure.net"}, Pod: "pod-1"}
}

func mustFail(t *testing.T, e *Entra, call Call) *Error {
	t.Helper()
	_, err := e.Fetch(t.Context(), call)
	var failed *Error
	if !errors.As(err, &failed) {
		t.Fatalf("the fetch returned %v, want an *Error", err)
	}
	return failed
}
