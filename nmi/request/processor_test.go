package request

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/token"
)

func TestNoTokenIsFetchedForARefusedPod(t *testing.T) {
	b := newBench(t)
	b.ask("10.0.0.3", nmitest.TokenPath)
	b.ask("10.0.0.1", nmitest.TokenPath+"&client_id="+nmitest.ClientY)
	b.ask("10.0.0.2", nmitest.TokenPath)
	if len(b.azure.Requests) != 0 {
		t.Errorf("NMI requested tokens for refused pods: %v", b.azure.Requests)
	}
}

// A pod must not get a cached token of an identity that it may not use.
func TestTheDecisionComesBeforeTheCache(t *testing.T) {
	b := newBench(t)
	if status, _ := b.ask("10.0.0.2", nmitest.TokenPath+"&client_id="+nmitest.ClientY); status != 200 {
		t.Fatal("the pod that may use the identity got no token, so the token is not in the cache; this test would prove nothing")
	}
	if status, body := b.ask("10.0.0.1", nmitest.TokenPath+"&client_id="+nmitest.ClientY); status != 400 {
		t.Errorf("got %d %v", status, body)
	}
}

func TestClientsUnderstandTheResponseToAFailedFetch(t *testing.T) {
	cases := []struct {
		name    string
		err     error
		status  int
		want    map[string]string
		headers string
	}{
		{"unavailable", &token.Error{Class: token.Unavailable, Status: 500}, 503, map[string]string{"error": "service_unavailable", "reason": "upstream_unavailable"}, "2"},
		{"unknown error", errors.New("?"), 503, map[string]string{"reason": "upstream_unavailable"}, "2"},
		{"throttled", &token.Error{Class: token.Throttled, RetryAfter: 7 * time.Second}, 429, map[string]string{"error": "too_many_requests", "reason": "upstream_throttled"}, "7"},
		{"not attached", &token.Error{Class: token.Denied, Status: 400, Code: "invalid_request", Description: "Identity not found"}, 400, map[string]string{"error": "invalid_request", "error_description": "Identity not found", "reason": "upstream_refused"}, ""},
		{"forbidden", &token.Error{Class: token.Denied, Status: 401, Code: "unauthorized_client", Description: "no"}, 403, map[string]string{"error": "unauthorized_client", "reason": "upstream_refused"}, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			b.azure.Error = c.err
			status, body := b.ask("10.0.0.1", nmitest.TokenPath)
			if status != c.status || body["Retry-After"] != c.headers {
				t.Errorf("got %d %v", status, body)
			}
			for k, v := range c.want {
				if body[k] != v {
					t.Errorf("%s is %q, want %q", k, body[k], v)
				}
			}
			// The identity whose token is not available may be the requested one. So the response must be the failure of
			// the fetch, and not "not found", which clients do not retry.
			if objStatus, body := b.ask("10.0.0.2", nmitest.TokenPath+"&object_id=object-of-"+nmitest.ClientX); objStatus != c.status {
				t.Errorf("by object id: %d %v", objStatus, body)
			}
		})
	}
}

// The object ID does not depend on the resource, and the failure of one identity does not affect the other.
func TestAnObjectIDIsFetchedOnceAndOtherIdentitiesMayFail(t *testing.T) {
	b := newBench(t)
	if status, _ := b.ask("10.0.0.2", nmitest.TokenPath+"&object_id=object-of-"+nmitest.ClientY); status != 200 {
		t.Fatal(status)
	}
	before := len(b.azure.Requests)
	b.azure.UnavailableClient = nmitest.ClientX
	other := strings.Replace(nmitest.TokenPath, "vault", "storage", 1)
	if status, body := b.ask("10.0.0.2", other+"&object_id=object-of-"+nmitest.ClientY); status != 200 || body["access_token"] != "token-of-"+nmitest.ClientY {
		t.Errorf("got %d %v", status, body)
	}
	if after := len(b.azure.Requests); after != before+1 {
		t.Errorf("NMI fetched %d tokens, want 1: the object ID is known from an earlier token", after-before)
	}
}

func TestNoRequestIsRefusedPermanentlyBeforeTheCachesSync(t *testing.T) {
	b := newBench(t)
	b.notSynced = errors.New("caches: not synced yet")
	if status, body := b.ask("10.0.0.3", nmitest.TokenPath); status != 503 || body["reason"] != "not_ready" {
		t.Errorf("got %d %v", status, body)
	}
}

func TestTheResponseForAnIdentityOfSeveralTenantsIsAnArray(t *testing.T) {
	b := newBench(t)
	r := httptest.NewRequest(http.MethodGet, nmitest.TokenPath, nil)
	r.RemoteAddr = "10.0.0.5:1"
	r.Header.Set("Metadata", "true")
	w := httptest.NewRecorder()
	b.ServeHTTP(w, r)
	var tokens []map[string]string
	if err := json.Unmarshal(w.Body.Bytes(), &tokens); err != nil || len(tokens) != 2 || tokens[0]["client_id"] != nmitest.ClientS {
		t.Fatalf("error %v, response %s; want an array of two tokens of the service principal", err, w.Body)
	}
	if requested := b.azure.Requests; len(requested) != 2 || requested[0].TenantID != "t" || requested[1].TenantID != "t2" || requested[0].Secret != (token.Ref{Namespace: "ns", Name: "password"}) || requested[0].Revision == "" {
		t.Errorf("NMI requested %+v; want one token of each tenant, with the same Secret", requested)
	}
}

// After a fetch, NMI decides again and does not use the decision from before the fetch.
func TestAChangeDuringAFetchIsNoticed(t *testing.T) {
	const other = "99999999-0000-0000-0000-000000000009"
	for _, c := range []struct {
		name   string
		change func(b *bench)
		status int
		token  string
	}{
		{"nothing", func(*bench) {}, 200, "token-of-" + nmitest.ClientX},
		{"the binding is deleted", func(b *bench) { b.facts.Bindings = nil }, 400, ""},
		{"the identity is deleted", func(b *bench) { b.facts.Identities = nil }, 400, ""},
		{"the identity becomes another", func(b *bench) {
			b.facts = nmitest.CopyOf(b.facts)
			b.facts.Identities[0].ClientID = other
		}, 200, "token-of-" + other},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			b.azure.During = func() {
				b.azure.During = nil
				c.change(b)
			}
			if status, body := b.ask("10.0.0.1", nmitest.TokenPath); status != c.status || body["access_token"] != c.token {
				t.Errorf("got %d %v", status, body)
			}
		})
	}
}

func TestNoRequestIsRefusedPermanentlyWhileAWatchIsStale(t *testing.T) {
	b := newBench(t)
	b.staleWatch = "azureidentities"
	if status, body := b.ask("10.0.0.3", nmitest.TokenPath); status != 503 || body["reason"] != "not_ready" || !strings.Contains(body["error_description"], "aadpodidbinding") {
		t.Errorf("got %d %v", status, body)
	}
	if status, _ := b.ask("10.0.0.1", nmitest.TokenPath); status != 200 {
		t.Errorf("a bound pod got status %d while a watch is stale, want 200", status)
	}
}

func TestOnlyTokensOfBoundIdentitiesMayBeRenewed(t *testing.T) {
	b := newBench(t)
	x, both, free := b.podOf("10.0.0.1"), b.podOf("10.0.0.2"), b.podOf("10.0.0.4")
	keyOf := func(client string) token.Principal { return token.ManagedKey(client, "", "", "").Principal }
	for _, c := range []struct {
		pod       *corev1.Pod
		principal token.Principal
		want      bool
	}{
		{x, keyOf(nmitest.ClientX), true}, {x, keyOf(nmitest.ClientY), false}, {both, keyOf(nmitest.ClientY), true}, {free, keyOf(nmitest.ClientY), true},
		{free, token.Principal{Source: token.Secret, ClientID: nmitest.ClientS}, false},
	} {
		if got := b.processor.MayRenew(c.pod, c.principal); got != c.want {
			t.Errorf("MayRenew for pod %s and the client ID %s: got %t", c.pod.Name, c.principal.ClientID, got)
		}
	}
	b.facts.Bindings = nil
	if b.processor.MayRenew(x, keyOf(nmitest.ClientX)) {
		t.Error("the token of a pod without its binding may be renewed")
	}
}
