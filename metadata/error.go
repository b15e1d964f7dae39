package metadata

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/podidentity/podidentity/identity"
)

// Error is an answer that refuses. Code and Description are what the real service says in such a case, where that is
// known, since clients look at them; Reason and Detail are ours and travel beside them in the same flat object.
type Error struct {
	Status      int
	Code        string // IMDS's "error"
	Description string // IMDS's "error_description"
	Reason      identity.Reason
	Detail      string        // a sentence for whoever operates the pod; may be empty
	RetryAfter  time.Duration // 0 sends no header
}

func (e *Error) Error() string {
	return fmt.Sprintf("%d %s: %s (%s) %s", e.Status, e.Code, e.Description, e.Reason, e.Detail)
}

// The texts of the real service that clients are known to look for.
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

// Clients give up at once when told to wait longer than their own limit, and the smallest limit known is azidentity's
// 25 s. Less than a second would be no pause at all.
const minRetryAfter, maxRetryAfter = 1 * time.Second, 25 * time.Second

// AfterPending is when a client is to come again that has waited for its identity in vain.
const AfterPending = 5 * time.Second

// Refusal is the answer to a request that the decision did not grant. What is refused is refused for good, as by IMDS's
// own 400, so that a chain of credentials goes on to its next member at once; what is pending is to be asked for again.
func Refusal(d identity.Decision) *Error {
	if d.Outcome == identity.Pending {
		return Unavailable(d.Reason, d.Detail, AfterPending)
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

// Unavailable is the answer while something that passes is in the way. The client is asked to come again.
func Unavailable(r identity.Reason, detail string, retryAfter time.Duration) *Error {
	return &Error{Status: http.StatusServiceUnavailable, Code: codeUnavailable, Description: detail, Reason: r, RetryAfter: max(retryAfter, minRetryAfter)}
}

// Throttled is the answer to a caller that must slow down.
func Throttled(r identity.Reason, detail string, retryAfter time.Duration) *Error {
	return &Error{Status: http.StatusTooManyRequests, Code: codeThrottled, Description: detail, Reason: r, RetryAfter: max(retryAfter, minRetryAfter)}
}

// Forbidden is the answer to what a pod may not have whoever it is.
func Forbidden(r identity.Reason, detail string) *Error {
	return &Error{Status: http.StatusForbidden, Code: codeForbidden, Description: detail, Reason: r}
}

// Passed passes on the refusal that the source of tokens answered, with its own code and text.
func Passed(status int, code, description string) *Error {
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

// Write sends the error. It may be called once per request, before anything else is written.
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
	// The client may be gone; there is nobody to tell.
	_, _ = w.Write(body)
}

var jsonType = []string{"application/json; charset=utf-8"}
