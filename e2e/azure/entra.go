package azure

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// entra is the fake Entra ID: its token endpoints, discovery documents and keys.
type entra struct {
	dir    *directory
	issuer *issuer
	now    func() time.Time
}

// entraError is an error with an error code of Entra ID.
type entraError struct {
	status int
	oauth  string
	code   int
	text   string
}

func (e *entraError) Error() string { return fmt.Sprintf("AADSTS%d: %s", e.code, e.text) }

// trace has the request ID and the correlation ID of a response. The real Entra ID
// has both in its logs.
type trace struct{ request, correlation string }

// newTrace uses the correlation ID of the client if it is a GUID, and otherwise
// generates one.
func newTrace(correlation string) trace {
	t := trace{request: newGUID(), correlation: correlation}
	if !isGUID(correlation) {
		t.correlation = newGUID()
	}
	return t
}

func newGUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

const entraTime = "2006-01-02 15:04:05Z"

func (e *entraError) describe(t trace, now time.Time) string {
	return fmt.Sprintf("%s Trace ID: %s Correlation ID: %s Timestamp: %s",
		e.Error(), t.request, t.correlation, now.UTC().Format(entraTime))
}

type entraErrorBody struct {
	Error         string `json:"error"`
	Description   string `json:"error_description"`
	Codes         []int  `json:"error_codes"`
	Timestamp     string `json:"timestamp"`
	TraceID       string `json:"trace_id"`
	CorrelationID string `json:"correlation_id"`
	URI           string `json:"error_uri"`
}

func (s *entra) refuse(x *requestContext, e *entraError) response {
	t, now := x.trace, s.now()
	if x.entry.Error == "" {
		x.entry.Error = e.Error()
	}
	out := jsonResponse(e.status, entraErrorBody{
		Error: e.oauth, Description: e.describe(t, now), Codes: []int{e.code},
		Timestamp: now.UTC().Format(entraTime), TraceID: t.request, CorrelationID: t.correlation,
		URI: fmt.Sprintf("https://%s/error?code=%d", x.Host, e.code),
	})
	return withTraceHeaders(x, withoutCaching(out))
}

func withoutCaching(out response) response {
	out.header = map[string]string{"Cache-Control": "no-store, no-cache"}
	return out
}

// withTraceHeaders adds the IDs of the trace to the headers of the response.
func withTraceHeaders(x *requestContext, out response) response {
	if out.header == nil {
		out.header = map[string]string{}
	}
	out.header["X-Ms-Request-Id"], out.header["Client-Request-Id"] = x.trace.request, x.trace.correlation
	return out
}

func (s *entra) fail(x *requestContext, status int) response {
	e := &entraError{status, "server_error", 90033, "A transient error has occurred. Please try again."}
	switch {
	case status == http.StatusTooManyRequests:
		e = &entraError{status, "temporarily_unavailable", 90055, "Your request is throttled temporarily. Please try after some time."}
	case status < 500:
		e = &entraError{status, "invalid_request", 90013, "Invalid input received from the user."}
	case status == http.StatusServiceUnavailable:
		e.oauth = "temporarily_unavailable"
	}
	return s.refuse(x, e)
}

// entraRoutes map the path after the tenant to the class of the request.
var entraRoutes = map[string]string{
	"oauth2/v2.0/token": classToken, "oauth2/token": classToken,
	"v2.0/.well-known/openid-configuration": "openid", ".well-known/openid-configuration": "openid",
	"discovery/v2.0/keys": "keys", "discovery/keys": "keys",
	"discovery/instance": "instance-discovery",
}

func splitTenant(r *http.Request) (tenant, rest string) {
	tenant, rest, _ = strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	return tenant, strings.TrimSuffix(rest, "/")
}

func entraClass(r *http.Request) string {
	_, rest := splitTenant(r)
	if class, ok := entraRoutes[strings.ToLower(rest)]; ok {
		return class
	}
	return "other"
}

func (s *entra) answer(x *requestContext) response { return withTraceHeaders(x, s.route(x)) }

func (s *entra) route(x *requestContext) response {
	tenant, rest := splitTenant(x.Request)
	want := http.MethodGet
	if x.class == classToken {
		want = http.MethodPost
	}
	if x.class != "other" && x.Method != want {
		return s.refuse(x, &entraError{http.StatusMethodNotAllowed, "invalid_request", 900561,
			fmt.Sprintf("The endpoint only accepts %s requests. Received a %s request.", want, x.Method)})
	}
	switch x.class {
	case "other":
		return s.refuse(x, &entraError{http.StatusNotFound, "invalid_request", 90026, "Unrecognized request path."})
	case "keys":
		return jsonResponse(200, s.issuer.jwks())
	case "instance-discovery":
		return s.instanceDiscovery(x)
	}
	if !s.dir.tenantExists(tenant) {
		return s.refuse(x, &entraError{http.StatusBadRequest, "invalid_request", 90002,
			fmt.Sprintf("Tenant '%s' not found. Check to make sure you have the correct tenant ID and are signing into the correct cloud.", tenant)})
	}
	if x.class == "openid" {
		return s.openID(x, tenant, strings.HasPrefix(rest, "v2.0/"))
	}
	return s.token(x, tenant, strings.EqualFold(rest, "oauth2/v2.0/token"))
}

// openID returns the OpenID configuration. The issuer and all endpoints have the host
// of the request, because clients refuse an issuer on another host.
func (s *entra) openID(x *requestContext, tenant string, v2 bool) response {
	base, infix, issuer := "https://"+x.Host+"/"+tenant, "", ""
	if v2 {
		infix, issuer = "/v2.0", "/v2.0"
	}
	return jsonResponse(200, map[string]any{
		"issuer":                                base + issuer,
		"token_endpoint":                        base + "/oauth2" + infix + "/token",
		"authorization_endpoint":                base + "/oauth2" + infix + "/authorize",
		"jwks_uri":                              base + "/discovery" + infix + "/keys",
		"token_endpoint_auth_methods_supported": []string{"client_secret_post", "private_key_jwt"},
		"response_types_supported":              []string{"code", "id_token"},
		"subject_types_supported":               []string{"pairwise"},
		"id_token_signing_alg_values_supported": []string{"RS256"},
		"tenant_region_scope":                   "EU",
	})
}

// instanceDiscovery returns the metadata of the host of the request, without any other
// host as an alias.
func (s *entra) instanceDiscovery(x *requestContext) response {
	u, err := url.Parse(x.URL.Query().Get("authorization_endpoint"))
	tenant := s.dir.tenant
	if err == nil {
		if first, _, ok := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/"); ok && first != "" {
			tenant = first
		}
	}
	return jsonResponse(200, map[string]any{
		"tenant_discovery_endpoint": "https://" + x.Host + "/" + tenant + "/v2.0/.well-known/openid-configuration",
		"api-version":               "1.1",
		"metadata": []any{map[string]any{
			"preferred_network": x.Host, "preferred_cache": x.Host, "aliases": []string{x.Host},
		}},
	})
}

func unknownResource(resource, tenant string) *entraError {
	return &entraError{http.StatusBadRequest, "invalid_resource", 500011, fmt.Sprintf(
		"The resource principal named %s was not found in the tenant named %s. "+
			"This can happen if the application has not been installed by the administrator of the tenant or consented to by any user in the tenant. "+
			"You might have sent your authentication request to the wrong tenant.", resource, tenant)}
}
