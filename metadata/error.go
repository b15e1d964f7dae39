package metadata

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/podidentity/podidentity/identity"
)

// Error is an error response. Code and Description are those of IMDS for the same case, where they are known, because
// clients compare them. Reason and Detail are additional fields of the same flat JSON object.
type Error struct {
	Status      int
	Code        string // IMDS's "error"
	Description string // IMDS's "error_description"
	Reason      identity.Reason
	Detail      string        // a sentence for the operator of the pod; may be empty
	RetryAfter  time.Duration // 0 sends no header
}

func (e *Error) Error() string {
	return fmt.Sprintf("%d %s: %s (%s) %s", e.Status, e.Code, e.Description, e.Reason, e.Detail)
}

// Descriptions (text...) and codes (code...) of error responses. The descriptions are those of IMDS: clients are known
// to compare them.
const (
	textHeader      = "Required metadata header not specified"
	textNotFound    = "Identity not found"
	textMultiple    = "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"
	textNoResource  = "Required audience parameter not specified"
	codeInvalid     = "invalid_request"
	codeBadRequest  = "bad_request"
	codeForbidden   = "forbidden"
	codeNotFound    = "not_found"
	codeMethod      = "method_not_allowed"
	codeThrottled   = "too_many_requests"
	codeUnavailable = "service_unavailable"
)

// Clients give up at once if Retry-After exceeds their own limit; the smallest known limit is azidentity's 25 s. The
// header has a resolution of one second.
const minRetryAfter, maxRetryAfter = 1 * time.Second, 25 * time.Second

// PendingRetryAfter is the Retry-After of the response to a request whose identity is not assigned yet.
const PendingRetryAfter = 5 * time.Second

// Refusal returns the response to a request that the decision did not grant. A refused request gets an error that
// clients do not retry, like IMDS's own 400, so that a chain of credentials tries its next credential at once. A
// pending request gets an error that makes the client retry.
func Refusal(d identity.Decision) *Error {
	if d.Outcome == identity.Pending {
		return Unavailable(d.Reason, d.Detail, PendingRetryAfter)
	}
	e := &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: textNotFound, Reason: d.Reason, Detail: d.Detail}
	switch d.Reason {
	case identity.MultipleIdentities:
		e.Description = textMultiple
	case identity.IdentityInvalid, identity.IdentityAmbiguous, identity.SecretNotAllowed:
		e.Status, e.Code, e.Description = http.StatusForbidden, codeForbidden, d.Detail
	}
	return e
}

// Unavailable returns the response to a request that fails temporarily. Its header Retry-After is retryAfter, within
// the limits that Error.Write sets.
func Unavailable(r identity.Reason, detail string, retryAfter time.Duration) *Error {
	return &Error{Status: http.StatusServiceUnavailable, Code: codeUnavailable, Description: detail, Reason: r, RetryAfter: max(retryAfter, minRetryAfter)}
}

// Throttled returns the response to a request that NMI, IMDS or Entra ID does not serve because of too many requests.
// Its header Retry-After is retryAfter, within the limits that Error.Write sets.
func Throttled(r identity.Reason, detail string, retryAfter time.Duration) *Error {
	return &Error{Status: http.StatusTooManyRequests, Code: codeThrottled, Description: detail, Reason: r, RetryAfter: max(retryAfter, minRetryAfter)}
}

// Forbidden returns the response to a request that NMI does not serve, or for whose identity it cannot request a token.
// Clients do not retry it.
func Forbidden(r identity.Reason, detail string) *Error {
	return &Error{Status: http.StatusForbidden, Code: codeForbidden, Description: detail, Reason: r}
}

// SourceError returns the response that contains an error of the token source, with the code and description of that
// error. If code is "", the response has the code invalid_request.
func SourceError(status int, code, description string) *Error {
	if code == "" {
		code = codeInvalid
	}
	return &Error{Status: status, Code: code, Description: description, Reason: identity.UpstreamRefused}
}

// errorBody is flat, and its fields are strings: some clients fail on anything else.
type errorBody struct {
	Error       string          `json:"error"`
	Description string          `json:"error_description"`
	Reason      identity.Reason `json:"reason"`
	Detail      string          `json:"detail,omitempty"`
}

// Write sends the error. It may be called once per request, before anything else is written. A RetryAfter other than 0
// is rounded up to seconds and limited to minRetryAfter and maxRetryAfter.
func (e *Error) Write(w http.ResponseWriter) {
	body, err := json.Marshal(errorBody{e.Code, e.Description, e.Reason, e.Detail})
	if err != nil { // strings always marshal
		panic(err)
	}
	h := w.Header()
	if e.RetryAfter > 0 {
		seconds := (min(max(e.RetryAfter, minRetryAfter), maxRetryAfter) + time.Second - 1) / time.Second
		h.Set("Retry-After", strconv.Itoa(int(seconds)))
	}
	if e.Status == http.StatusMethodNotAllowed {
		h.Set("Allow", http.MethodGet)
	}
	writeJSON(w, e.Status, body)
}

func writeJSON(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h["Content-Type"] = jsonType
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	// An error means that the connection is broken, so nothing can be reported to the client.
	_, _ = w.Write(body)
}

var jsonType = []string{"application/json; charset=utf-8"}
