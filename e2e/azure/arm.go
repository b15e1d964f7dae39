package azure

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"
)

// ARM is a fake of Azure Resource Manager's compute API: virtual machines and
// scale sets with their identities. It is a part of the fake Azure, and can run
// alone as an http.Handler or as the transport of a client (Do, RoundTrip).
//
// It starts no goroutine and no timer: an operation whose end has passed is finished
// by the next access to the machines. Resource IDs are not case-sensitive.
type ARM struct {
	*armState
	*armFaults
	limits    armLimits // guarded by armState.mu
	responses int       // number of responses for which CasingChanging chose a casing; guarded by armState.mu
}

// armState has the machines with their identities and operations, and the logs.
type armState struct {
	o ARMOptions

	// mu guards the fields below. A request does not hold mu while a fault delays it.
	mu         sync.Mutex
	settings   ARMSettings
	identities map[string]Identity    // existing ones, by folded resource ID
	machines   map[string]*armMachine // by folded ID
	running    map[*armMachine]bool   // machines with operations
	operations map[string]*armOperation
	ended      []string // IDs of operations that have ended, oldest first
	records    armRecords
}

// ARMOptions configure an ARM. The zero value has the defaults.
type ARMOptions struct {
	Location string           // of all machines; default westeurope
	Now      func() time.Time // default time.Now
	// Verify checks a caller's token and returns its claims. If Verify is nil, requests
	// need no token.
	Verify func(token string) (Claims, error)
	// Tenant is the tenant of system-assigned identities without a TenantID.
	// Tokens of callers must be of this tenant, too, unless Tenant is empty.
	Tenant string
	// LogCapacity is the maximum number of entries in each of the request log and
	// the change log. Default 100,000.
	LogCapacity int
}

// ARMSettings are the switches "arm.*". The zero value is not the default: see
// DefaultARMSettings.
type ARMSettings struct {
	// Delay is the duration of the operation that a PATCH starts. With 0, a PATCH
	// takes effect immediately and starts no operation, unless it is queued or its
	// operation must fail.
	Delay time.Duration
	// RetryAfter is the value of the Retry-After header, in seconds, in the
	// response to a PATCH that starts or queues an operation, and to a poll of an
	// operation that has not ended. 0: no header.
	RetryAfter int
	Limits     bool // enforce the throttling limits of the real ARM: see armLimits
	// Early: responses to GET and PATCH have the identities that the machine will have
	// after all its operations, instead of the current ones.
	Early bool
	Queue bool // queue a PATCH during an operation, instead of refusing it with 409
	// LateErrors: a PATCH with a non-existing identity is accepted, and its operation
	// fails at the end. Without LateErrors, the PATCH is refused with 400.
	LateErrors bool
	Naming     Naming // how errors name denied and non-existing identities
	// Dangling: while a deleted identity is attached to a machine, a PATCH of the machine
	// fails as if it added the deleted identity. This does not apply to a PATCH that
	// removes the deleted identity, or whose type does not include UserAssigned.
	Dangling    bool
	Casing      Casing        // of the IDs of identities in responses
	NoETags     bool          // send no ETag and ignore If-Match
	Propagation time.Duration // time until the fake IMDS knows a newly attached identity
}

// DefaultARMSettings are the settings of a new ARM.
func DefaultARMSettings() ARMSettings {
	return ARMSettings{RetryAfter: 1, Naming: NamedInText, Casing: CasingResourcegroups}
}

// Naming is how an error names the identities that caused it.
type Naming string

const (
	// NamedInDetails: each denied or non-existing identity is the target of an entry of
	// error.details. The message is the same as with NamedInText.
	NamedInDetails Naming = "details"
	// NamedInText: only the message names identities, as was observed with the real
	// ARM. Of several non-existing identities, the message names one: the first by
	// folded ID.
	NamedInText Naming = "text"
	Unnamed     Naming = "none"
)

var namings = []Naming{NamedInDetails, NamedInText, Unnamed}

// Casing is the letter case of the IDs of attached identities in responses.
type Casing string

const (
	CasingAsSent         Casing = "as-sent"
	CasingResourcegroups Casing = "resourcegroups" // as sent, but with the segment "resourcegroups" in lower case
	CasingLower          Casing = "lower"
	CasingUpper          Casing = "upper"
	// CasingChanging: each response with user-assigned identities uses the next of the
	// other casings.
	CasingChanging Casing = "changing"
)

// casings has CasingChanging last: for it, identityOf uses the casings before it in turn.
var casings = []Casing{CasingResourcegroups, CasingLower, CasingUpper, CasingAsSent, CasingChanging}

// NewARM returns an ARM without machines and identities.
func NewARM(o ARMOptions) *ARM {
	if o.Location == "" {
		o.Location = "westeurope"
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.LogCapacity == 0 {
		o.LogCapacity = logCapacity
	}
	state := &armState{
		o: o, settings: DefaultARMSettings(), identities: map[string]Identity{}, machines: map[string]*armMachine{},
		running: map[*armMachine]bool{}, operations: map[string]*armOperation{}, records: newARMRecords(o.LogCapacity),
	}
	return &ARM{armState: state, armFaults: newARMFaults(), limits: armLimits{}}
}

// Settings returns the current settings.
func (a *armState) Settings() ARMSettings {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.settings
}

// Change changes settings. Running operations keep their delay.
func (a *armState) Change(change func(*ARMSettings)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	change(&a.settings)
}

// ServeHTTP handles a request. If a fault suppresses the response, or the client
// disconnects during a delay, ServeHTTP resets the connection or, if the connection
// cannot be hijacked, panics with http.ErrAbortHandler.
func (a *ARM) ServeHTTP(w http.ResponseWriter, r *http.Request) { writeResponse(w, a.serve(r)) }

// Do handles a client's request without a network. It returns
// io.ErrUnexpectedEOF for a dropped connection, and the context's error after the
// context has ended.
func (a *ARM) Do(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		defer r.Body.Close()
	}
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	out := a.serve(r)
	switch err := r.Context().Err(); {
	case err != nil:
		return nil, err
	case out.status == 0:
		return nil, io.ErrUnexpectedEOF
	}
	resp := &http.Response{
		Status: fmt.Sprintf("%d %s", out.status, http.StatusText(out.status)), StatusCode: out.status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{},
		Body: io.NopCloser(bytes.NewReader(out.body)), ContentLength: int64(len(out.body)), Request: r,
	}
	for name, value := range out.header {
		resp.Header.Set(name, value)
	}
	resp.Header.Set("Content-Type", out.contentType)
	return resp, nil
}

// RoundTrip calls Do. It implements http.RoundTripper.
func (a *ARM) RoundTrip(r *http.Request) (*http.Response, error) { return a.Do(r) }

// FoldID returns the form of a resource ID that is used for comparisons: lower
// case and without trailing slashes.
func FoldID(id string) string { return strings.TrimRight(strings.ToLower(id), "/") }

// DefineIdentity creates or replaces a user-assigned identity. It does not
// change where the identity is attached.
func (a *armState) DefineIdentity(id Identity) error {
	if err := validateUserAssigned(id); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.identities[FoldID(id.ResourceID)] = id
	return nil
}

// DeleteIdentity deletes an identity. As in the real Azure, the machines still list
// the identity, but IMDS issues no tokens for it. DeleteIdentity does nothing for an
// unknown identity.
func (a *armState) DeleteIdentity(resourceID string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.identities, FoldID(resourceID))
}

var computeForm = regexp.MustCompile(
	`(?i)^/subscriptions/([^/]+)/resourceGroups/([^/]+)/providers/Microsoft\.Compute/(virtualMachineScaleSets|virtualMachines)/([^/]+)$`)

// Kinds of machines.
const (
	KindVM   = "vm"
	KindVMSS = "vmss"
)

// computeID is the parsed ID of a virtual machine or a scale set.
type computeID struct{ id, kind, subscription, resourceGroup, resourceType, name string }

func parseComputeID(id string) (computeID, bool) {
	m := computeForm.FindStringSubmatch(strings.TrimRight(id, "/"))
	if m == nil {
		return computeID{}, false
	}
	c := computeID{id: m[0], kind: KindVM, subscription: m[1], resourceGroup: m[2], resourceType: "virtualMachines", name: m[4]}
	if strings.EqualFold(m[3], "virtualMachineScaleSets") {
		c.kind, c.resourceType = KindVMSS, "virtualMachineScaleSets"
	}
	return c, true
}

func (c computeID) key() string { return FoldID(c.id) }
