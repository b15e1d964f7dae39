package azure

import (
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ARMFault changes how the fake ARM handles the requests that match Resource and
// Operation. If several faults match a request, only one applies: a fault of the machine
// if there is one, otherwise a fault of its subscription, otherwise a fault of all
// resources. Of two faults of the same resource, the one with an Operation applies.
type ARMFault struct {
	Resource  string `json:"resource,omitempty"`  // ID of a machine, or /subscriptions/S; empty: all
	Operation string `json:"operation,omitempty"` // OpGet, OpPatch or OpPoll; empty: each
	Count     int    `json:"count,omitempty"`     // number of requests to which the fault applies; 0: no limit

	Latency time.Duration `json:"latency_ns,omitempty"` // delay before ARM handles the request or the fault responds
	// Status replaces the response. Code and Message have defaults; RetryAfter
	// is in seconds (0: no header).
	Status     int    `json:"status,omitempty"`
	Code       string `json:"code,omitempty"`
	Message    string `json:"message,omitempty"`
	RetryAfter int    `json:"retry_after,omitempty"`
	Hang       bool   `json:"hang,omitempty"` // no response; the request ends when the client disconnects
	Drop       bool   `json:"drop,omitempty"` // no response, the connection is reset
	// Fails: the operation of an accepted PATCH fails with Code and Message. A fault with
	// Fails matches no other requests than PATCH.
	Fails bool `json:"fails,omitempty"`
	// Apply: with Status, Hang or Drop, the request takes effect although the fault
	// replaces its response. With Fails, the identities change although the
	// operation fails.
	Apply bool `json:"apply,omitempty"`
}

// IdentityFault changes how the fake ARM treats an identity, until the fault is cleared.
type IdentityFault struct {
	Identity string `json:"identity"`          // resource ID; the identity need not exist
	Denied   bool   `json:"denied,omitempty"`  // no caller may assign it: 403 LinkedAuthorizationFailed
	Missing  bool   `json:"missing,omitempty"` // ARM acts as if the identity did not exist
	Naming   Naming `json:"naming,omitempty"`  // empty: ARMSettings.Naming
}

type faultKey struct{ resource, operation string }

// armFaults are the faults that tests have set.
type armFaults struct {
	lock         sync.Mutex
	ofRequests   map[faultKey]*ARMFault
	ofIdentities map[string]IdentityFault // by folded resource ID
}

func newARMFaults() *armFaults {
	return &armFaults{ofRequests: map[faultKey]*ARMFault{}, ofIdentities: map[string]IdentityFault{}}
}

var subscriptionForm = regexp.MustCompile(`(?i)^/subscriptions/[^/]+/?$`)

func (f ARMFault) validate() error {
	_, machine := parseComputeID(f.Resource)
	effects := 0
	for _, set := range []bool{f.Status != 0, f.Hang, f.Drop, f.Fails} {
		if set {
			effects++
		}
	}
	switch {
	case f.Resource != "" && !machine && !subscriptionForm.MatchString(f.Resource):
		return fmt.Errorf("fault: resource %q is neither the ID of a machine nor /subscriptions/S", f.Resource)
	case f.Operation != "" && !slices.Contains([]string{OpGet, OpPatch, OpPoll}, f.Operation):
		return fmt.Errorf("fault: unknown operation %q; valid: %s, %s, %s, or empty for all",
			f.Operation, OpGet, OpPatch, OpPoll)
	case f.Status != 0 && (f.Status < 400 || f.Status > 599):
		return fmt.Errorf("fault: invalid status %d; valid: 400 to 599", f.Status)
	case f.Count < 0 || f.RetryAfter < 0 || f.Latency < 0:
		return fmt.Errorf("fault: count, retry_after or latency_ns is negative: %+v", f)
	case effects > 1:
		return fmt.Errorf("fault: set only one of status, hang, drop and fails: %+v", f)
	case effects == 0 && f.Latency == 0:
		return fmt.Errorf("fault: it has no effect without latency_ns, status, hang, drop or fails: %+v", f)
	case f.Fails && f.Operation != "" && f.Operation != OpPatch:
		return fmt.Errorf("fault: fails is valid for operation %s, not for %s", OpPatch, f.Operation)
	}
	return nil
}

// SetFault sets a fault. It replaces the fault of the same resource and
// operation.
func (s *armFaults) SetFault(f ARMFault) error {
	if err := f.validate(); err != nil {
		return err
	}
	s.lock.Lock()
	defer s.lock.Unlock()
	s.ofRequests[faultKey{FoldID(f.Resource), f.Operation}] = &f
	return nil
}

// ClearFaults clears the faults of a resource. With "" it clears all faults,
// including those of identities.
func (s *armFaults) ClearFaults(resource string) {
	s.lock.Lock()
	defer s.lock.Unlock()
	if resource == "" {
		clear(s.ofRequests)
		clear(s.ofIdentities)
		return
	}
	maps.DeleteFunc(s.ofRequests, func(k faultKey, _ *ARMFault) bool { return k.resource == FoldID(resource) })
}

// Faults returns the faults that SetFault has set, sorted by resource and operation.
func (s *armFaults) Faults() []ARMFault {
	s.lock.Lock()
	defer s.lock.Unlock()
	out := make([]ARMFault, 0, len(s.ofRequests))
	for _, f := range s.ofRequests {
		out = append(out, *f)
	}
	slices.SortFunc(out, func(x, y ARMFault) int {
		return strings.Compare(FoldID(x.Resource)+" "+x.Operation, FoldID(y.Resource)+" "+y.Operation)
	})
	return out
}

// SetIdentityFault sets the fault of an identity. A fault with neither Denied nor
// Missing clears the identity's fault.
func (s *armFaults) SetIdentityFault(f IdentityFault) error {
	if !userAssignedForm.MatchString(f.Identity) {
		return fmt.Errorf("identity fault: %q is not the resource ID of a user-assigned identity", f.Identity)
	}
	if err := f.Naming.validate(); f.Naming != "" && err != nil {
		return err
	}
	s.lock.Lock()
	defer s.lock.Unlock()
	if key := FoldID(f.Identity); f.Denied || f.Missing {
		s.ofIdentities[key] = f
	} else {
		delete(s.ofIdentities, key)
	}
	return nil
}

func (n Naming) validate() error {
	if !slices.Contains(namings, n) {
		return fmt.Errorf("identity fault: unknown value %q of field naming; valid: %s, %s, %s",
			n, NamedInDetails, NamedInText, Unnamed)
	}
	return nil
}

// ofIdentity returns the fault of an identity, or the zero value.
func (s *armFaults) ofIdentity(key string) IdentityFault {
	s.lock.Lock()
	defer s.lock.Unlock()
	return s.ofIdentities[key]
}

// naming is how errors name the identity.
func (f IdentityFault) naming(settings ARMSettings) Naming {
	if f.Naming == "" {
		return settings.Naming
	}
	return f.Naming
}

// consumeFault returns a copy of the fault that applies to the request, or nil,
// and stores it in x.fault. If the fault has a count, consumeFault decreases it, and
// deletes the fault when the count reaches 0.
func (s *armFaults) consumeFault(x *armRequestContext) *ARMFault {
	s.lock.Lock()
	defer s.lock.Unlock()
	for _, resource := range []string{x.machine.key(), FoldID("/subscriptions/" + segment(x.URL.Path, 1)), ""} {
		for _, operation := range []string{x.entry.Operation, ""} {
			key := faultKey{resource, operation}
			f, ok := s.ofRequests[key]
			if !ok || f.Fails && x.entry.Operation != OpPatch {
				continue
			}
			taken := *f
			if f.Count > 0 {
				if f.Count--; f.Count == 0 {
					delete(s.ofRequests, key)
				}
			}
			x.fault = &taken
			return x.fault
		}
	}
	return nil
}

// replaces reports whether the fault replaces ARM's own response.
func (f *ARMFault) replaces() bool { return f.Status != 0 || f.Hang || f.Drop }

var defaultCodes = map[int]string{
	400: "BadRequest", 401: "InvalidAuthenticationToken", 403: "AuthorizationFailed", 404: "ResourceNotFound", 408: "RequestTimeout", 409: "Conflict",
	412: "PreconditionFailed", 429: "TooManyRequests", 500: "InternalServerError", 502: "BadGateway", 503: "ServerBusy", 504: "GatewayTimeout",
}

func (f *ARMFault) response(x *armRequestContext) response {
	e := &armError{Status: f.Status, Code: f.Code, Message: f.Message}
	if e.Code == "" {
		e.Code = defaultCodes[f.Status]
	}
	if e.Code == "" {
		e.Code = "Error"
	}
	if e.Message == "" {
		e.Message = http.StatusText(f.Status) + ", because of a fault that a test has set."
	}
	out := x.refuse(e)
	if f.RetryAfter > 0 {
		out.header["Retry-After"] = strconv.Itoa(f.RetryAfter)
	}
	return out
}

// operationError is the error of an operation that fails because of a fault.
func (f *ARMFault) operationError() *armError {
	e := &armError{Status: http.StatusInternalServerError, Code: f.Code, Message: f.Message}
	if e.Code == "" {
		e.Code = "InternalExecutionError"
	}
	if e.Message == "" {
		e.Message = "An internal execution error occurred. Please retry later."
	}
	return e
}
