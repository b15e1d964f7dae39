package token

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// imds starts a fake IMDS on loopback, and a source that uses it.
func imds(t *testing.T, h http.HandlerFunc) *ManagedIdentities {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	m, err := NewManagedIdentities(netip.MustParseAddrPort(strings.TrimPrefix(server.URL, "http://")), "test")
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func answerToken(w http.ResponseWriter, serial int32) {
	payload := fmt.Sprintf(`{"appid":"app","oid":"object","nbf":1700000000,"serial":%d}`, serial)
	token := "e30." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".sig"
	expires := time.Now().Add(24 * time.Hour).Unix()
	fmt.Fprintf(w, `{"access_token":%q,"expires_in":"86400","expires_on":"%d","resource":"r","token_type":"Bearer"}`, token, expires)
}

func TestAManagedIdentityIsRequestedByItsID(t *testing.T) {
	var asked url.Values
	var header http.Header
	m := imds(t, func(w http.ResponseWriter, r *http.Request) {
		asked, header = r.URL.Query(), r.Header
		answerToken(w, 1)
	})
	cases := []struct {
		key  Key
		want url.Values
	}{
		{ManagedKey("ABC", "", "", "https://a/"), url.Values{"client_id": {"abc"}}},
		{ManagedKey("", "def", "", "https://a//"), url.Values{"object_id": {"def"}}},
		{ManagedKey("", "", "/subscriptions/x", "r/.default"), url.Values{"msi_res_id": {"/subscriptions/x"}}},
		{ManagedKey("", "", "", "r"), url.Values{}},
	}
	for _, c := range cases {
		token, err := m.Fetch(t.Context(), Call{Key: c.key})
		if err != nil {
			t.Fatal(err)
		}
		if token.ClientID != "app" || token.ObjectID != "object" || token.NotBefore.Unix() != 1700000000 || time.Until(token.ExpiresOn) < 23*time.Hour {
			t.Errorf("the token was read as %+v", token)
		}
		if header.Get("Metadata") != "true" || asked.Get("resource") != c.key.Resource {
			t.Errorf("IMDS was asked for %v with the headers %v; the resource of the call is %q", asked, header, c.key.Resource)
		}
		asked.Del("resource")
		asked.Del("api-version")
		if v, ok := asked["mi_res_id"]; ok {
			asked["msi_res_id"] = v
			delete(asked, "mi_res_id")
		}
		if asked.Encode() != c.want.Encode() {
			t.Errorf("%+v: IMDS was asked for %v, want %v", c.key, asked, c.want)
		}
	}
}

func TestEachFetchReachesIMDS(t *testing.T) {
	var calls, bypassed atomic.Int32
	m := imds(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("bypass_cache") == "true" {
			bypassed.Add(1)
		}
		answerToken(w, calls.Add(1))
	})
	seen := map[string]bool{}
	for i := range 4 {
		token, err := m.Fetch(t.Context(), Call{Key: ManagedKey("a", "", "", "r"), Fresh: i == 3})
		if err != nil {
			t.Fatal(err)
		}
		seen[token.AccessToken] = true
	}
	if len(seen) != 4 || bypassed.Load() != 1 {
		t.Errorf("4 fetches returned %d different tokens, want 4; %d of the fetches bypassed the cache of IMDS, want 1", len(seen), bypassed.Load())
	}
}

func TestFailuresOfIMDSAreSorted(t *testing.T) {
	cases := []struct {
		name   string
		status int
		body   string
		header string
		want   Error
		calls  int32
	}{
		{"not attached", 400, `{"error":"invalid_request","error_description":"Identity not found"}`, "", Error{Class: Denied, Status: 400, Code: "invalid_request", Description: "Identity not found"}, 1},
		{"forbidden, in plain text", 403, `no`, "", Error{Class: Denied, Status: 403}, 1},
		{"throttled", 429, `{"error":"too_many_requests"}`, "7", Error{Class: Throttled, Status: 429, Code: "too_many_requests", RetryAfter: 7 * time.Second}, 1},
		{"gone for a while", 410, `{}`, "", Error{Class: Unavailable, Status: 410}, 3},
		{"broken", 500, `<html>`, "", Error{Class: Unavailable, Status: 500}, 3},
		{"no token in the answer", 200, `{"access_token":""}`, "", Error{Class: Unavailable}, 1},
		{"no JSON in the answer", 200, `<html>`, "", Error{Class: Unavailable}, 1},
		{"a response of unlimited length", 200, strings.Repeat("x", maxResponse*2), "", Error{Class: Unavailable}, 3},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var calls atomic.Int32
			m := imds(t, func(w http.ResponseWriter, _ *http.Request) {
				calls.Add(1)
				if c.header != "" {
					w.Header().Set("Retry-After", c.header)
				}
				w.WriteHeader(c.status)
				w.Write([]byte(c.body))
			})
			_, err := m.Fetch(t.Context(), Call{Key: ManagedKey("a", "", "", "r")})
			var got *Error
			if !errors.As(err, &got) {
				t.Fatalf("the fetch returned %v, want an *Error", err)
			}
			plain := *got
			plain.Err = nil
			if plain != c.want || calls.Load() != c.calls {
				t.Errorf("got %+v after %d calls; want %+v after %d", plain, calls.Load(), c.want, c.calls)
			}
		})
	}
}

func TestA429FromIMDSStopsRequestsOfAllIdentities(t *testing.T) {
	var calls atomic.Int32
	m := imds(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.Header().Set("Retry-After", "20")
		w.WriteHeader(429)
	})
	for i := range 5 {
		_, err := m.Fetch(t.Context(), Call{Key: ManagedKey(fmt.Sprint("id", i), "", "", "r")})
		var e *Error
		if !errors.As(err, &e) || e.Class != Throttled || e.RetryAfter < 15*time.Second {
			t.Errorf("a request after a 429 got %v, want an error of class Throttled with RetryAfter", err)
		}
	}
	if calls.Load() != 1 {
		t.Errorf("IMDS received %d requests, want only the one that it responded to with 429", calls.Load())
	}
}

func TestIMDSReceivesAtMostFiveConcurrentAndTwentyRequestsPerSecond(t *testing.T) {
	var mu sync.Mutex
	running, most := 0, 0
	var times []time.Time
	m := imds(t, func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		running++
		most = max(most, running)
		times = append(times, time.Now())
		mu.Unlock()
		time.Sleep(400 * time.Millisecond)
		mu.Lock()
		running--
		mu.Unlock()
		answerToken(w, 1)
	})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if _, err := m.Fetch(t.Context(), Call{Key: ManagedKey(fmt.Sprint("id", i), "", "", "r")}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most > imdsConcurrent || most < 2 {
		t.Errorf("IMDS received up to %d requests at a time, want 2 to imdsConcurrent", most)
	}
	for i := range times {
		n := 0
		for _, at := range times[i:] {
			if at.Sub(times[i]) < 990*time.Millisecond {
				n++
			}
		}
		if n > imdsRate {
			t.Errorf("IMDS received %d requests within a second, more than imdsRate", n)
		}
	}
}

func TestAHangingIMDSEndsWithTheContext(t *testing.T) {
	release := make(chan struct{})
	m := imds(t, func(http.ResponseWriter, *http.Request) { <-release })
	t.Cleanup(func() { close(release) })
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 2 * imdsConcurrent { // more fetches than imdsConcurrent, so some wait for the semaphore
		wg.Go(func() {
			_, err := m.Fetch(ctx, Call{Key: ManagedKey(fmt.Sprint("id", i), "", "", "r")})
			var e *Error
			if !errors.As(err, &e) || e.Class != Unavailable {
				t.Errorf("a fetch from an IMDS that hangs returned %v, want an error of class Unavailable", err)
			}
		})
	}
	wg.Wait()
}
