package request

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/token"
)

// defaultRetryAfter is the time after which a client should retry if the failure does not specify one.
const defaultRetryAfter = 2 * time.Second

// upstreamError converts a failed token fetch into the response that makes clients do the right thing: retry, or try
// the next credential of their chain.
func upstreamError(d identity.Decision, err error) *metadata.Error {
	if errors.Is(err, token.ErrPodThrottled) {
		return metadata.Throttled(identity.PodThrottled, "This pod requests new tokens too often, too many different tokens, or tokens of identities with too many Secrets", time.Second)
	}
	var e *token.Error
	if !errors.As(err, &e) {
		e = &token.Error{Class: token.Unavailable, Err: err}
	}
	upstream := "IMDS"
	if d.Identity != nil && d.Identity.Kind != identity.UserAssigned {
		upstream = "Entra ID"
	}
	switch e.Class {
	case token.Unavailable:
		description := cmp.Or(e.Detail, "NMI cannot get a token from "+upstream+" at the moment")
		response := metadata.Unavailable(cmp.Or(e.Reason, identity.UpstreamUnavailable), description, cmp.Or(e.RetryAfter, defaultRetryAfter))
		response.Detail = cmp.Or(e.Detail, description+": "+upstreamMessage(e))
		return response
	case token.Throttled:
		return metadata.Throttled(identity.UpstreamThrottled, upstream+" limits the rate of token requests; retry after the time in Retry-After", e.RetryAfter)
	}
	if e.Status == 0 {
		// NMI did not send the token request, so there is no response of Azure to pass on.
		response := metadata.Forbidden(cmp.Or(e.Reason, identity.UpstreamRefused), e.Error())
		response.Detail = e.Detail
		return response
	}
	response := metadata.SourceError(upstreamStatus(d, e), e.Code, e.Description)
	response.Reason = cmp.Or(e.Reason, identity.UpstreamRefused)
	response.Detail = cmp.Or(e.Detail, refusalDetail(d, upstream, upstreamMessage(e)))
	return response
}

// upstreamStatus returns 400 if IMDS responded with 400. It also returns 400 if Azure does not know the resource,
// because then the request is wrong and not the credential: any credential would fail. Otherwise it returns 403.
func upstreamStatus(d identity.Decision, e *token.Error) int {
	fromIMDS := d.Identity == nil || d.Identity.Kind == identity.UserAssigned
	if fromIMDS && e.Status == http.StatusBadRequest || isResourceError(e) {
		return http.StatusBadRequest
	}
	return http.StatusForbidden
}

// isResourceError reports whether Azure does not know the resource that the token is for.
func isResourceError(e *token.Error) bool {
	return e.Code == "invalid_resource" || e.Code == "invalid_scope" || e.Code == "invalid_target"
}

// upstreamMessage returns the text of the failure without the parts that differ from request to request: Entra ID
// appends the IDs of the request to its message, and a connection error contains the local port. Without these parts,
// equal failures have equal texts, which NMI reports in one Event.
func upstreamMessage(e *token.Error) string {
	var connectionError *net.OpError
	switch {
	case errors.As(e.Err, &connectionError):
		return fmt.Sprintf("%s %v: %v", connectionError.Op, connectionError.Addr, connectionError.Err)
	case e.Status == 0:
		return e.Error()
	}
	message, _, _ := strings.Cut(e.Description, " Trace ID:")
	return fmt.Sprintf("status %d, %s: %s", e.Status, e.Code, message)
}

// refusalDetail tells the operator what to check after a refusal of Azure.
func refusalDetail(d identity.Decision, upstream, message string) string {
	if d.Identity == nil {
		return ""
	}
	refused := fmt.Sprintf("%s refused a token for AzureIdentity %s (%s); check that ", upstream, d.Identity.Key(), message)
	switch d.Identity.Kind {
	case identity.UserAssigned:
		return refused + "the managed identity that this AzureIdentity names exists and is assigned to the VM or VMSS of this node, and that the resource in the request is correct"
	case identity.Federated:
		return refused + "spec.clientID and spec.tenantID of this AzureIdentity are those of an application or managed identity, and that the resource in the request is correct"
	default:
		return refused + fmt.Sprintf("spec.clientID and spec.tenantID of this AzureIdentity are correct, that Secret %s/%s contains the current credential of the application, and that the resource in the request is correct", d.Identity.SecretNamespace, d.Identity.SecretName)
	}
}
