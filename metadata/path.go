package metadata

import (
	"errors"
	"strings"
)

// Route is the kind of resource that a request is for. The list is closed, so a Route can be a metric label.
type Route string

const (
	// RouteToken is a token: /metadata/identity/oauth2/token.
	RouteToken Route = "token"
	// RouteInfo is the tenant: /metadata/identity/info.
	RouteInfo Route = "info"
	// RouteInstance is the description of the VM or a part of it: /metadata/instance/...
	RouteInstance Route = "instance"
	// RouteVersions is the list of API versions: /metadata/versions.
	RouteVersions Route = "versions"
	// RouteLoadBalancer is the description of the VM's load balancer: /metadata/loadbalancer.
	RouteLoadBalancer Route = "loadbalancer"
	// RouteAttested is a document that proves that its owner is the VM: /metadata/attested/... Always refused.
	RouteAttested Route = "attested"
	// RouteScheduledEvents shows the maintenance of the VM and, by POST, approves it. Always refused.
	RouteScheduledEvents Route = "scheduledevents"
	// RouteHostToken is a token that a program of the node requests on behalf of a pod: /host/token. See ParseHostToken.
	RouteHostToken Route = "host_token"
	// RouteUnknown is everything else, including all other paths below /metadata/identity. Some of those return
	// credentials of the VM itself (getplatformmetadata, issuecredential).
	RouteUnknown Route = "unknown"
)

var errPath = errors.New("the path of the request is not well-formed")

// maxPath bounds the path, in bytes. The paths in the documentation of IMDS have fewer than 200.
const maxPath = 1024

// normalize decodes a raw request path once and returns it in the form that is compared with the list of routes: "/"
// between segments, no empty segment, no trailing slash.
//
// IMDS reads "\" as "/" and ignores the case of "/metadata"; old clients send "//" and a trailing slash. Those are
// accepted. Forms that no client needs are refused instead of interpreted: encoded separators, dot segments in any
// encoding, double encoding, control characters, bytes beyond ASCII. Without these forms, two parsers cannot disagree
// about a path.
func normalize(raw string) (string, error) {
	if len(raw) > maxPath || raw == "" || (raw[0] != '/' && raw[0] != '\\') {
		return "", errPath
	}
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); i++ {
		c, encoded := raw[i], false
		if c == '%' {
			if i+2 >= len(raw) {
				return "", errPath
			}
			hi, okHi := unhex(raw[i+1])
			lo, okLo := unhex(raw[i+2])
			if !okHi || !okLo {
				return "", errPath
			}
			c, encoded, i = hi<<4|lo, true, i+2
		}
		switch {
		case encoded && (c == '/' || c == '\\' || c == '%'):
			return "", errPath
		case c < 0x20 || c >= 0x7f:
			return "", errPath
		case c == '\\':
			c = '/'
		}
		if c == '/' && len(out) > 0 && out[len(out)-1] == '/' {
			continue
		}
		out = append(out, c)
	}
	path := strings.TrimSuffix(string(out), "/")
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "." || segment == ".." {
			return "", errPath
		}
	}
	return path, nil
}

func unhex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// classify compares a normalized path with the list of routes. It ignores case.
func classify(path string) Route {
	path = strings.ToLower(path)
	switch path {
	case "/metadata/identity/oauth2/token":
		return RouteToken
	case "/metadata/identity/info":
		return RouteInfo
	case "/metadata/versions":
		return RouteVersions
	case "/metadata/loadbalancer":
		return RouteLoadBalancer
	case "/metadata/instance":
		return RouteInstance
	}
	switch {
	case strings.HasPrefix(path, "/metadata/instance/"):
		if plainSegments(path) {
			return RouteInstance
		}
	case path == "/metadata/attested" || strings.HasPrefix(path, "/metadata/attested/"):
		return RouteAttested
	case path == "/metadata/scheduledevents" || strings.HasPrefix(path, "/metadata/scheduledevents/"):
		return RouteScheduledEvents
	}
	return RouteUnknown
}

// plainSegments reports whether a path below /metadata/instance consists only of the characters of field names and list
// indexes. Such a path becomes part of a request to IMDS.
func plainSegments(path string) bool {
	for i := range len(path) {
		c := path[i]
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '/' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}
