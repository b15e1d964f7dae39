package token

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/podidentity/podidentity/identity"
)

func TestAClientSecretIsSentAsEntraIDExpects(t *testing.T) {
	s := startEntraID(t)
	e := newTestEntra(t, s, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue + "\n")}))
	for _, c := range []struct{ resource, scope string }{
		{"https://vault.azure.net", "https://vault.azure.net/.default openid offline_access profile"},
		{"https://management.core.windows.net/", "https://management.core.windows.net//.default openid offline_access profile"},
		{"api://x/.default", "api://x/.default/.default openid offline_access profile"},
	} {
		got, err := e.Fetch(t.Context(), Call{Key: Key{s.principal(Secret), c.resource}})
		if err != nil {
			t.Fatal(err)
		}
		posts := s.sent()
		p := posts[len(posts)-1]
		want := url.Values{"client_id": {clientID}, "grant_type": {"client_credentials"}, "client_secret": {secretValue}, "scope": {c.scope}}
		if p.form.Encode() != want.Encode() || p.path != "/"+tenant+"/oauth2/v2.0/token" {
			t.Errorf("the token request has the form %v and the path %s", p.form, p.path)
		}
		if p.length != int64(len(p.body)) || !strings.HasPrefix(p.header.Get("Content-Type"), "application/x-www-form-urlencoded") || !strings.HasPrefix(p.header.Get("User-Agent"), "podidentity-test ") {
			t.Errorf("the body has %d bytes, Content-Length is %d, the headers are %v", len(p.body), p.length, p.header)
		}
		if got.ClientID != clientID || got.ObjectID != "object" || got.ID != "unique" || got.CorrelationID != p.header.Get("client-request-id") || got.CorrelationID == "" || time.Until(got.ExpiresOn) < 50*time.Minute {
			t.Errorf("the token was read as %+v", got)
		}
	}
}

func TestEachFetchReachesEntraIDWithTheSameCredential(t *testing.T) {
	s := startEntraID(t)
	k := secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)})
	e := newTestEntra(t, s, k)
	seen := map[string]bool{}
	for range 4 {
		got, err := e.Fetch(t.Context(), callFor(s.principal(Secret)))
		if err != nil {
			t.Fatal(err)
		}
		seen[got.AccessToken] = true
	}
	if len(seen) != 4 || s.discovered != 1 || k.reads != 1 {
		t.Errorf("4 fetches returned %d different tokens, read the endpoints %d times and the Secret %d times; want 4, 1 and 1", len(seen), s.discovered, k.reads)
	}
	e.Drop(func(p Principal) bool { return p.ClientID == clientID })
	if _, err := e.Fetch(t.Context(), callFor(s.principal(Secret))); err != nil || k.reads != 2 {
		t.Errorf("after Drop the Secret was read %d times, %v", k.reads, err)
	}
}

func TestARetrySendsTheWholeFormAgain(t *testing.T) {
	s := startEntraID(t)
	s.answer = func(w http.ResponseWriter, r *http.Request) {
		if len(s.sent()) < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		giveToken(w, r, 1, "")
	}
	e := newTestEntra(t, s, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)}))
	if _, err := e.Fetch(t.Context(), callFor(s.principal(Secret))); err != nil {
		t.Fatal(err)
	}
	posts := s.sent()
	if len(posts) != 3 || posts[0].body != posts[1].body || posts[0].body != posts[2].body || posts[0].form.Has("claims") || posts[2].length != int64(len(posts[2].body)) {
		t.Errorf("want three equal token requests, got %+v", posts)
	}
}

func TestFailuresOfEntraIDAreSorted(t *testing.T) {
	text := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	description := func(aad int) string {
		return fmt.Sprintf("AADSTS%d: no. Trace ID: t Correlation ID: cid-1 Timestamp: now", aad)
	}
	cases := []struct {
		name             string
		discover, answer http.HandlerFunc
		want             Error
		detail           string
		calls            int
	}{
		{"wrong secret", nil, refuse(401, "invalid_client", 7000215, ""), Error{Class: Denied, Status: 401, Code: "invalid_client", Description: description(7000215), CorrelationID: "cid-1"}, "", 1},
		{"wrong resource", nil, refuse(400, "invalid_resource", 500011, ""), Error{Class: Denied, Status: 400, Code: "invalid_resource", Description: description(500011), CorrelationID: "cid-1"}, "", 1},
		{"no such tenant", refuse(400, "invalid_tenant", 90002, ""), nil, Error{Class: Denied, Status: 400, Code: "invalid_tenant", Description: description(90002), CorrelationID: "cid-1"}, "", 1},
		{"throttled", nil, refuse(429, "too_many", 50196, ""), Error{Class: Throttled, Status: 429, Code: "too_many", Description: description(50196), CorrelationID: "cid-1", RetryAfter: 20 * time.Second}, "", 1},
		{"throttled early", refuse(429, "too_many", 90055, ""), nil, Error{Class: Throttled, Status: 429, Code: "too_many", Description: description(90055), CorrelationID: "cid-1", RetryAfter: 20 * time.Second}, "", 1},
		{"not found", nil, text(404, "<html>"), Error{Class: Denied, Status: 404}, "not in the format of Entra ID", 1},
		{"elsewhere", nil, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		}, Error{Class: Denied, Status: 307}, "not in the format of Entra ID", 1},
		{"slow", nil, text(408, ""), Error{Class: Unavailable, Status: 408}, "", 3},
		{"broken", nil, text(502, "<html>"), Error{Class: Unavailable, Status: 502}, "", 3},
		{"no JSON for a token", nil, text(200, "<html>"), Error{Class: Unavailable}, "contains no usable token", 1},
		{"no token", nil, text(200, `{"expires_in":1}`), Error{Class: Unavailable}, "contains no usable token", 1},
		{"a response of unlimited length", nil, text(200, strings.Repeat("x", 2*maxResponse)), Error{Class: Unavailable}, "", 3},
		{"another website", text(200, "<html>"), nil, Error{Class: Unavailable}, "is not a valid response of Entra ID", 1},
		{"another issuer", text(200, `{"token_endpoint":"https://x/","authorization_endpoint":"https://x/","issuer":"https://x/"}`), nil, Error{Class: Unavailable}, "is not a valid response of Entra ID", 1},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := startEntraID(t)
			s.discover, s.answer = c.discover, c.answer
			e := newTestEntra(t, s, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)}))
			got := *mustFail(t, e, callFor(s.principal(Secret)))
			if !strings.Contains(got.Detail, c.detail) || (c.detail == "") != (got.Detail == "") {
				t.Errorf("the field Detail is %q", got.Detail)
			}
			if c.want.CorrelationID == "" && got.Status != 0 {
				if len(got.CorrelationID) != 36 {
					t.Errorf("the correlation ID is %q, want the GUID that NMI sent", got.CorrelationID)
				}
				got.CorrelationID = ""
			}
			got.Err, got.Detail = nil, ""
			calls := s.discovered
			if c.discover == nil {
				calls = len(s.sent())
			}
			if got != c.want || calls != c.calls {
				t.Errorf("got %+v after %d calls; want %+v after %d", got, calls, c.want, c.calls)
			}
		})
	}
}

func TestADescriptionIsOneLineAndKeepsItsCorrelationID(t *testing.T) {
	long := "AADSTS1: " + strings.Repeat("é long story, ", 60) + "\r\nCorrelation ID: cid-1\r\nTimestamp: now"
	got := truncateDescription(long, "cid-1")
	if len(got) > 512 || !strings.HasSuffix(got, " Correlation ID: cid-1") || strings.ContainsAny(got, "\r\n") || !strings.HasPrefix(got, "AADSTS1: é long story") {
		t.Errorf("got %q, %d bytes", got, len(got))
	}
	if got := truncateDescription("AADSTS1: x\r\nCorrelation ID: cid-1\x1b[2J\n", "cid-1"); got != "AADSTS1: x Correlation ID: cid-1 [2J" {
		t.Errorf("got %q", got)
	}
}

// texts returns the text of an error, and of each error that it wraps, in all formats in which they could be printed.
func texts(e *Error) string {
	all := fmt.Sprintf("%v %+v %s %+v %+v", e, e, e, *e, e.Err)
	for err := error(e); err != nil; err = errors.Unwrap(err) {
		all += fmt.Sprintf("\n%s %+v %#v", err, err, err)
	}
	return all
}

func TestErrorsNeverRepeatASecret(t *testing.T) {
	echo := func(write func(http.ResponseWriter, string)) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { write(w, secretValue) }
	}
	for name, answer := range map[string]http.HandlerFunc{
		"as the text":        refuse(401, "invalid_client", 1, " "+secretValue+" "),
		"as the code":        refuse(401, secretValue, 1, ""),
		"in a token's place": echo(func(w http.ResponseWriter, s string) { fmt.Fprintf(w, `{"expires_in":%q}`, s) }),
		"in no JSON":         echo(func(w http.ResponseWriter, s string) { io.WriteString(w, s) }),
		"in an ID":           echo(func(w http.ResponseWriter, s string) { w.Header().Set("client-request-id", s); w.WriteHeader(400) }),
		"instead of HTTP": echo(func(w http.ResponseWriter, s string) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			fmt.Fprintf(conn, "%s\r\n\r\n", s)
			conn.Close()
		}),
		"in a status": echo(func(w http.ResponseWriter, s string) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			fmt.Fprintf(conn, "HTTP/1.1 %s\r\n\r\n", s)
			conn.Close()
		}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startEntraID(t)
			s.answer = answer
			e := newTestEntra(t, s, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)}))
			if all := texts(mustFail(t, e, callFor(s.principal(Secret)))); strings.Contains(all, secretValue) {
				t.Errorf("the client secret is in the error: %s", all)
			}
		})
	}
}

func TestA429ClosesTheGateOfItsPrincipalOnly(t *testing.T) {
	s := startEntraID(t)
	s.answer = refuse(429, "too_many", 50196, "")
	e := newTestEntra(t, s, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)}))
	for i := range 3 {
		call := callFor(s.principal(Secret))
		call.Resource = fmt.Sprint("r", i)
		if failed := mustFail(t, e, call); failed.Class != Throttled || failed.RetryAfter < 15*time.Second {
			t.Errorf("a request after a 429 got %+v, want an error of class Throttled with RetryAfter", failed)
		}
	}
	if n := len(s.sent()); n != 1 {
		t.Errorf("Entra ID received %d token requests, want only the one that it responded to with 429", n)
	}
	s.answer = nil
	other := s.principal(Secret)
	other.ClientID = "33333333-3333-3333-3333-333333333333"
	if _, err := e.Fetch(t.Context(), callFor(other)); err != nil {
		t.Errorf("another application of the tenant is throttled: %v", err)
	}
}

func TestAHangingAuthorityDoesNotDelayOthers(t *testing.T) {
	hung, other := startEntraID(t), startEntraID(t)
	release, arrived := make(chan struct{}), make(chan struct{}, 100)
	hung.discover = func(http.ResponseWriter, *http.Request) { arrived <- struct{}{}; <-release }
	e := newTestEntra(t, hung, secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)})) // all fakes have the same certificate
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 2 * authorityConcurrent {
		wg.Go(func() {
			p := hung.principal(Secret)
			p.ClientID = fmt.Sprint("client-", i/2) // two fetches for each client: some fetches wait for the semaphore, others for the lock of their client
			_, err := e.Fetch(ctx, callFor(p))
			var failed *Error
			if !errors.As(err, &failed) || failed.Class != Unavailable {
				t.Errorf("a fetch from the authority that hangs returned %v, want an error of class Unavailable", err)
			}
		})
	}
	for range authorityConcurrent {
		<-arrived
	}
	if _, err := e.Fetch(t.Context(), callFor(other.principal(Secret))); err != nil {
		t.Error(err)
	}
	cancel()
	wg.Wait()
	close(release)
	if extra := len(arrived); extra > 0 {
		t.Errorf("the authority that hangs received %d requests more than authorityConcurrent", extra)
	}
}

func TestAChangedSecretIsATemporaryFailure(t *testing.T) {
	s := startEntraID(t)
	k := secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)})
	e := newTestEntra(t, s, k)
	p := s.principal(Secret)
	p.Revision = "0"
	if failed := mustFail(t, e, callFor(p)); failed.Class != Unavailable || failed.Detail != "Secret ns/name changed during the request; retry" {
		t.Errorf("for a Secret with another revision: got %+v", failed)
	}
	k.err = &Error{Class: Denied, Reason: identity.SecretMissing, Detail: "gone"}
	if failed := mustFail(t, e, callFor(s.principal(Secret))); failed.Reason != identity.SecretMissing {
		t.Errorf("for a Secret that does not exist: got %+v", failed)
	}
	k.err = errors.New("no connection")
	if failed := mustFail(t, e, callFor(s.principal(Secret))); failed.Class != Unavailable || !errors.Is(failed, k.err) {
		t.Errorf("for a Secret that could not be read: got %+v", failed)
	}
	k.err = nil
	if _, err := e.Fetch(t.Context(), callFor(s.principal(Secret))); err != nil {
		t.Errorf("an earlier error of reading the Secret is still returned: %v", err)
	}
}

func TestAnInvalidSecretIsReadOncePerMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := secretsWith(nil)
		e, err := NewEntra(EntraConfig{Secrets: k})
		if err != nil {
			t.Fatal(err)
		}
		call := callFor(Principal{Source: Secret, ClientID: "c", TenantID: "t", Authority: "https://x", Secret: Ref{"ns", "name"}, Revision: "1"})
		for range 3 {
			mustFail(t, e, call)
		}
		if k.reads != 1 {
			t.Errorf("3 fetches read an invalid Secret %d times, want once", k.reads)
		}
		time.Sleep(invalidFor)
		mustFail(t, e, call)
		if k.reads != 2 {
			t.Errorf("after invalidFor, the invalid Secret was read %d times, want twice", k.reads)
		}
	})
}

func TestACredentialIsReplacedBeforeItHoldsManyTokens(t *testing.T) {
	s := startEntraID(t)
	s.answer = func(w http.ResponseWriter, r *http.Request) {
		giveToken(w, r, 1, strings.Repeat("x", maxBytesReceived/8))
	}
	k := secretsWith(map[string][]byte{"clientSecret": []byte(secretValue)})
	e := newTestEntra(t, s, k)
	for i := range 16 {
		call := callFor(s.principal(Secret))
		call.Resource = fmt.Sprint("r", i)
		if _, err := e.Fetch(t.Context(), call); err != nil {
			t.Fatal(err)
		}
	}
	if k.reads < 2 || k.reads > 4 {
		t.Errorf("NMI created %d credentials for 16 large tokens, want 2 to 4", k.reads)
	}
}
