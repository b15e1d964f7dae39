package token

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/podidentity/podidentity/identity"
)

// kubernetesToken returns an assertion like those of the API server, with a list of audiences.
func kubernetesToken(t *testing.T, pod string) string {
	t.Helper()
	token, err := jwt.NewWithClaims(jwt.SigningMethodRS256, jwt.MapClaims{
		"iss": "https://issuer.example/cluster", "sub": "system:serviceaccount:ns:app", "aud": []string{"api://AzureADTokenExchange"}, "pod": pod,
	}).SignedString(rsa2048().key.(*rsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func federatedPrincipal(s *entraID) Principal {
	return Principal{Source: Federated, ClientID: clientID, Authority: s.URL, TenantID: tenant, ServiceAccount: Ref{"ns", "app"}}
}

func TestAFederatedPrincipalUsesTheTokenOfTheCallingPod(t *testing.T) {
	s := startEntraID(t)
	k := &fakeCredentials{tokens: map[string]string{"pod-1@ns/app": kubernetesToken(t, "1"), "pod-2@ns/app": kubernetesToken(t, "2")}}
	e := newTestEntra(t, s, k)
	for i, pod := range []string{"pod-1", "pod-2", "pod-1"} {
		call := callFor(federatedPrincipal(s))
		call.Pod = pod
		if _, err := e.Fetch(t.Context(), call); err != nil {
			t.Fatal(err)
		}
		form := s.sent()[i].form
		if form.Get("client_assertion") != k.tokens[pod+"@ns/app"] || form.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" || form.Has("claims") || form.Get("client_id") != clientID {
			t.Errorf("%s: the token request has the form %v", pod, form)
		}
		if _, err := jwt.Parse(form.Get("client_assertion"), func(*jwt.Token) (any, error) { return rsa2048().key.Public(), nil }); err != nil {
			t.Errorf("%s: the assertion in the token request is not valid: %v", pod, err)
		}
	}
	if s.discovered != 1 {
		t.Errorf("the endpoints of the tenant were read %d times, want once, because the principal has one credential", s.discovered)
	}
}

func TestAMissingAssertionIsTheFailure(t *testing.T) {
	s := startEntraID(t)
	k := &fakeCredentials{err: &Error{Class: Denied, Reason: identity.ServiceAccountForbidden, Detail: "no"}}
	e := newTestEntra(t, s, k)
	if failed := mustFail(t, e, callFor(federatedPrincipal(s))); failed.Reason != identity.ServiceAccountForbidden || s.discovered != 0 {
		t.Errorf("with an error instead of an assertion: got %+v", failed)
	}
	k.err = nil
	if failed := mustFail(t, e, callFor(federatedPrincipal(s))); failed.Class != Unavailable || len(s.sent()) != 0 {
		t.Errorf("with an empty assertion: got %+v", failed)
	}
}

// inMemory passes requests to a handler without a network, so that a synctest bubble can advance its clock.
type inMemory struct{ http.Handler }

func (m inMemory) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	r.Host = r.URL.Host
	m.ServeHTTP(w, r)
	return w.Result(), nil
}

// federatedInBubble fetches once with a fake clock, and calls check with the result. answer returns the handler of the
// n-th token request, or nil for a response with a token. within is the timeout of the fetch.
func federatedInBubble(t *testing.T, answer func(n int) http.HandlerFunc, within time.Duration, check func(s *entraID, got Token, err error, took time.Duration)) {
	t.Helper()
	k := &fakeCredentials{tokens: map[string]string{"pod-1@ns/app": kubernetesToken(t, "1")}}
	synctest.Test(t, func(t *testing.T) {
		s := &entraID{Server: &httptest.Server{URL: "https://entra.example"}}
		s.answer = func(w http.ResponseWriter, r *http.Request) {
			if h := answer(len(s.sent())); h != nil {
				h(w, r)
				return
			}
			giveToken(w, r, 1, "")
		}
		e, err := NewEntra(EntraConfig{Assertions: k})
		if err != nil {
			t.Fatal(err)
		}
		e.transport.Transport = inMemory{s}
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		start := time.Now()
		got, err := e.Fetch(ctx, callFor(federatedPrincipal(s)))
		check(s, got, err, time.Since(start))
		if err != nil && strings.Contains(texts(asError(t, err)), k.tokens["pod-1@ns/app"]) {
			t.Errorf("the assertion is in the error %v", err)
		}
	})
}

func asError(t *testing.T, err error) *Error {
	t.Helper()
	var failed *Error
	if !errors.As(err, &failed) {
		t.Fatalf("the fetch returned %v, want an *Error", err)
	}
	return failed
}

func TestTheSourceRetriesUntilANewFederatedCredentialIsKnown(t *testing.T) {
	for n, code := range untrustedCodes {
		failures := 1 + n%len(federationRetryWaits)
		federatedInBubble(t, func(n int) http.HandlerFunc {
			if n <= failures {
				return refuse(401, "invalid_client", code, "")
			}
			return nil
		}, fetchTimeout, func(s *entraID, got Token, err error, took time.Duration) {
			var want time.Duration
			for _, pause := range federationRetryWaits[:failures] {
				want += pause
			}
			if err != nil || got.ClientID != clientID || took != want || len(s.sent()) != failures+1 {
				t.Errorf("error code %d: got %+v, %v after %v and %d requests; want a token after the retries", code, got, err, took, len(s.sent()))
			}
		})
	}
}

func TestAMissingFederatedCredentialIsReportedWithItsExactFields(t *testing.T) {
	never := func(int) http.HandlerFunc { return refuse(401, "invalid_client", 700213, " No matching record.") }
	for within, want := range map[time.Duration]struct {
		took     time.Duration
		requests int
	}{
		fetchTimeout:    {12 * time.Second, len(federationRetryWaits) + 1},
		6 * time.Second: {3 * time.Second, 3}, // the next wait would leave no time for a retry
		time.Second:     {0, 1},
	} {
		federatedInBubble(t, never, within, func(s *entraID, _ Token, err error, took time.Duration) {
			failed := asError(t, err)
			if took != want.took || len(s.sent()) != want.requests {
				t.Errorf("a fetch with the timeout %v sent %d requests in %v", within, len(s.sent()), took)
			}
			if failed.Class != Denied || failed.Reason != identity.FederationUntrusted || failed.Status != 401 || failed.Code != "invalid_client" || failed.CorrelationID != "cid-1" {
				t.Errorf("without a federated credential: got %+v", failed)
			}
			for _, part := range []string{clientID, tenant, `"https://issuer.example/cluster"`, `"system:serviceaccount:ns:app"`, `"api://AzureADTokenExchange"`, "AADSTS700213"} {
				if !strings.Contains(failed.Detail, part) {
					t.Errorf("%s is missing in the field Detail: %q", part, failed.Detail)
				}
			}
		})
	}
}

func TestOtherRefusalsOfAnAssertionAreNotRetried(t *testing.T) {
	no := func(int) http.HandlerFunc { return refuse(401, "invalid_client", 700024, "") }
	federatedInBubble(t, no, fetchTimeout, func(s *entraID, _ Token, err error, took time.Duration) {
		if failed := asError(t, err); failed.Class != Denied || failed.Reason != "" || took != 0 || len(s.sent()) != 1 {
			t.Errorf("a refusal that must not be retried: got %+v after %v", failed, took)
		}
	})
}

func TestRetriesForACredentialDoNotDelayOtherPods(t *testing.T) {
	k := &fakeCredentials{tokens: map[string]string{"pod-1@ns/app": kubernetesToken(t, "1"), "pod-2@ns/app": kubernetesToken(t, "2")}}
	synctest.Test(t, func(t *testing.T) {
		s := &entraID{Server: &httptest.Server{URL: "https://entra.example"}}
		s.answer = func(w http.ResponseWriter, r *http.Request) {
			if posts := s.sent(); posts[len(posts)-1].form.Get("client_assertion") == k.tokens["pod-1@ns/app"] {
				refuse(401, "invalid_client", 70025, "")(w, r)
				return
			}
			giveToken(w, r, 1, "")
		}
		e, err := NewEntra(EntraConfig{Assertions: k})
		if err != nil {
			t.Fatal(err)
		}
		e.transport.Transport = inMemory{s}
		go e.Fetch(t.Context(), callFor(federatedPrincipal(s)))
		synctest.Wait()
		start := time.Now()
		call := callFor(federatedPrincipal(s))
		call.Pod = "pod-2"
		if _, err := e.Fetch(t.Context(), call); err != nil || time.Since(start) != 0 {
			t.Errorf("while the fetch for pod-1 waits for a retry, the fetch for pod-2 returned %v after %v; want a token at once", err, time.Since(start))
		}
	})
}

func TestAnAudienceIsReadAsATextOrAList(t *testing.T) {
	for text, want := range map[string]string{`"a"`: "[a]", `["a","b"]`: "[a b]", `[]`: "[]"} {
		var a audience
		if err := a.UnmarshalJSON([]byte(text)); err != nil || fmt.Sprint(a) != want {
			t.Errorf("the audience %s was read as %v, %v", text, a, err)
		}
	}
}
