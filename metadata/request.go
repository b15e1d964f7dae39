package metadata

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/podidentity/podidentity/identity"
)

// Request is a parsed request. No other text of the client is logged or passed on to IMDS or Entra ID.
type Request struct {
	Route Route
	// Field is the path after /metadata/instance, in the client's letter case: "" or "/compute/name".
	Field string
	// Resource is the audience the token is for, as the client wrote it.
	Resource string
	// Selector is the identity that the client requests.
	Selector identity.Selector
	// Bypass requests a token that is not from a cache.
	Bypass bool
	// Rejected is the SHA-256, in hexadecimal, of a token that the client does not accept; usually empty.
	Rejected string
	// PodNamespace and PodName identify the pod that a program of the node requests the token for; see ParseHostToken.
	PodNamespace, PodName string
	// APIVersion and Format are passed on to IMDS for descriptions of the VM.
	APIVersion, Format string
}

// Rules are the settings of the parser.
type Rules struct {
	// HeaderOptional serves requests without "Metadata: true". Do not use it if you can avoid it: it also serves a forged
	// request whose author cannot set headers (SSRF). It exists because AAD Pod Identity has it.
	HeaderOptional bool
}

// Limits of a query. The longest legitimate query has a resource ID and a resource URL.
const (
	maxQuery      = 8 << 10
	maxParameters = 32
	maxValue      = 2048
)

// oldestVersion is the first API version of IMDS with identities. Client libraries send it.
const oldestVersion = "2018-02-01"

// Parse parses a request, or returns the error response. For a refused request it also returns what it has parsed so
// far, so that the Route can be logged.
//
// The order of checks is: the path, because an unknown path is "not found" also for a request without the Metadata
// header; the headers X-Forwarded-For and Metadata, before anything expensive; the routes that are always refused; the
// method; the parameters.
func Parse(r *http.Request, rules Rules) (Request, *Error) {
	req := Request{Route: RouteUnknown}
	rawPath, rawQuery := split(r)
	path, err := normalize(rawPath)
	if err != nil {
		return req, &Error{Status: http.StatusBadRequest, Code: codeBadRequest, Description: "Invalid request path", Reason: identity.PathRefused}
	}
	req.Route = classify(path)
	if req.Route == RouteInstance {
		req.Field = path[len(instancePath):]
	}
	if req.Route == RouteUnknown {
		return req, &Error{Status: http.StatusNotFound, Code: codeNotFound, Description: "No such endpoint", Reason: identity.PathUnknown}
	}
	// A request with this header comes from a proxy, on behalf of someone other than the pod in which the proxy runs.
	// An empty header means the same.
	if _, forwarded := r.Header["X-Forwarded-For"]; forwarded {
		return req, &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: "Requests with an X-Forwarded-For header are not served", Reason: identity.Forwarded}
	}
	if !rules.HeaderOptional && !hasMetadataHeader(r.Header) {
		return req, &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: textHeader, Reason: identity.HeaderMissing}
	}
	switch req.Route {
	case RouteAttested:
		return req, Forbidden(identity.RouteBlocked, "Attested documents prove the identity of the VM; pods do not get them")
	case RouteScheduledEvents:
		return req, Forbidden(identity.RouteBlocked, "Scheduled events belong to the VM; pods have no access to them")
	}
	if r.Method != http.MethodGet {
		return req, &Error{Status: http.StatusMethodNotAllowed, Code: codeMethod, Description: "Only GET is allowed", Reason: identity.MethodNotAllowed}
	}
	values, problem := parameters(rawQuery)
	if problem != "" {
		return req, malformed(problem)
	}
	req.APIVersion, req.Format = values.get("api-version"), values.get("format")
	if req.Route == RouteToken {
		return parseToken(req, values)
	}
	if req.APIVersion != "" && !isDate(req.APIVersion) || req.Format != "" && req.Format != "json" && req.Format != "text" {
		return req, malformed("api-version must be a date such as 2021-02-01, and format must be json or text")
	}
	return req, nil
}

func malformed(problem string) *Error {
	return &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: problem, Reason: identity.RequestMalformed}
}

// split returns path and query as the client sent them, not decoded. The request line may contain a whole URL, as
// clients send it to a proxy; its scheme and host are ignored.
func split(r *http.Request) (path, query string) {
	raw := r.RequestURI
	if len(raw) > 7 && strings.EqualFold(raw[:7], "http://") {
		raw = raw[7:]
		if i := strings.IndexAny(raw, "/\\?"); i >= 0 {
			raw = raw[i:]
		} else {
			raw = "/"
		}
	}
	path, query, _ = strings.Cut(raw, "?")
	return path, query
}

// hasMetadataHeader reports whether there is a Metadata header and the value of each such header is "true", in any
// letter case.
func hasMetadataHeader(h http.Header) bool {
	values := h["Metadata"]
	for _, v := range values {
		if !strings.EqualFold(strings.TrimSpace(v), "true") {
			return false
		}
	}
	return len(values) > 0
}

// parameter is a query parameter, with its name in lower case.
type parameter struct{ name, value string }

type parameterList []parameter

func (l parameterList) get(name string) string {
	for _, p := range l {
		if p.name == name {
			return p.value
		}
	}
	return ""
}

func (l parameterList) has(name string) bool {
	return slices.ContainsFunc(l, func(p parameter) bool { return p.name == name })
}

// parameters decodes a query. The second result describes the problem of an invalid query; it is "" for a valid one.
// As in IMDS, the case of names is ignored. A repeated name is a problem, because two parsers could pick two different
// values.
func parameters(raw string) (parameterList, string) {
	if len(raw) > maxQuery {
		return nil, fmt.Sprintf("the query is longer than %d bytes", maxQuery)
	}
	values := make(parameterList, 0, 6)
	for pair := range strings.SplitSeq(raw, "&") {
		if pair == "" {
			continue
		}
		if len(values) == maxParameters {
			return nil, fmt.Sprintf("the query has more than %d parameters", maxParameters)
		}
		k, v, _ := strings.Cut(pair, "=")
		name, err := url.QueryUnescape(k)
		if err != nil {
			return nil, "the name of a parameter is not well-formed"
		}
		value, err := url.QueryUnescape(v)
		if err != nil || !printable(value) {
			return nil, "the value of a parameter is not well-formed"
		}
		if len(value) > maxValue {
			return nil, fmt.Sprintf("the value of a parameter is longer than %d bytes", maxValue)
		}
		name = strings.ToLower(name)
		if values.has(name) {
			return nil, "a parameter is present more than once"
		}
		values = append(values, parameter{name, value})
	}
	return values, ""
}

// printable reports whether s is UTF-8 without the control characters of ASCII. A value can become part of a log line,
// a response or another query.
func printable(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] == 0x7f {
			return false
		}
	}
	return utf8.ValidString(s)
}

func parseToken(req Request, values parameterList) (Request, *Error) {
	if !isDate(req.APIVersion) || req.APIVersion < oldestVersion {
		return req, &Error{Status: http.StatusBadRequest, Code: codeInvalid, Reason: identity.APIVersion,
			Description: "api-version is invalid or was not specified in the request; use api-version=" + oldestVersion}
	}
	return parseTokenParameters(req, values)
}

// parseTokenParameters reads the parameters that say which token the client requests.
func parseTokenParameters(req Request, values parameterList) (Request, *Error) {
	req.Resource = values.get("resource")
	if req.Resource == "" {
		return req, &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: textNoResource, Reason: identity.ResourceMissing}
	}
	// The documentation has msi_res_id, but some clients send mi_res_id. Old clients send empty selectors, which are
	// ignored.
	given := 0
	for _, p := range values {
		if p.value == "" {
			continue
		}
		switch p.name {
		case "client_id":
			req.Selector.ClientID = p.value
		case "object_id":
			req.Selector.ObjectID = p.value
		case "msi_res_id", "mi_res_id":
			req.Selector.ResourceID = p.value
		default:
			continue
		}
		given++
	}
	if given > 1 {
		req.Selector = identity.Selector{}
		return req, malformed("only one of client_id, object_id and msi_res_id may be present")
	}
	req.Bypass = strings.EqualFold(values.get("bypass_cache"), "true")
	req.Rejected = values.get("token_sha256_to_refresh")
	return req, nil
}

func isDate(s string) bool {
	if len(s) != len(time.DateOnly) {
		return false
	}
	_, err := time.Parse(time.DateOnly, s)
	return err == nil
}
