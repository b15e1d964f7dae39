package azure

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"github.com/podidentity/podidentity/internal/text"
)

// identityCodes are the error codes, in lower case, with which ARM refuses an update because of some of its identities:
// an identity does not exist, or MIC may not assign it.
var identityCodes = map[string]bool{"failedidentityoperation": true, "linkedauthorizationfailed": true}

// operationCodes classifies the error codes, in lower case, of updates that failed while they were running: the HTTP
// status of the poll response does not show the class. classifyOperation handles all other codes.
var operationCodes = map[string]Class{
	"authorizationfailed":              Denied,
	"conflict":                         Conflict,
	"operationpreempted":               Conflict,
	"operationpreemptedbyconflict":     Conflict,
	"operationnotallowed":              Conflict,
	"preconditionfailed":               Conflict,
	"internalservererror":              Unavailable,
	"internalexecutionerror":           Unavailable,
	"internaloperationerror":           Unavailable,
	"serviceunavailable":               Unavailable,
	"serviceoperationtimedout":         Unavailable,
	"operationfailedduetoserverissues": Unavailable,
}

// failure converts the error of a call to ARM. requested are the identities of the update, folded. If requested is
// nil, the identities of the update are unknown, and failure reports all identities in the response. For a read,
// requested is empty.
func (c cleaner) failure(operation string, requested map[string]bool, err error) *Error {
	var own *Error
	if errors.As(err, &own) {
		e := *own
		e.Operation = operation
		return &e
	}
	var responseErr *azcore.ResponseError
	if !errors.As(err, &responseErr) || responseErr.RawResponse == nil {
		e := c.noResponse(operation, err)
		if final := interface{ NonRetriable() }(nil); errors.As(err, &final) {
			e.Class = Invalid // an address that is not ARM's, or a response that is too large
		}
		return e
	}
	resp := responseErr.RawResponse
	body, _ := runtime.Payload(resp) // it does not fail: the transporter has already read the body
	parsed := parseARMError(body)
	e := &Error{
		Operation:     operation,
		Status:        resp.StatusCode,
		Code:          c.clean(cmp.Or(parsed.code, responseErr.ErrorCode), maxCode),
		Message:       c.clean(parsed.message, maxMessage),
		CorrelationID: text.OneLine(cmp.Or(resp.Header.Get("X-Ms-Correlation-Request-Id"), resp.Header.Get("X-Ms-Request-Id")), maxID),
		RetryAfter:    retryAfter(resp.Header),
	}
	named := parsed.named(requested)
	e.Class = classify(e.Status, e.Code, parsed.status, len(named) > 0)
	switch e.Class {
	case BadIdentity:
		e.Identities = named
	case Throttled:
		e.RetryAfter = cmp.Or(e.RetryAfter, defaultRetryAfter)
	}
	if e.Message == "" {
		e.Message = cmp.Or(http.StatusText(e.Status), "unknown status") + ", without an error message"
		if e.Status < 300 {
			e.Message = "the update failed; Azure gave no reason"
		}
	}
	return e
}

// classify returns the class for a status and code. A response with an unknown code that names an identity of the
// request is a BadIdentity, unless the status alone means Throttled, Conflict, Unavailable or an invalid token.
func classify(status int, code, operationStatus string, named bool) Class {
	code = strings.ToLower(code)
	switch {
	case status < 300:
		return classifyOperation(code, operationStatus, named)
	case status == http.StatusTooManyRequests:
		return Throttled
	case status == http.StatusUnauthorized:
		return Denied
	case status == http.StatusPreconditionFailed:
		return Conflict
	case status == http.StatusRequestTimeout, status < 400, status >= 500:
		return Unavailable
	case identityCodes[code]:
		return BadIdentity
	case status == http.StatusConflict:
		return Conflict
	case named:
		return BadIdentity
	case status == http.StatusForbidden:
		return Denied
	case status == http.StatusNotFound, status == http.StatusGone:
		return NotFound
	}
	return Invalid
}

// classifyOperation classifies an update that failed while it was running. code is in lower case. A failure with an
// unknown code counts as a failure of Azure, unless the update was canceled or the response names an identity of the
// update.
func classifyOperation(code, status string, named bool) Class {
	class, known := operationCodes[code]
	switch {
	case identityCodes[code]:
		return BadIdentity
	case known:
		return class
	case strings.HasPrefix(strings.ToLower(status), "cancel"):
		return Conflict
	case named:
		return BadIdentity
	}
	return Unavailable
}

// contextError returns the context error that err wraps, or nil. [Error] does not wrap err, whose text may contain
// secrets. It wraps only the context error, so that errors.Is finds it.
func contextError(err error) error {
	for _, known := range []error{context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, known) {
			return known
		}
	}
	return nil
}

// armError is the parsed body of an error response.
type armError struct {
	status        string // of the update, in a poll response, such as "Failed"
	code, message string
	// exact are the folded IDs of identities from keys and values that consist only of an ID. within are folded IDs from
	// longer texts.
	exact, within []string
}

// maxDepth bounds how deep the nested details of an error response are searched.
const maxDepth = 16

// parseARMError reads {"error":{"code","message","details":[...],"innererror","additionalInfo":[...]}}, and the same
// within a poll response. Some Azure services do not keep to the documented types, so each type is checked.
func parseARMError(body []byte) *armError {
	parsed := &armError{}
	var root map[string]any
	if json.Unmarshal(body, &root) != nil {
		return parsed
	}
	parsed.status, _ = root["status"].(string)
	top, ok := root["error"].(map[string]any)
	if !ok {
		if _, resource := root["id"]; resource {
			return parsed // the response is the machine itself: it contains identities, but refuses none
		}
		top = root
	}
	parsed.walk(top, maxDepth)
	return parsed
}

// updateFailed reports whether a poll response says that the update failed.
func (a *armError) updateFailed() bool {
	switch strings.ToLower(a.status) {
	case "failed", "canceled", "cancelled":
		return true
	}
	return false
}

// walk searches a value for error codes, messages and identities. It keeps the outermost code, unless a nested code is
// one of identityCodes.
func (a *armError) walk(v any, depth int) {
	if depth == 0 {
		return
	}
	switch v := v.(type) {
	case map[string]any:
		code, _ := v["code"].(string)
		message, _ := v["message"].(string)
		within := identityCodes[strings.ToLower(code)] && !identityCodes[strings.ToLower(a.code)]
		if a.code == "" || within {
			a.code = cmp.Or(code, a.code)
			a.message = cmp.Or(message, a.message)
		}
		for _, key := range slices.Sorted(maps.Keys(v)) {
			a.addIdentities(key)
			a.walk(v[key], depth-1)
		}
	case []any:
		for _, each := range v {
			a.walk(each, depth-1)
		}
	case string:
		a.addIdentities(v)
	}
}

func (a *armError) addIdentities(s string) {
	found := findIdentities(s)
	if len(found) == 1 && found[0] == Fold(s) {
		a.exact = append(a.exact, found[0])
	} else {
		a.within = append(a.within, found...)
	}
}

// named returns the identities that the response names. If requested is not nil, it returns only identities in
// requested. It returns those of exact or, if there are none, those of within: longer texts may also name identities
// that are not refused.
func (a *armError) named(requested map[string]bool) []string {
	for _, found := range [][]string{a.exact, a.within} {
		if requested != nil {
			found = slices.DeleteFunc(slices.Clone(found), func(id string) bool { return !requested[id] })
		}
		if len(found) > 0 {
			slices.Sort(found)
			return slices.Compact(found)
		}
	}
	return nil
}

const identityType = "/providers/microsoft.managedidentity/userassignedidentities/"

// findIdentities returns the IDs of user-assigned identities in a text, in lower case.
func findIdentities(text string) []string {
	var found []string
	text = strings.ToLower(strings.ReplaceAll(text, `\/`, "/"))
	for {
		before, after, ok := strings.Cut(text, identityType)
		if !ok {
			return found
		}
		end := strings.IndexFunc(after, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
		})
		if end < 0 {
			end = len(after)
		}
		name := after[:end]
		if start := strings.LastIndex(before, "/subscriptions/"); start >= 0 && name != "" {
			if part := strings.Split(before[start:], "/"); len(part) == 5 && part[3] == "resourcegroups" && part[2] != "" && part[4] != "" {
				found = append(found, before[start:]+identityType+name)
			}
		}
		text = after[end:]
	}
}
