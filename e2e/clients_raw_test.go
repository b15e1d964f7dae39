package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/cluster"
)

// Most tests in this file imitate a client that cannot run in the test environment. They send the requests that the
// source of the client contains, and check the parts of the response that the client uses.

// rawClient sends requests from a pod's network namespace. It follows no redirects, accepts no compression and opens a
// connection for each request.
type rawClient struct {
	t      *testing.T
	client *http.Client
	dial   func() (net.Conn, error)
}

func (s *testNamespace) rawClient(pod string) *rawClient {
	s.t.Helper()
	netns, err := testCluster.PodNetns(s.t.Context(), s.name, pod)
	must(s.t, err)
	s.t.Cleanup(func() { netns.Close() })
	dial := cluster.DialFrom(fmt.Sprintf("/proc/self/fd/%d", netns.Fd()), nil)
	return &rawClient{s.t, &http.Client{
		Timeout:       30 * time.Second,
		Transport:     &http.Transport{DialContext: dial, DisableKeepAlives: true, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, func() (net.Conn, error) { return dial(s.t.Context(), "tcp", "169.254.169.254:80") }}
}

// sendText sends a request byte for byte. The status is 0 if there is no response.
func (w *rawClient) sendText(request string) answer {
	w.t.Helper()
	conn, err := w.dial()
	must(w.t, err)
	defer conn.Close()
	must(w.t, conn.SetDeadline(time.Now().Add(30*time.Second)))
	_, err = io.WriteString(conn, request)
	must(w.t, err)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return answer{raw: err.Error()}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(w.t, err)
	a := answer{status: resp.StatusCode, raw: string(body), body: map[string]string{}}
	_ = json.Unmarshal(body, &a.body)
	return a
}

// rawResponse is a response with its headers and duration.
type rawResponse struct {
	answer
	phrase string // status and reason phrase: 400 Bad Request
	header http.Header
	took   time.Duration
}

// send sends a request. path is everything after the host, byte for byte. headers are names, each followed by its
// value.
func (w *rawClient) send(method, path string, headers ...string) rawResponse {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), method, "http://169.254.169.254"+path, nil)
	must(w.t, err)
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	start := time.Now()
	resp, err := w.client.Do(req)
	must(w.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(w.t, err)
	r := rawResponse{answer: answer{status: resp.StatusCode, raw: string(body), body: map[string]string{}}, phrase: resp.Status, header: resp.Header, took: time.Since(start)}
	if err := json.Unmarshal(body, &r.body); err != nil {
		w.t.Errorf("%s %s: the answer is not a flat JSON object of strings: %s", method, path, body)
	}
	return r
}

// sendWithin sends a request that must be answered within limit, the timeout of the imitated client. If the response
// takes longer, sendWithin sends the request again, up to nine times, because a computer on which a few CPUs run a
// whole cluster may be busy for a moment.
func (w *rawClient) sendWithin(limit time.Duration, method, path string, headers ...string) rawResponse {
	w.t.Helper()
	var r rawResponse
	for range 10 {
		if r = w.send(method, path, headers...); r.took <= limit {
			return r
		}
	}
	w.t.Errorf("%s %s: ten requests took too long, the last one %s; want at most %s", method, path, r.took, limit)
	return r
}

const tokenPath = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="

func TestTheProbesOfDotNetClientsDetectVersion1OfIMDS(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	w := s.rawClient("p")
	// The probe is the token request without the Metadata header. To select an identity by resource ID, the client uses
	// the parameter msi-res-id, which IMDS does not have.
	for _, selector := range []string{"", "&client_id=" + id.ClientID, "&msi-res-id=" + id.ResourceID} {
		probe := w.sendWithin(time.Second, "GET", tokenPath+"https%3A%2F%2Fvault.azure.net"+selector)
		if probe.status != 400 || strings.Contains(probe.raw, "Identity not found") || probe.token() != "" {
			t.Errorf("the probe with the selector %q got %d %s; want 400 with another text than Identity not found", selector, probe.status, probe.raw)
		}
	}
	s.mustHaveTokenOf(w.send("GET", tokenPath+"https%3A%2F%2Fvault.azure.net&client_id="+id.ClientID, "Metadata", "true").answer, id, vault)
	// The client must get 404. From status 400 it would conclude that it talks to version 2 of IMDS, which issues
	// certificates for all identities of a machine.
	for _, headers := range [][]string{nil, {"Metadata", "true"}} {
		for _, request := range [][2]string{{"GET", "getplatformmetadata"}, {"POST", "issuecredential"}, {"POST", "credential"}} {
			r := w.sendWithin(time.Second, request[0], "/metadata/identity/"+request[1]+"?cred-api-version=2.0&client_id="+id.ClientID, headers...)
			if r.status != 404 {
				t.Errorf("%v with headers %v got %d %s; want 404", request, headers, r.status, r.raw)
			}
		}
	}
}

func TestJavaClientsDetectIMDSByATCPConnection(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	w := s.rawClient("p")
	for range 10 {
		start := time.Now()
		conn, err := w.dial()
		must(t, err)
		must(t, conn.Close())
		if took := time.Since(start); took > time.Second {
			t.Errorf("a TCP connection to the address of IMDS took %s; want at most 1 s", took)
		}
	}
	a := w.send("GET", tokenPath+"https%3A%2F%2Fvault.azure.net", "Metadata", "true").answer
	s.mustHaveTokenOf(a, id, vault)
	// The client parses the value with Long.parseLong, which accepts only a decimal number.
	if expires, err := strconv.ParseInt(a.body["expires_on"], 10, 64); err != nil || expires < time.Now().Unix() || strings.HasPrefix(a.body["expires_on"], "+") {
		t.Errorf("expires_on is %q; want a Unix time in the future, without a sign", a.body["expires_on"])
	}
}

func TestTerraformClientsUseExpiresInAndTheTokenType(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node2")
	w := s.rawClient("p")
	a := w.send("GET", tokenPath+"https%3A%2F%2Fmanagement.azure.com%2F&client_id="+id.ClientID, "Metadata", "true").answer
	s.mustHaveTokenOf(a, id, "https://management.azure.com/")
	claims, err := fakeAzure.Verify(a.token())
	must(t, err)
	left, err := strconv.Atoi(a.body["expires_in"])
	if off := time.Until(claims.Expires.Time) - time.Duration(left)*time.Second; err != nil || off < -2*time.Second || off > 5*time.Second {
		t.Errorf("expires_in is %q, but the token expires in %s", a.body["expires_in"], time.Until(claims.Expires.Time))
	}
	if a.body["token_type"] != "Bearer" { // the client copies it into the Authorization header
		t.Errorf("token_type is %q; want Bearer", a.body["token_type"])
	}
	// The client waits for the time in Retry-After before it retries.
	for i, c := range []struct {
		switches map[string]string
		status   int
	}{
		{map[string]string{"imds.status": "503"}, 503},
		{map[string]string{"imds.drop": "true"}, 503},
		{map[string]string{"imds.throttle": "-1", "imds.retry-after": "2"}, 429},
	} {
		setFaults(t, c.switches)
		r := w.send("GET", tokenPath+fmt.Sprintf("https://r%d.example", i), "Metadata", "true")
		after, err := strconv.Atoi(r.header.Get("Retry-After"))
		if r.status != c.status || err != nil || after < 1 || after > 25 {
			t.Errorf("%v: got %d with Retry-After %q (want 1 to 25): %s", c.switches, r.status, r.header.Get("Retry-After"), r.raw)
		}
	}
	w.endThrottling()
}

// endThrottling resets all switches of the fake Azure, and waits until NMI sends requests to IMDS again.
func (w *rawClient) endThrottling() {
	w.t.Helper()
	setFaults(w.t, nil)
	eventually(w.t, 20*time.Second, func() error {
		if r := w.send("GET", tokenPath+"https://next.example", "Metadata", "true"); r.status != 200 {
			return fmt.Errorf("got %d %s", r.status, r.raw)
		}
		return nil
	})
}

func TestPythonClientsProbeWithATokenRequestAndCompareTheResourceByteForByte(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	w := s.rawClient("p")
	for _, resource := range []string{"https://vault.azure.net", "https://vault.azure.net/", "https://Storage.azure.com//", "api://some-app", "2ff814a6-3304-4ab8-85cb-cd0e6f879c1d"} {
		path := "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + resource
		if probe := w.sendWithin(300*time.Millisecond, "GET", path); probe.status != 400 || probe.token() != "" {
			t.Errorf("the probe got %d %s; want 400 and no token", probe.status, probe.raw)
		}
		a := w.send("GET", path, "Metadata", "true").answer
		s.mustHaveTokenOf(a, id, resource)
		for _, number := range []string{"expires_on", "expires_in", "not_before", "ext_expires_in"} {
			if _, err := strconv.Atoi(a.body[number]); err != nil { // the client parses it with int()
				t.Errorf("%s is %q; want an integer", number, a.body[number])
			}
		}
	}
}

func TestMSALPythonClientsReadEachErrorAsJSON(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	s.pod("nothing", "nothing", "node1")
	w, unbound := s.rawClient("p"), s.rawClient("nothing")
	path := tokenPath + "https://vault.azure.net"
	seen := map[int]bool{}
	for _, r := range []rawResponse{
		w.send("GET", path),
		w.send("GET", path+"&client_id=00000000-0000-4000-8000-000000000000", "Metadata", "true"),
		w.send("GET", "/metadata/identity/oauth2/token?api-version=2018-02-01", "Metadata", "true"),
		w.send("GET", tokenPath+"https://unknown.invalid", "Metadata", "true"),
		w.send("POST", path, "Metadata", "true"),
		w.send("GET", "/metadata/identity/something?api-version=2018-02-01", "Metadata", "true"),
		w.send("GET", "/metadata/attested/document?api-version=2020-09-01", "Metadata", "true"),
		unbound.send("GET", path, "Metadata", "true"),
		func() rawResponse {
			setFaults(t, map[string]string{"imds.status": "500", "imds.error-body": "text"})
			return w.send("GET", tokenPath+"https://r500.example", "Metadata", "true")
		}(),
		func() rawResponse {
			setFaults(t, map[string]string{"imds.throttle": "-1", "imds.retry-after": "1"})
			return w.send("GET", tokenPath+"https://r429.example", "Metadata", "true")
		}(),
	} {
		seen[r.status] = true
		if r.body["error"] == "" || r.body["error_description"] == "" || !strings.HasPrefix(r.header.Get("Content-Type"), "application/json") {
			t.Errorf("%s with Content-Type %q: want JSON with error and error_description; got %s", r.phrase, r.header.Get("Content-Type"), r.raw)
		}
	}
	for _, status := range []int{400, 403, 404, 405, 429, 503} {
		if !seen[status] {
			t.Errorf("no request got status %d; the statuses are %v", status, seen)
		}
	}
	w.endThrottling()
}

func TestTheFieldsOfTheAnswerHaveTheOrderOfIMDS(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	a := s.rawClient("p").send("GET", tokenPath+"https://vault.azure.net", "Metadata", "true").answer
	s.mustHaveTokenOf(a, id, vault)
	var keys []string
	for _, match := range regexp.MustCompile(`"(\w+)":`).FindAllStringSubmatch(a.raw, -1) {
		keys = append(keys, match[1])
	}
	want := []string{"access_token", "client_id", "expires_in", "expires_on", "ext_expires_in", "not_before", "resource", "token_type"}
	if !slices.Equal(keys, want) {
		t.Errorf("the fields are %v, want %v in this order: clients keep the last of expires_in and expires_on", keys, want)
	}
}

func TestTheAzureCLIClientTriesAGUIDAsClientIDThenAsObjectID(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	w := s.rawClient("p")
	first := w.send("GET", tokenPath+"https://management.core.windows.net/&client_id="+id.ObjectID, "Metadata", "true")
	if first.phrase != "400 Bad Request" || first.body["error_description"] != "Identity not found" {
		t.Errorf("the request with an object ID as client_id got %q; want 400 Bad Request, Identity not found: %s", first.phrase, first.raw)
	}
	second := w.send("GET", tokenPath+"https://management.core.windows.net/&object_id="+id.ObjectID, "Metadata", "true").answer
	s.mustHaveTokenOf(second, id, "https://management.core.windows.net/")
}
