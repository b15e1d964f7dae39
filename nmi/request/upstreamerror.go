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

// defaultRetryAfter is when a client is to come again where nobody said so.
const defaultRetryAfter = 2 * time.Second

// upstreamError turns a failure of the source into the answer that makes clients do the right thing: come again, or go
// on to their next credential.
func upstreamError(d identity.Decision, err error) *metadata.Error {
	if errors.Is(err, token.ErrPodThrottled) {
		return metadata.Throttled(identity.PodThrottled, "This pod retriesUpstream for new tokens too often", time.Second)
	}
	var e *token.Error
	if !errors.As(err, &e) {
		e = &token.Error{Class: token.Unavailable, Err: err}
	}
	from := "The metadata service of the machine"
	if d.Identity != nil && d.Identity.Kind != identity.UserAssigned {
		from = "Entra ID"
	}
	switch e.Class {
	case token.Unavailable:
		answer := metadata.Unavailable(cmp.Or(e.Reason, identity.UpstreamUnavailable), cmp.Or(e.Detail, from+" gives no token at the moment"), cmp.Or(e.RetryAfter, defaultRetryAfter))
		answer.Detail = cmp.Or(e.Detail, from+" gives no token at the moment: "+upstreamMessage(e))
		return answer
	case token.Throttled:
		return metadata.Throttled(identity.UpstreamThrottled, from+" throttles this node", e.RetryAfter)
	}
	if e.Status == 0 {
		// It did not come to a question to Azure.
		answer := metadata.Forbidden(cmp.Or(e.Reason, identity.UpstreamRefused), e.Error())
		answer.Detail = e.Detail
		return answer
	}
	answer := metadata.SourceError(upstreamStatus(d, e), e.Code, e.Description)
	answer.Reason = cmp.Or(e.Reason, identity.UpstreamRefused)
	answer.Detail = cmp.Or(e.Detail, refusalDetail(d, from, upstreamMessage(e)))
	return answer
}

// upstreamStatus is 400 for a request that would not be right with another credential either, as IMDS has it, and 403 for a
// credential that is not taken. IMDS's own 400 stays what it is.
func upstreamStatus(d identity.Decision, e *token.Error) int {
	fromIMDS := d.Identity == nil || d.Identity.Kind == identity.UserAssigned
	if fromIMDS && e.Status == http.StatusBadRequest || isResourceError(e) {
		return http.StatusBadRequest
	}
	return http.StatusForbidden
}

// isResourceError reports whether it is what the token is for that Azure does not know.
func isResourceError(e *token.Error) bool {
	return e.Code == "invalid_resource" || e.Code == "invalid_scope" || e.Code == "invalid_target"
}

// upstreamMessage is the failure in a form that is the same each time, so that an operator is told one thing once: Entra ID
// puts the IDs of a request behind its sentence, and the system the port of a connection into its own.
func upstreamMessage(e *token.Error) string {
	var broken *net.OpError
	switch {
	case errors.As(e.Err, &broken): // whose text has the local port
		return fmt.Sprintf("%s %v: %v", broken.Op, broken.Addr, broken.Err)
	case e.Status == 0:
		return e.Error()
	}
	sentence, _, _ := strings.Cut(e.Description, " Trace ID:")
	return fmt.Sprintf("status %d, %s: %s", e.Status, e.Code, sentence)
}

// refusalDetail says to the operator what a refusal of Azure is about.
func refusalDetail(d identity.Decision, from, said string) string {
	if d.Identity == nil {
		return ""
	}
	refused := fmt.Sprintf("%s refused a token for AzureIdentity %s (%s); see that ", from, d.Identity.Key(), said)
	switch d.Identity.Kind {
	case identity.UserAssigned:
		return refused + "the managed identity with its clientID exists and is assigned to the machine or scale set of this node, and that the resource is right"
	case identity.Federated:
		return refused + "its clientID and tenantID are those of an application or managed identity, and that the resource is right"
	default:
		return refused + fmt.Sprintf("its clientID and tenantID are right, that Secret %s/%s holds what the application is registered with, and that the resource is right", d.Identity.SecretNamespace, d.Identity.SecretName)
	}
}
