package azure

import (
	"io"
	"net/http"
	"regexp"
	"strings"
)

// Kinds of requests to ARM.
const (
	OpGet   = "get"
	OpPatch = "patch"
	OpPoll  = "poll" // the status of an operation
	OpOther = "other"
)

// armRequestContext is a request to ARM in progress.
type armRequestContext struct {
	*http.Request
	entry     ARMRequest
	machine   computeID // the machine in the path, even if it does not exist; for a poll, that of the operation
	operation string    // ID of the polled operation
	version   string
	claims    Claims // of the caller; empty if ARM requires no token
	patch     identityPatch
	fault     *ARMFault // a copy; nil: none
}

// base is the base URL that the client used.
func (x *armRequestContext) base() string {
	host := x.Host
	if host == "" {
		host = x.URL.Host
	}
	if x.TLS == nil && x.URL.Scheme != "https" {
		return "http://" + host
	}
	return "https://" + host
}

// serve handles a request. It logs the request before it returns the response, so
// that a test finds the log entry as soon as a client has the response.
func (a *ARM) serve(r *http.Request) response {
	x := &armRequestContext{Request: r}
	var body []byte
	var err error
	if r.Body != nil {
		body, err = io.ReadAll(http.MaxBytesReader(nil, r.Body, maxBodyBytes))
	}
	a.recordArrival(x, body)
	var out response
	if err != nil {
		out = x.refuse(&armError{Status: http.StatusRequestEntityTooLarge, Code: "RequestContentTooLarge", Message: "The request body was not read: " + err.Error()})
	} else {
		out = a.handle(x)
	}
	if out.status != 0 {
		out.header["X-Ms-Request-Id"], out.header["X-Ms-Correlation-Request-Id"] = newGUID(), x.entry.CorrelationID
	}
	a.recordResponse(x, out.status)
	return out
}

var operationForm = regexp.MustCompile(`(?i)^/subscriptions/([^/]+)/providers/Microsoft\.Compute/locations/([^/]+)/operations/([^/]+)/?$`)

// recordArrival parses the request and counts it.
func (a *ARM) recordArrival(x *armRequestContext, body []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	x.version = apiVersionOf(x.URL.RawQuery)
	x.entry = ARMRequest{
		Time: a.o.Now(), Operation: OpOther, Method: x.Method, Path: truncate(x.URL.RequestURI()),
		APIVersion: truncate(x.version), IfMatch: truncate(x.Header.Get("If-Match")), CorrelationID: newGUID(),
	}
	if m := operationForm.FindStringSubmatch(x.URL.Path); m != nil && x.Method == http.MethodGet {
		x.entry.Operation, x.operation = OpPoll, m[3]
		if o, ok := a.operations[m[3]]; ok {
			x.machine = o.machine.computeID
		}
	}
	if id, ok := parseComputeID(x.URL.Path); ok {
		x.machine = id
		switch x.Method {
		case http.MethodGet:
			x.entry.Operation = OpGet
		case http.MethodPatch:
			x.entry.Operation, x.patch = OpPatch, parsePatch(body)
			x.entry.Add, x.entry.Remove, x.entry.Type = sortedKeys(x.patch.add), x.patch.remove, truncate(x.patch.text)
		}
	}
	m, exists := a.machines[x.machine.key()]
	if exists {
		x.entry.Resource = m.key()
	}
	if exists && x.entry.Operation == OpPatch {
		x.entry.Overlap = m.patching > 0 || len(m.operations) > 0
		m.patching++
	}
	a.records.begin(&x.entry)
}

func apiVersionOf(query string) string {
	q, err := parseQuery(query)
	if err != nil {
		return ""
	}
	return q["api-version"]
}

// recordResponse adds the request and its response to the log. After a PATCH, it
// decreases the number of PATCH requests in progress, which recordArrival increased.
func (a *ARM) recordResponse(x *armRequestContext, status int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	x.entry.Answered, x.entry.Status = a.o.Now(), status
	if m, ok := a.machines[x.machine.key()]; ok && x.entry.Operation == OpPatch {
		m.patching = max(0, m.patching-1) // already 0 if AddMachine has replaced the machine meanwhile
	}
	a.records.finish(x.entry)
}

// handle returns the fake ARM's own response or the response of a fault.
func (a *ARM) handle(x *armRequestContext) response {
	if err := a.authorize(x); err != nil {
		out := x.refuse(err)
		out.header["WWW-Authenticate"] = `Bearer authorization_uri="https://login.microsoftonline.com/` + a.o.Tenant +
			`", error="invalid_token", error_description="` + err.Message + `"`
		return out
	}
	f := a.consumeFault(x)
	if f == nil {
		return a.answer(x)
	}
	if !sleep(x.Context(), f.Latency) {
		return response{} // the client disconnected
	}
	if !f.replaces() {
		return a.answer(x)
	}
	x.entry.Forced = true
	if f.Apply {
		a.answer(x)
		x.entry.Code = ""
	}
	switch {
	case f.Drop:
		return response{}
	case f.Hang:
		<-x.Context().Done()
		return response{}
	}
	return f.response(x)
}

// answer returns the fake ARM's own response, without regard to faults that replace it.
func (a *ARM) answer(x *armRequestContext) response {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	if err := checkVersion(x.version); err != nil {
		return x.refuse(err)
	}
	if x.entry.Operation == OpOther {
		return x.refuse(&armError{Status: http.StatusNotFound, Code: "NotFound",
			Message: "The fake ARM has no resource at " + x.Method + " " + truncate(x.URL.Path) + "."})
	}
	remaining, throttled := a.admit(x)
	var out response
	o, known := a.operations[x.operation]
	m, exists := a.machines[x.machine.key()]
	switch {
	case throttled != nil:
		x.entry.Forced = true
		out = x.refuse(&throttled.armError)
		out.header["Retry-After"] = throttled.retryAfter
	case x.entry.Operation == OpPoll && (!known || !strings.EqualFold(o.machine.subscription, segment(x.URL.Path, 1))):
		out = x.refuse(&armError{Status: http.StatusNotFound, Code: "NotFound", Message: "The entity was not found."})
	case x.entry.Operation == OpPoll:
		out = a.poll(x, o)
	case !exists:
		out = x.refuse(notFound(x.machine))
	case x.entry.Operation == OpPatch:
		out = a.patch(x, m)
	default:
		out = a.describe(m)
	}
	if remaining != "" {
		out.header["X-Ms-Ratelimit-Remaining-Resource"] = remaining
	}
	return out
}

// segment returns the i-th segment of a path, counted from 0, or "".
func segment(path string, i int) string {
	segments := strings.Split(strings.Trim(path, "/"), "/")
	if i >= len(segments) {
		return ""
	}
	return segments[i]
}

const firstMergingVersion = "2018-06-01" // in earlier versions, a PATCH replaces the identities

var armVersionForm = regexp.MustCompile(`^\d{4}-\d{2}-\d{2}(-preview)?$`)

func checkVersion(v string) *armError {
	switch {
	case v == "":
		return &armError{Status: http.StatusBadRequest, Code: "MissingApiVersionParameter",
			Message: "The api-version query parameter (?api-version=) is required for all requests."}
	case !armVersionForm.MatchString(v) || v < firstMergingVersion:
		return &armError{Status: http.StatusBadRequest, Code: "InvalidApiVersionParameter",
			Message: "The api-version '" + v + "' is invalid. The fake ARM supports those from " + firstMergingVersion + " on."}
	}
	return nil
}
