package metadata

import (
	"errors"
	"strings"
)

// Route is what a request is for: the closed list of things that are answered, and of things that are refused in a
// way of their own. It is fit to be a metric label.
type Route string

const (
	// RouteToken asks for a token: /metadata/identity/oauth2/token.
	RouteToken Route = "token"
	// RouteInfo asks for the tenant: /metadata/identity/info.
	RouteInfo Route = "info"
	// RouteInstance asks for the description of the machine or a part of it: /metadata/instance/...
	RouteInstance Route = "instance"
	// RouteVersions lists the versions of the service: /metadata/versions.
	RouteVersions Route = "versions"
	// RouteLoadBalancer describes the machine's load balancer: /metadata/loadbalancer.
	RouteLoadBalancer Route = "loadbalancer"
	// RouteAttested would hand out proof of being the machine: /metadata/attested/... Never answered.
	RouteAttested Route = "attested"
	// RouteScheduledEvents shows the machine's maintenance and, by POST, approves it. Never answered.
	RouteScheduledEvents Route = "scheduledevents"
	// RouteHostToken asks for a token on behalf of a pod, from the node itself: /host/token. See ParseHostToken.
	RouteHostToken Route = "host_token"
	// RouteUnknown is everything else, among it all other paths below /metadata/identity, some of which hand out
	// credentials of the machine itself (getplatformmetadata, issuecredential).
	RouteUnknown Route = "unknown"
)

var errPath = errors.New("the path of the request is not well-formed")

// maxPath bounds the path; the longest real one has fewer than 200 bytes.
const maxPath = 1024

// normalise decodes a raw request path once and brings it into the one form that is compared with the list of routes:
// "/" between segments, no empty segment, no trailing slash.
//
// The real service reads "\" as "/" and ignores the case of "/metadata"; old clients send "//" and a trailing slash.
// Those are understood. What has no honest use is refused instead of interpreted: an encoded separator, dot segments
// however written, a second layer of encoding, control characters, bytes beyond ASCII. Two readers can not disagree
// about a path that has none of them.
func normalise(raw string) (string, error) {
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

// classify compares a normalised path with the list of routes, without case.
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

// plainSegments holds the parts of /metadata/instance/... that become part of a request to the real service to the
// letters they are made of: names of fields and indexes of lists.
func plainSegments(path string) bool {
	for i := range len(path) {
		c := path[i]
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '/' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}
