package metadata

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/podidentity/podidentity/identity"
)

func TestATokenIsWrittenLikeIMDS(t *testing.T) {
	w := httptest.NewRecorder()
	TokenResponse{
		AccessToken: "eyJ.a.b", ClientID: "0d46", Resource: `https://x/?a=1&b=<">`,
		ExpiresOn: time.Unix(1709895997, 0), NotBefore: time.Unix(1709809297, 0), Lifetime: 86399 * time.Second,
	}.Write(w, time.Unix(1709895997-86317, 0))
	want := `{"access_token":"eyJ.a.b","client_id":"0d46","expires_in":"86317","expires_on":"1709895997",` +
		`"ext_expires_in":"86399","not_before":"1709809297","resource":"https://x/?a=1&b=<\">","token_type":"Bearer"}`
	if got := w.Body.String(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if w.Code != 200 || w.Header().Get("Content-Type") != "application/json; charset=utf-8" {
		t.Errorf("got %d %v", w.Code, w.Header())
	}
}

func TestAnExpiredTokenHasNoNegativeLifetime(t *testing.T) {
	w := httptest.NewRecorder()
	TokenResponse{ExpiresOn: time.Unix(100, 0)}.Write(w, time.Unix(200, 0))
	if !strings.Contains(w.Body.String(), `"expires_in":"0"`) {
		t.Error(w.Body)
	}
}

func TestErrorsAreFlatAndHaveRetryAfter(t *testing.T) {
	cases := []struct {
		name       string
		err        *Error
		status     int
		body       map[string]string
		retryAfter string
	}{
		{"not bound", Refusal(identity.Decision{Reason: identity.NoMatchingBinding, Detail: "why"}), 400,
			map[string]string{"error": "invalid_request", "error_description": "Identity not found", "reason": "no_matching_binding", "detail": "why"}, ""},
		{"several", Refusal(identity.Decision{Reason: identity.MultipleIdentities, Detail: "why"}), 400,
			map[string]string{"error": "invalid_request", "error_description": textMultiple, "reason": "multiple_identities", "detail": "why"}, ""},
		{"invalid", Refusal(identity.Decision{Reason: identity.IdentityInvalid, Detail: "why"}), 403,
			map[string]string{"error": "forbidden", "error_description": "why", "reason": "identity_invalid", "detail": "why"}, ""},
		{"pending", Refusal(identity.Decision{Outcome: identity.Pending, Reason: identity.AssignmentPending, Detail: "why"}), 503,
			map[string]string{"error": "service_unavailable", "error_description": "why", "reason": "assignment_pending"}, "5"},
		{"an hour is longer than clients accept", Unavailable(identity.UpstreamUnavailable, "d", time.Hour), 503,
			map[string]string{"error": "service_unavailable", "error_description": "d", "reason": "upstream_unavailable"}, "25"},
		{"an instant is no pause", Throttled(identity.PodThrottled, "d", time.Millisecond), 429,
			map[string]string{"error": "too_many_requests", "error_description": "d", "reason": "pod_throttled"}, "1"},
		{"parts of a second are rounded up", Throttled(identity.PodThrottled, "d", 1100*time.Millisecond), 429,
			map[string]string{"error": "too_many_requests", "error_description": "d", "reason": "pod_throttled"}, "2"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			c.err.Write(w)
			var body map[string]string // Unmarshal returns an error if the object is not flat
			if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
				t.Fatal(err, w.Body)
			}
			if w.Code != c.status || w.Header().Get("Retry-After") != c.retryAfter || len(body) != len(c.body) {
				t.Errorf("got %d %v %v", w.Code, w.Header(), body)
			}
			for k, v := range c.body {
				if body[k] != v {
					t.Errorf("%s: got %q, want %q", k, body[k], v)
				}
			}
		})
	}
}

// pass sends one request through an Upstream with the fake IMDS h, and returns the response.
func pass(t *testing.T, h http.HandlerFunc, target string, headers ...string) (*httptest.ResponseRecorder, *Error) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	u := NewUpstream(netip.MustParseAddrPort(strings.TrimPrefix(server.URL, "http://")))
	r := request(t, target, append(headers, "Metadata: true")...)
	req, refusal := Parse(r, Rules{})
	if refusal != nil {
		t.Fatal(refusal)
	}
	w := httptest.NewRecorder()
	return w, u.Forward(w, r, req)
}

func TestTheRequestToIMDSIsBuiltFromParsedValues(t *testing.T) {
	var seen *http.Request
	w, err := pass(t, func(w http.ResponseWriter, r *http.Request) {
		seen = r
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(418)
		w.Write([]byte("vmss1"))
	}, `/METADATA\instance//compute/vmScaleSetName/?format=text&api-version=2021-02-01&evil=1`,
		"Authorization: secret", "Connection: Authorization", "Cookie: c", "User-Agent: me", "Content-Length: 0")
	if err != nil || w.Code != 418 || w.Body.String() != "vmss1" || w.Header().Get("Content-Type") != "text/plain" {
		t.Errorf("got %v %d %q %v", err, w.Code, w.Body, w.Header())
	}
	if got, want := seen.RequestURI, "/metadata/instance/compute/vmScaleSetName?api-version=2021-02-01&format=text"; got != want {
		t.Errorf("IMDS received a request for %s, want %s", got, want)
	}
	for name := range seen.Header {
		if name != "Metadata" && name != "User-Agent" {
			t.Errorf("IMDS received the header %s", name)
		}
	}
}

func TestAnEndlessResponseIsLimited(t *testing.T) {
	w, _ := pass(t, func(w http.ResponseWriter, _ *http.Request) {
		for range 3 {
			w.Write(make([]byte, maxForwardBytes))
		}
	}, "/metadata/instance?api-version=2021-02-01")
	if w.Body.Len() > maxForwardBytes {
		t.Errorf("%d bytes of an endless response were forwarded, more than maxForwardBytes", w.Body.Len())
	}
}

func TestAnIMDSThatClosesTheConnectionIsUnavailable(t *testing.T) {
	w, _ := pass(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "/metadata/versions")
	if w.Code != 503 || w.Header().Get("Retry-After") == "" || !strings.Contains(w.Body.String(), "upstream_unavailable") {
		t.Errorf("got %d %v %s", w.Code, w.Header(), w.Body)
	}
}

func TestTheNodesBudgetIsSharedAndBounded(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("{}")) }))
	defer server.Close()
	u := NewUpstream(netip.MustParseAddrPort(strings.TrimPrefix(server.URL, "http://")))
	r := request(t, "/metadata/versions", "Metadata: true")
	results := make(chan *Error)
	const requests = 30
	for range requests {
		go func() { results <- u.Forward(httptest.NewRecorder(), r, Request{Route: RouteVersions}) }()
	}
	served, start := 0, time.Now()
	for range requests {
		if err := <-results; err == nil {
			served++
		} else if err.Status != 429 || err.Reason != identity.UpstreamThrottled {
			t.Errorf("got %v", err)
		}
	}
	// One request at once, then one every 200 ms.
	if maxServed := 1 + int((forwardWait+time.Since(start))*forwardRate/time.Second); served < 5 || served > maxServed {
		t.Errorf("%d of %d requests were served, want at least 5 and at most %d", served, requests, maxServed)
	}
}
