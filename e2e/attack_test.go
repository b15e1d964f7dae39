package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/podidentity/podidentity/e2e/azure"
)

// A pod without a binding sends requests that are known to bypass filters in front of IMDS. The fake IMDS is as
// permissive as the real one: if NMI forwarded an attack that succeeds with the real IMDS, the response would contain a
// token or ForbiddenMark.
func TestNoPathAndNoHeaderBypassesTheDecision(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.pod("attacker", "none", "node1")
	must(t, fakeAzure.ResetLog(t.Context()))
	const query = "?api-version=2018-02-01&resource=https://vault.azure.net"
	named := query + "&client_id=" + id.ClientID
	attacker, requests := s.rawClient("attacker"), attackRequests(named)
	for _, path := range attackPaths(query, named) {
		for _, h := range requests {
			a := attacker.sendText(h.method + " " + path + " HTTP/1.1\r\n" + h.rest)
			if a.token() != "" || strings.Contains(a.raw, "eyJ") || strings.Contains(a.raw, azure.ForbiddenMark) {
				t.Errorf("%s with %+v returned %s", path, h, a.raw)
			}
			if a.status < 400 && !strings.HasPrefix(path, "/metadata/instance?") {
				t.Errorf("%s with %+v: status %d %s", path, h, a.status, a.raw)
			}
		}
	}
	checkNoPodReachedIMDS(t)
	entries, err := fakeAzure.Log(t.Context(), 0)
	must(t, err)
	for _, e := range entries {
		if e.Class != "instance" && e.Kind == "request" {
			t.Errorf("IMDS received %s %s; want only requests for instance metadata", e.Method, e.Path)
		}
	}
}

// attackPaths returns known spellings of the token path that a filter may not recognize, and the paths of endpoints
// that no pod may use. named is a query that selects an identity.
func attackPaths(query, named string) []string {
	return []string{
		"/metadata/identity/oauth2/token" + named,
		"/metadata/identity/oauth2/token/" + named,
		`/metadata/identity\oauth2\token/` + named,
		`/metadata\identity\oauth2\token` + named,
		`\metadata\identity\oauth2\token` + named,
		"//metadata//identity//oauth2//token" + named,
		"/Metadata/Identity/OAuth2/Token" + named,
		"/metadata/identity%2foauth2%2ftoken" + named,
		"/metadata/identity%5coauth2%5ctoken" + named,
		"/metadata/identity%252foauth2%252ftoken" + named,
		"/metadata/./identity/oauth2/token" + named,
		"/metadata/instance/../identity/oauth2/token" + named,
		`/metadata/instance/..\identity/oauth2/token` + named,
		"/metadata/instance/%2e%2e/identity/oauth2/token" + named,
		"/metadata/versions/../identity/oauth2/token" + named,
		"/metadata/identity/oauth2/token%00" + named,
		"/metadata/identity/oauth2/token;x" + named,
		"/metadata/identity/oauth2/token%3fx" + named,
		"/metadata/instance?api-version=2021-02-01&format=text/../../identity/oauth2/token",
		"/metadata/identity/getplatformmetadata?cred-api-version=2.0",
		"/metadata/identity/issuecredential?cred-api-version=2.0",
		"/metadata/identity/credential",
		"/metadata/attested/document?api-version=2020-09-01",
		"/metadata/scheduledevents?api-version=2020-07-01",
		"/host/token" + named,
		"/machine/?comp=goalstate",
		"/",
	}
}

// attackRequest is a request without its path. rest is everything after the request line.
type attackRequest struct{ method, rest string }

// attackRequests returns the requests that the attacker sends to each path.
func attackRequests(named string) []attackRequest {
	const host, metadata = "Host: 169.254.169.254\r\n", "Metadata: true\r\n"
	smuggled := "GET /metadata/identity/oauth2/token" + named + " HTTP/1.1\r\n\r\n"
	return []attackRequest{
		{"GET", host + metadata + "\r\n"},
		{"POST", host + metadata + "Content-Length: 1\r\n\r\nx"},
		{"GET", host + metadata + "X-Forwarded-For: 10.10.0.11\r\n\r\n"},
		{"GET", host + metadata + "X-Original-URL: /metadata/identity/oauth2/token\r\nX-Rewrite-URL: /metadata/identity/oauth2/token\r\n\r\n"},
		{"GET", "Host: 169.254.169.254:80\r\n" + metadata + "podns: kube-system\r\npodname: x\r\n\r\n"},
		{"GET", host + metadata + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(smuggled), smuggled)},
		{"GET", host + "\r\n"},
	}
}

func TestEachRequestOfAConnectionIsDecidedOnItsOwn(t *testing.T) {
	independent(t)
	s, id, others := newNamespace(t), newIdentity(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	target := "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
	cmd, err := testCluster.InPodCommand(t.Context(), s.name, "p", "curl", "-s", "-H", "Metadata: true", "-w", "\n%{http_code} %{num_connects}\n",
		target, target+"&client_id="+others.ClientID, "http://169.254.169.254/metadata/identity/issuecredential", target)
	must(t, err)
	out, err := cmd.Output()
	must(t, err)
	var codes []string
	for line := range strings.SplitSeq(string(out), "\n") {
		var code, connects int
		if n, _ := fmt.Sscan(line, &code, &connects); n == 2 {
			codes = append(codes, fmt.Sprint(code, " ", connects))
		}
	}
	if got, want := fmt.Sprint(codes), "[200 1 400 0 404 0 200 0]"; got != want {
		t.Errorf("statuses and new connections are %s, want %s", got, want)
	}
}

func TestOtherPortsAndProtocolsOfTheMetadataAddressAreBlocked(t *testing.T) {
	s := newNamespace(t)
	s.pod("p", "none", "node1")
	must(t, fakeAzure.ResetLog(t.Context()))
	var attempts sync.WaitGroup
	for _, attempt := range [][]string{
		{"curl", "-s", "--max-time", "2", "http://169.254.169.254:8080/"},
		{"curl", "-s", "--max-time", "2", "-k", "https://169.254.169.254/"},
		{"ping", "-c", "1", "-W", "1", "169.254.169.254"},
		// NMI's own address, which the rules do not redirect.
		{"curl", "-s", "--max-time", "2", "-H", "Metadata: true", "http://169.254.25.79:2579/metadata/versions"},
	} {
		// Without the program, the attempt also fails, but proves nothing.
		if _, err := exec.LookPath(attempt[0]); err != nil {
			t.Fatal(err)
		}
		attempts.Go(func() {
			if out, err := testCluster.InPod(t.Context(), s.name, "p", attempt[0], attempt[1:]...); err == nil {
				t.Errorf("%v succeeded: %s", attempt, out)
			}
		})
	}
	attempts.Go(func() { // from another node, with a route to NMI's address by way of node1
		if _, err := testCluster.InNode(t.Context(), "node2", "sh", "-c", "ip route add 169.254.25.79/32 via 10.10.0.11; curl -s --max-time 2 --interface eth0 http://169.254.25.79:2579/; code=$?; ip route del 169.254.25.79/32 via 10.10.0.11; exit $code"); err == nil {
			t.Error("node2 got a response from NMI on node1; NMI must answer only its own node")
		}
	})
	attempts.Wait()
	checkNoPodReachedIMDS(t)
}

func TestInstanceMetadataIsPassedThrough(t *testing.T) {
	independent(t)
	s := newNamespace(t)
	s.pod("p", "none", "node2")
	a := s.curl("p", "-H", "Metadata: true", "http://169.254.169.254/metadata/instance?api-version=2018-02-01")
	if a.status != 200 || !strings.Contains(a.raw, "vmScaleSetName") {
		t.Errorf("instance: got %d %s; want 200 and the field vmScaleSetName", a.status, a.raw)
	}
	a = s.curl("p", "-H", "Metadata: true", "http://169.254.169.254/metadata/instance/compute/vmScaleSetName?api-version=2021-02-01&format=text")
	if a.status != 200 || a.raw != "nodes" {
		t.Errorf("instance/compute/vmScaleSetName: got %d %s; want 200 and nodes", a.status, a.raw)
	}
	a = s.curl("p", "-H", "Metadata: true", "http://169.254.169.254/metadata/versions")
	if a.status != 200 {
		t.Errorf("versions: got %d %s; want 200", a.status, a.raw)
	}
	a = s.curl("p", "-H", "Metadata: true", "http://169.254.169.254/metadata/identity/info?api-version=2018-02-01")
	if a.status != 200 || a.body["tenantId"] == "" {
		t.Errorf("identity/info: got %d %s; want 200 and a tenantId", a.status, a.raw)
	}
}
