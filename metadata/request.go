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

// Request is a request as far as it is understood. Nothing of the client's own text is left in it but what the route
// has a use for.
type Request struct {
	Route Route
	// Field is what comes after /metadata/instance, in the client's case: "" or "/compute/name".
	Field string
	// Resource is the audience the token is for, as the client wrote it.
	Resource string
	// Selector is the identity the client asks for.
	Selector identity.Selector
	// Bypass asks for a token that is not from a cache.
	Bypass bool
	// Rejected is the SHA-256, in hex, of a token the client wants replaced; empty as a rule.
	Rejected string
	// PodNamespace and PodName are whom the node itself asks for; see ParseHostToken.
	PodNamespace, PodName string
	// APIVersion and Format are passed on to the real service for descriptions of the machine.
	APIVersion, Format string
}

// Rules of the parser.
type Rules struct {
	// HeaderOptional serves requests without "Metadata: true". Never wanted: it lets a forged request through that
	// cannot set headers. The predecessor had the switch.
	HeaderOptional bool
}

// Limits of a query. The longest real one has a resource ID and a resource URL.
const (
	maxQuery      = 8 << 10
	maxParameters = 32
	maxValue      = 2048
)

// oldestVersion is the first version of the service that knew identities, and the one that every client library sends.
const oldestVersion = "2018-02-01"

// Parse reads a request, or says how IMDS refuses it. The Request is filled as far as parsing came also when it is
// refused, so that its Route can be logged.
//
// The order is: the path, because what is not there has to look absent even to a request without the header; the
// header, before anything that could cost something; the method; the parameters.
func Parse(r *http.Request, rules Rules) (Request, *Error) {
	req := Request{Route: RouteUnknown}
	rawPath, rawQuery := split(r)
	path, err := normalise(rawPath)
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
	// A forwarded request comes from somebody else than the pod that seems to send it. Even an empty header says so.
	if _, forwarded := r.Header["X-Forwarded-For"]; forwarded {
		return req, &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: "Requests with an X-Forwarded-For header are not served", Reason: identity.Forwarded}
	}
	if !rules.HeaderOptional && !hasMetadataHeader(r.Header) {
		return req, &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: textHeader, Reason: identity.HeaderMissing}
	}
	switch req.Route {
	case RouteAttested:
		return req, Forbidden(identity.RouteBlocked, "Attested documents prove to be the machine; they are not given to pods")
	case RouteScheduledEvents:
		return req, Forbidden(identity.RouteBlocked, "Scheduled events belong to the machine; they are not open to pods")
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
		return req, malformed("api-version must be a date and format one of json and text")
	}
	return req, nil
}

func malformed(problem string) *Error {
	return &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: problem, Reason: identity.RequestMalformed}
}

// split returns path and query as the client sent them, undecoded. A request line may hold a whole URL, as a client
// with a proxy sends it; scheme and host of such a one decide nothing.
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

// hasMetadataHeader wants every Metadata header to be "true", whatever its case: two that differ are no consent.
func hasMetadataHeader(h http.Header) bool {
	values := h["Metadata"]
	for _, v := range values {
		if !strings.EqualFold(strings.TrimSpace(v), "true") {
			return false
		}
	}
	return len(values) > 0
}

// parameter is one of a query, its name in lower case.
type parameter struct{ name, value string }

type parameterList []parameter

// get returns the value, or "" if there is none.
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

// parameters decodes a query. Names compare without case, as the real service's do, and none may come twice: two
// readers could pick two different values.
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
			return nil, "a parameter is given more than once"
		}
		values = append(values, parameter{name, value})
	}
	return values, ""
}

// printable wants UTF-8 without control characters: the value may end up in a log, in an answer and in another query.
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
			Description: "api-version is invalid or was not specified in the request; write api-version=" + oldestVersion}
	}
	return parseWhatToken(req, values)
}

// parseWhatToken reads the parameters that say which token is wanted.
func parseWhatToken(req Request, values parameterList) (Request, *Error) {
	req.Resource = values.get("resource")
	if req.Resource == "" {
		return req, &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: textNoResource, Reason: identity.ResourceMissing}
	}
	// The documentation has msi_res_id; some clients send mi_res_id. An empty selector is none: old clients send one.
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
		return req, malformed("client_id, object_id and msi_res_id exclude each other")
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
