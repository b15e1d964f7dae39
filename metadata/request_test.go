package metadata

import (
	"bufio"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/podidentity/podidentity/identity"
)

const tokenPath = "/metadata/identity/oauth2/token"

// request parses the text of a request like Go's HTTP server. It returns nil for a request that Go's server refuses, so
// that Parse never receives it.
func request(t testing.TB, target string, headers ...string) *http.Request {
	t.Helper()
	text := target
	if !strings.Contains(target, " ") {
		text = "GET " + target
	}
	text += " HTTP/1.1\r\nHost: 169.254.169.254\r\n" + strings.Join(headers, "\r\n")
	if len(headers) > 0 {
		text += "\r\n"
	}
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text + "\r\n")))
	if err != nil {
		return nil
	}
	return r
}

const good = tokenPath + "?api-version=2018-02-01&resource=https://vault.azure.net"

func TestValidRequestsAreParsed(t *testing.T) {
	plain := Request{Route: RouteToken, Resource: "https://vault.azure.net", APIVersion: "2018-02-01"}
	with := func(change func(*Request)) Request { r := plain; change(&r); return r }
	cases := []struct {
		name, target, header string
		want                 Request
	}{
		{"plain", good, "Metadata: true", plain},
		{"the value of the header ignores case", good, "Metadata: True", plain},
		{"trailing slash", strings.Replace(good, "token?", "token/?", 1), "Metadata: true", plain},
		{"two slashes in front", "/" + good, "Metadata: true", plain},
		{"upper case", strings.Replace(good, "/metadata/", "/Metadata/", 1), "Metadata: true", plain},
		{"backslashes", strings.Replace(good, "identity/oauth2/", `identity\oauth2\`, 1), "Metadata: true", plain},
		{"encoded letters", strings.Replace(good, "token", "%74oken", 1), "Metadata: true", plain},
		{"a whole URL, as sent to a proxy", "http://169.254.169.254" + good, "Metadata: true", plain},
		{"resource stays as it is", tokenPath + "?api-version=2018-02-01&resource=https%3A%2F%2Fmanagement.core.windows.net%2F%2F", "Metadata: true", with(func(r *Request) { r.Resource = "https://management.core.windows.net//" })},
		{"client_id", good + "&client_id=abc", "Metadata: true", with(func(r *Request) { r.Selector.ClientID = "abc" })},
		{"object_id", good + "&object_id=abc", "Metadata: true", with(func(r *Request) { r.Selector.ObjectID = "abc" })},
		{"msi_res_id", good + "&msi_res_id=%2Fsub", "Metadata: true", with(func(r *Request) { r.Selector.ResourceID = "/sub" })},
		{"mi_res_id", good + "&mi_res_id=/sub", "Metadata: true", with(func(r *Request) { r.Selector.ResourceID = "/sub" })},
		{"an empty selector is none", good + "&client_id=&object_id=x", "Metadata: true", with(func(r *Request) { r.Selector.ObjectID = "x" })},
		{"bypass_cache", good + "&bypass_cache=true", "Metadata: true", with(func(r *Request) { r.Bypass = true })},
		{"token_sha256_to_refresh", good + "&token_sha256_to_refresh=00ff", "Metadata: true", with(func(r *Request) { r.Rejected = "00ff" })},
		{"what is unknown is ignored", good + "&authority=https://evil.example&principal_id=x&msi-res-id=y", "Metadata: true", plain},
		{"instance", "/metadata/instance?api-version=2021-02-01", "Metadata: true", Request{Route: RouteInstance, APIVersion: "2021-02-01"}},
		{"a field of instance, in its own case", "/metadata/instance/compute/vmScaleSetName?api-version=2021-02-01&format=text", "Metadata: true", Request{Route: RouteInstance, Field: "/compute/vmScaleSetName", APIVersion: "2021-02-01", Format: "text"}},
		{"versions", "/metadata/versions", "Metadata: true", Request{Route: RouteVersions}},
		{"load balancer", "/metadata/loadbalancer?api-version=2020-10-01", "Metadata: true", Request{Route: RouteLoadBalancer, APIVersion: "2020-10-01"}},
		{"info", "/metadata/identity/info?api-version=2018-02-01", "Metadata: true", Request{Route: RouteInfo, APIVersion: "2018-02-01"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, refusal := Parse(request(t, c.target, c.header), Rules{})
			if refusal != nil || got != c.want {
				t.Errorf("got %+v, %v; want %+v", got, refusal, c.want)
			}
		})
	}
}

// invalidRequests are requests with the status and the reason of their refusal.
var invalidRequests = []struct {
	name, target string
	headers      []string
	status       int
	reason       identity.Reason
}{
	{"no header", good, nil, 400, identity.HeaderMissing},
	{"no header, no query, as clients probe", tokenPath, nil, 400, identity.HeaderMissing},
	{"header false", good, []string{"Metadata: false"}, 400, identity.HeaderMissing},
	{"header given twice, with two values", good, []string{"Metadata: true", "Metadata: false"}, 400, identity.HeaderMissing},
	{"header with more in it", good, []string{"Metadata: true, false"}, 400, identity.HeaderMissing},
	{"no header comes before a bad query", tokenPath + "?%zz", nil, 400, identity.HeaderMissing},
	{"forwarded", good, []string{"Metadata: true", "X-Forwarded-For: 10.0.0.1"}, 400, identity.Forwarded},
	{"forwarded, empty", good, []string{"Metadata: true", "x-forwarded-for:"}, 400, identity.Forwarded},
	{"POST", "POST " + good, []string{"Metadata: true"}, 405, identity.MethodNotAllowed},
	{"HEAD", "HEAD " + good, []string{"Metadata: true"}, 405, identity.MethodNotAllowed},
	{"resource given twice", good + "&resource=https://other", []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"resource given twice, in another case", good + "&Resource=https://other", []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"an unknown parameter given twice", good + "&a=1&a=1", []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"two selectors", good + "&client_id=a&msi_res_id=b", []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"both names of the resource id", good + "&mi_res_id=a&msi_res_id=a", []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"bad escape", good + "&client_id=%zz", []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"line break in a value", good + "&client_id=a%0d%0ab", []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"not UTF-8", good + "&client_id=%ff", []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"too many parameters", good + strings.Repeat("&", 3) + manyParameters(40), []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"too long a value", good + "&client_id=" + strings.Repeat("a", maxValue+1), []string{"Metadata: true"}, 400, identity.RequestMalformed},
	{"no api-version", tokenPath + "?resource=r", []string{"Metadata: true"}, 400, identity.APIVersion},
	{"an api-version before identities", tokenPath + "?api-version=2017-12-01&resource=r", []string{"Metadata: true"}, 400, identity.APIVersion},
	{"an api-version that is no date", tokenPath + "?api-version=9999-99-99&resource=r", []string{"Metadata: true"}, 400, identity.APIVersion},
	{"no resource", tokenPath + "?api-version=2018-02-01", []string{"Metadata: true"}, 400, identity.ResourceMissing},
	{"an empty resource", tokenPath + "?api-version=2018-02-01&resource=", []string{"Metadata: true"}, 400, identity.ResourceMissing},

	{"credentials of the machine", "/metadata/identity/getplatformmetadata?cred-api-version=2.0", nil, 404, identity.PathUnknown},
	{"credentials of the machine, with header", "/metadata/identity/getplatformmetadata?cred-api-version=2.0", []string{"Metadata: true"}, 404, identity.PathUnknown},
	{"a certificate of the machine", "POST /metadata/identity/issuecredential?cred-api-version=2.0", []string{"Metadata: true"}, 404, identity.PathUnknown},
	{"more after the token path", tokenPath + "/x?api-version=2018-02-01&resource=r", []string{"Metadata: true"}, 404, identity.PathUnknown},
	{"more joined to the token path", tokenPath + "x", []string{"Metadata: true"}, 404, identity.PathUnknown},
	{"path parameters", "/metadata/identity/oauth2/token;x=y?api-version=2018-02-01&resource=r", []string{"Metadata: true"}, 404, identity.PathUnknown},
	{"another service", "/machine/plugins", []string{"Metadata: true"}, 404, identity.PathUnknown},
	{"the root", "/", []string{"Metadata: true"}, 404, identity.PathUnknown},
	{"attested document", "/metadata/attested/document?api-version=2020-09-01", []string{"Metadata: true"}, 403, identity.RouteBlocked},
	{"scheduled events", "/metadata/scheduledevents?api-version=2020-07-01", []string{"Metadata: true"}, 403, identity.RouteBlocked},
	{"approving scheduled events", "POST /metadata/scheduledevents?api-version=2020-07-01", []string{"Metadata: true"}, 403, identity.RouteBlocked},

	{"encoded slash", "/metadata/identity%2foauth2%2ftoken", []string{"Metadata: true"}, 400, identity.PathRefused},
	{"encoded backslash", "/metadata/identity%5coauth2%5ctoken", []string{"Metadata: true"}, 400, identity.PathRefused},
	{"twice encoded", "/metadata/identity%252foauth2/token", []string{"Metadata: true"}, 400, identity.PathRefused},
	{"dot segments", "/metadata/instance/../identity/oauth2/token", []string{"Metadata: true"}, 400, identity.PathRefused},
	{"dot segments with backslashes", `/metadata/instance/..\identity/oauth2/token`, []string{"Metadata: true"}, 400, identity.PathRefused},
	{"encoded dot segments", "/metadata/instance/%2e%2e/identity/oauth2/token", []string{"Metadata: true"}, 400, identity.PathRefused},
	{"one dot", "/metadata/./identity/oauth2/token", []string{"Metadata: true"}, 400, identity.PathRefused},
	{"NUL", "/metadata/identity/oauth2/token%00", []string{"Metadata: true"}, 400, identity.PathRefused},
	{"beyond ASCII", "/metadata/identity/oauth2/tok%c3%a9n", []string{"Metadata: true"}, 400, identity.PathRefused},
	{"odd characters behind instance", "/metadata/instance/compute%3fx", []string{"Metadata: true"}, 404, identity.PathUnknown},
	{"no path at all", "OPTIONS *", []string{"Metadata: true"}, 400, identity.PathRefused},
}

func TestInvalidRequestsAreRefused(t *testing.T) {
	for _, c := range invalidRequests {
		t.Run(c.name, func(t *testing.T) {
			r := request(t, c.target, c.headers...)
			if r == nil {
				t.Fatal("Go's server refuses this by itself; the case tests nothing")
			}
			got, refusal := Parse(r, Rules{})
			if refusal == nil {
				t.Fatalf("served as %+v", got)
			}
			if refusal.Status != c.status || refusal.Reason != c.reason {
				t.Errorf("got %v; want %d %s", refusal, c.status, c.reason)
			}
			if refusal.Reason == identity.HeaderMissing && refusal.Description != textHeader {
				t.Errorf("clients look for %q, got %q", textHeader, refusal.Description)
			}
		})
	}
}

func manyParameters(n int) string {
	v := url.Values{}
	for i := range n {
		v.Set("p"+string(rune('a'+i)), "1")
	}
	return v.Encode()
}

func TestAnOptionalMetadataHeaderMayBeMissing(t *testing.T) {
	got, refusal := Parse(request(t, good), Rules{HeaderOptional: true})
	if refusal != nil || got.Resource == "" {
		t.Errorf("got %+v, %v", got, refusal)
	}
}

func FuzzPath(f *testing.F) {
	for _, s := range []string{tokenPath, "//metadata//identity/oauth2/token/", `/metadata\identity\oauth2/token`, "/metadata/identity%2foauth2", "/metadata/instance/%2e%2e/identity", "/a/./b", "/%00", "%2f", "/metadata/instance/compute/name"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		path, err := normalize(raw)
		if err != nil {
			if path != "" {
				t.Fatalf("%q: an error and a path %q", raw, path)
			}
			return
		}
		if strings.ContainsAny(path, "\\\x00\r\n") || strings.Contains(path, "//") || strings.HasSuffix(path, "/") {
			t.Fatalf("%q is normalized to %q, which is not in normal form", raw, path)
		}
		for segment := range strings.SplitSeq(path, "/") {
			if segment == "." || segment == ".." {
				t.Fatalf("%q is normalized to %q, which has dot segments", raw, path)
			}
		}
		if path != "" && !strings.Contains(path, "%") {
			again, err := normalize(path)
			if err != nil || again != path {
				t.Fatalf("%q is normalized to %q, and that to %q, %v", raw, path, again, err)
			}
		}
		// classify returns RouteToken for the token path in any letter case, and for no other path.
		if (classify(path) == RouteToken) != strings.EqualFold(path, tokenPath) {
			t.Fatalf("%q is classified %s", path, classify(path))
		}
	})
}

func FuzzParseRequest(f *testing.F) {
	f.Add("GET "+good, "true", false)
	f.Add("GET "+good+"&client_id=a&object_id=b", "true", true)
	f.Add("POST "+tokenPath+"?a=%00", "True", false)
	f.Add("GET http://h/metadata/instance?api-version=2021-02-01&format=text", "true", false)
	f.Add("GET /metadata/instance/compute/%2e%2e?format=xml", "true", false)
	f.Fuzz(func(t *testing.T, line, header string, forwarded bool) {
		if strings.ContainsAny(line+header, "\r\n") {
			return
		}
		headers := []string{"Metadata: " + header}
		if forwarded {
			headers = append(headers, "X-Forwarded-For: 1.2.3.4")
		}
		r := request(t, line, headers...)
		if r == nil {
			return
		}
		req, refusal := Parse(r, Rules{})
		if refusal != nil {
			w := httptest.NewRecorder()
			refusal.Write(w)
			if w.Code < 400 || w.Code > 499 || !strings.HasPrefix(w.Body.String(), `{"error":"`) {
				t.Fatalf("refused with %d %s", w.Code, w.Body)
			}
			return
		}
		if r.Method != http.MethodGet || forwarded || !strings.EqualFold(strings.TrimSpace(header), "true") {
			t.Fatalf("served: %s %q forwarded %v as %+v", r.Method, header, forwarded, req)
		}
		for _, s := range []string{req.Resource, req.Selector.ClientID, req.Selector.ObjectID, req.Selector.ResourceID, req.Rejected} {
			if !printable(s) {
				t.Fatalf("the parsed request contains %q, which is not printable", s)
			}
		}
		switch req.Route {
		case RouteToken:
			if req.Resource == "" || req.APIVersion < oldestVersion {
				t.Fatalf("a token request without a resource, or with an old api-version, is served: %+v", req)
			}
		case RouteInstance, RouteVersions, RouteLoadBalancer, RouteInfo:
			u := req.upstreamURL()
			back, err := url.ParseRequestURI(u.RequestURI())
			if err != nil || strings.HasPrefix(strings.ToLower(back.Path), "/metadata/identity") != (req.Route == RouteInfo) || strings.Contains(u.RequestURI(), "..") {
				t.Fatalf("%+v is forwarded to %s", req, u)
			}
		default:
			t.Fatalf("served: %+v", req)
		}
	})
}
