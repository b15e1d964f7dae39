package azure

import (
	"net/http"
	"path"
	"regexp"
	"strings"
	"sync"
	"time"
)

// ForbiddenMark is part of each response of IMDS that a pod must never receive:
// credentials of the machine, attested documents, and approvals of maintenance.
const ForbiddenMark = "fake-azure-forbidden"

const imdsServer = "IMDS/150.870.65.1103"

const (
	pathToken        = "/metadata/identity/oauth2/token"
	pathInfo         = "/metadata/identity/info"
	pathPlatform     = "/metadata/identity/getplatformmetadata"
	pathIssue        = "/metadata/identity/issuecredential"
	pathVersions     = "/metadata/versions"
	pathInstance     = "/metadata/instance"
	pathLoadBalancer = "/metadata/loadbalancer"
	pathAttested     = "/metadata/attested/document"
	pathEvents       = "/metadata/scheduledevents"
)

// imdsClasses are the names of the paths in log and stats.
var imdsClasses = map[string]string{
	pathToken: classToken, pathInfo: "info", pathPlatform: "getplatformmetadata", pathIssue: "issuecredential",
	pathVersions: "versions", pathInstance: "instance", pathLoadBalancer: "loadbalancer",
	pathAttested: "attested", pathEvents: "scheduledevents",
}

// imds is the fake IMDS. One instance serves all nodes.
type imds struct {
	dir     *directory
	issuer  *issuer
	now     func() time.Time
	mu      sync.Mutex
	cache   map[cacheKey]minted
	maxKeys int
}

// cacheKey contains the whole identity: after any change of the identity, the
// cached token is no longer used.
type cacheKey struct {
	node     string
	identity Identity
	resource string
}

func newIMDS(dir *directory, issuer *issuer, now func() time.Time) *imds {
	return &imds{dir: dir, issuer: issuer, now: now, cache: map[cacheKey]minted{}, maxKeys: 10_000}
}

// imdsPath normalizes a path like the real service. Where the behavior of the real
// service is not known, imdsPath is permissive: each path that might reach the token
// endpoint of the real service reaches it here.
func imdsPath(r *http.Request) string {
	p := path.Clean("/" + strings.ReplaceAll(r.URL.Path, `\`, "/"))
	first, rest, deeper := strings.Cut(p[1:], "/")
	if !strings.EqualFold(first, "metadata") || !deeper {
		return p
	}
	return "/metadata/" + rest
}

func imdsClass(r *http.Request) string {
	p := imdsPath(r)
	if strings.HasPrefix(p, pathInstance+"/") {
		p = pathInstance
	}
	if class, ok := imdsClasses[p]; ok {
		return class
	}
	return "other"
}

type imdsError struct {
	Error       string `json:"error"`
	Description string `json:"error_description"`
}

// refuse logs the description and returns an error response that consists of the code
// and the description.
func refuse(x *requestContext, status int, code, description string) response {
	x.entry.Error = description
	return withServerHeader(jsonResponse(status, imdsError{code, description}))
}

func withServerHeader(out response) response {
	if out.header == nil {
		out.header = map[string]string{}
	}
	out.header["Server"] = imdsServer
	return out
}

func (m *imds) fail(x *requestContext, status int) response {
	code := "server_error"
	switch {
	case status == http.StatusTooManyRequests:
		code = "too_many_requests"
	case status == http.StatusNotFound || status == http.StatusGone:
		code = "not_found"
	case status == http.StatusForbidden:
		code = "forbidden"
	case status == http.StatusServiceUnavailable:
		code = "service_unavailable"
	case status < 500:
		code = "invalid_request"
	}
	return withServerHeader(jsonResponse(status, imdsError{code, http.StatusText(status)}))
}

// badInstanceRequest logs the text and returns it with status 400, in the format that
// IMDS uses for this status outside of /metadata/identity.
func badInstanceRequest(x *requestContext, text string) response {
	x.entry.Error = text
	return withServerHeader(jsonResponse(http.StatusBadRequest, map[string]string{"error": "Bad request. " + text}))
}

func (m *imds) answer(x *requestContext) response {
	p := imdsPath(x.Request)
	identityPath := strings.HasPrefix(p, "/metadata/identity/")
	bad := badInstanceRequest
	if identityPath {
		bad = func(x *requestContext, text string) response { return refuse(x, 400, "invalid_request", text) }
	}
	if !strings.EqualFold(x.Header.Get("Metadata"), "true") {
		return bad(x, "Required metadata header not specified")
	}
	if _, ok := x.Header["X-Forwarded-For"]; ok {
		return bad(x, "X-Forwarded-For header is not allowed")
	}
	if x.caller.node == "" {
		return refuse(x, http.StatusUnauthorized, "unknown_source", "Unknown Source "+x.caller.source.String())
	}
	q, err := parseQuery(x.URL.RawQuery)
	if err != nil {
		return bad(x, err.Error())
	}
	if !allowedMethod(p, x.Method) {
		return refuse(x, http.StatusMethodNotAllowed, "method_not_allowed", "Method not allowed")
	}
	if v := q["api-version"]; x.class != "other" && p != pathVersions && !(p == pathPlatform || p == pathIssue) && !knownVersion(v) {
		return m.badVersion(x)
	}
	return m.route(x, p, q)
}

func allowedMethod(p, method string) bool {
	switch p {
	case pathEvents:
		return method == http.MethodGet || method == http.MethodPost
	case pathIssue:
		return method == http.MethodPost
	}
	return method == http.MethodGet
}

func (m *imds) route(x *requestContext, p string, q map[string]string) response {
	n, _ := m.dir.node(x.caller.node)
	switch x.class {
	case classToken:
		return m.token(x, q)
	case "info":
		return withServerHeader(jsonResponse(200, map[string]string{"tenantId": m.dir.tenant}))
	case "instance":
		return m.instance(x, n, strings.TrimPrefix(p, pathInstance), q["format"])
	case "versions":
		return withServerHeader(jsonResponse(200, map[string][]string{"apiVersions": apiVersions}))
	case "loadbalancer":
		return withServerHeader(jsonResponse(200, loadBalancer))
	case "scheduledevents":
		if x.Method == http.MethodPost {
			x.entry.Error = ForbiddenMark
			return withServerHeader(response{status: 200, contentType: "text/plain", body: []byte(ForbiddenMark + ": maintenance approved")})
		}
		return withServerHeader(jsonResponse(200, map[string]any{"DocumentIncarnation": 1, "Events": []any{}}))
	case "attested", "getplatformmetadata", "issuecredential":
		return m.forbiddenRoute(x, n)
	}
	return refuse(x, http.StatusNotFound, "not_found", "Not found")
}

// forbiddenRoute returns responses that no pod may receive, with ForbiddenMark.
func (m *imds) forbiddenRoute(x *requestContext, n Node) response {
	x.entry.Error = ForbiddenMark
	switch x.class {
	case "attested":
		return withServerHeader(jsonResponse(200, map[string]string{"encoding": "pkcs7", "signature": ForbiddenMark + "-" + n.Name}))
	case "getplatformmetadata":
		return withServerHeader(jsonResponse(200, map[string]any{
			"cuId": map[string]string{"vmId": ForbiddenMark}, "clientId": ForbiddenMark,
			"tenantId": m.dir.tenant, "attestationEndpoint": "https://" + ForbiddenMark + ".invalid",
		}))
	}
	return withServerHeader(jsonResponse(200, map[string]string{
		"client_id": ForbiddenMark, "tenant_id": m.dir.tenant, "certificate": ForbiddenMark,
		"identity_type": "SystemAssigned", "mtls_authentication_endpoint": "https://" + ForbiddenMark + ".invalid",
	}))
}

var versionForm = regexp.MustCompile(`^\d{4}-\d{2}-\d{2}$`)

const firstVersion = "2018-02-01" // the first with /metadata/identity

// knownVersion reports whether v has the form of a date and is not before firstVersion.
// In this form, dates sorted as text are in the order of time.
func knownVersion(v string) bool { return versionForm.MatchString(v) && v >= firstVersion }

func (m *imds) badVersion(x *requestContext) response {
	x.entry.Error = "api-version is invalid or was not specified"
	return withServerHeader(jsonResponse(http.StatusBadRequest, struct {
		Error    string   `json:"error"`
		Versions []string `json:"newest-versions"`
	}{
		"Bad request. api-version is invalid or was not specified in the request. For more information refer to aka.ms/azureimds",
		apiVersions[len(apiVersions)-3:],
	}))
}
