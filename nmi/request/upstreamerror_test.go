package request

import (
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/token"
)

// An Event is identified by its message, which therefore must not contain what differs from request to request.
func TestEqualFailuresHaveEqualMessages(t *testing.T) {
	refused := func(id string) error {
		return &token.Error{Class: token.Denied, Status: 401, Code: "invalid_client", Description: "AADSTS7000215: Invalid client secret provided. Trace ID: " + id + " Correlation ID: " + id}
	}
	unavailable := func(port int) error {
		return &token.Error{Class: token.Unavailable, Err: &url.Error{Op: "Post", URL: "https://login.example", Err: &net.OpError{Op: "read", Net: "tcp",
			Source: &net.TCPAddr{Port: port}, Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 443}, Err: errors.New("connection reset by peer")}}}
	}
	d := identity.Decision{Identity: &identity.Identity{Namespace: "ns", Name: "sp", Kind: identity.ServicePrincipalSecret, SecretNamespace: "ns", SecretName: "password"}}
	one, other := upstreamError(d, refused("1")), upstreamError(d, refused("2"))
	if one.Detail != other.Detail || one.Description == other.Description || !strings.Contains(one.Detail, "AADSTS7000215: Invalid client secret provided.") || !strings.Contains(one.Detail, "ns/password") {
		t.Errorf("the details are %q and %q; want equal ones with the text of Entra ID and the Secret, and descriptions that differ", one.Detail, other.Detail)
	}
	one, other = upstreamError(d, unavailable(1)), upstreamError(d, unavailable(2))
	if one.Detail != other.Detail || !strings.Contains(one.Detail, "10.0.0.1:443: connection reset by peer") {
		t.Errorf("the details are %q and %q; want equal ones with the address of the server and the cause", one.Detail, other.Detail)
	}
}
