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

// ARM stands in for Azure Resource Manager's compute: virtual machines and
// scale sets with their identities. It can be had alone, as an http.Handler or
// as a transport (Do), beside being a part of the whole stand-in.
//
// It starts nothing that outlives a request: whether an operation has ended is
// worked out from the clock on each read. IDs compare without case everywhere.
type ARM struct {
	o ARMOptions

	// What follows is guarded by mu, which is never held while a request waits.
	mu             sync.Mutex
	settings       ARMSettings
	identities     map[string]Identity // those that exist, by folded resource ID
	identityFaults map[string]IdentityFault
	machines       map[string]*armMachine // by folded ID
	running        map[*armMachine]bool   // those with operations
	operations     map[string]*armOperation
	ended          []string // IDs of ended operations, oldest first
	faults         map[faultKey]*ARMFault
	limits         armLimits
	records        armRecords
	answers        int // for CasingChanging
}

// ARMOptions make an ARM. The zero value is a good one.
type ARMOptions struct {
	Location string                             // of all machines; default westeurope
	Now      func() time.Time                   // default time.Now
	Verify   func(token string) (Claims, error) // nil: everybody is let in
	Tenant   string                             // with Verify: the tenant that tokens must be of; default any
	// LogCapacity is the most entries of the request log, and of the change
	// log. Default 100,000.
	LogCapacity int
}

// ARMSettings are the switches "arm.*". See DefaultARMSettings.
type ARMSettings struct {
	// Delay is how long the operation of a PATCH takes. With 0 it is done at
	// once, and there is no operation to poll.
	Delay time.Duration
	// RetryAfter, in seconds, is told with a PATCH that takes time and with
	// the status of an operation that runs. 0: no header.
	RetryAfter int
	Limits     bool // enforce Azure's throttle buckets
	// Early: while an operation runs, GET shows the identities of after it
	// instead of before it.
	Early bool
	Queue bool // accept a PATCH during an operation, to be carried out after it, instead of 409
	// LateErrors: a PATCH that adds an identity which does not exist is
	// accepted and fails at the end of its operation, instead of 400 at once.
	LateErrors bool
	Naming     Naming // of identities that do not exist
	// Dangling: a PATCH that leaves a deleted identity attached fails like one
	// that adds it.
	Dangling    bool
	Casing      Casing        // of identities' IDs in answers
	NoETags     bool          // answer no ETag and ignore If-Match
	Propagation time.Duration // IMDS comes to know an attached identity this much later
}

// DefaultARMSettings are those that a new ARM has.
func DefaultARMSettings() ARMSettings {
	return ARMSettings{RetryAfter: 1, Naming: NamedInText, Casing: CasingResourcegroups}
}

// Naming is how an error tells which identities it is about.
type Naming string

const (
	// NamedInDetails: each is the target of one of error.details, and the
	// message names them too.
	NamedInDetails Naming = "details"
	// NamedInText: only the message does, which is what Azure was seen to do.
	// Of several that do not exist it names the first.
	NamedInText Naming = "text"
	Unnamed     Naming = "none"
)

var namings = []Naming{NamedInDetails, NamedInText, Unnamed}

// Casing is how the IDs of attached identities are spelled in answers.
type Casing string

const (
	CasingAsSent         Casing = "as-sent"
	CasingResourcegroups Casing = "resourcegroups" // as sent but for that segment, which is lower case
	CasingLower          Casing = "lower"
	CasingUpper          Casing = "upper"
	CasingChanging       Casing = "changing" // another of these with each answer
)

var casings = []Casing{CasingResourcegroups, CasingLower, CasingUpper, CasingAsSent, CasingChanging}

// NewARM makes an ARM without machines and identities.
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
	return &ARM{
		o: o, settings: DefaultARMSettings(),
		identities: map[string]Identity{}, identityFaults: map[string]IdentityFault{},
		machines: map[string]*armMachine{}, running: map[*armMachine]bool{}, operations: map[string]*armOperation{},
		faults: map[faultKey]*ARMFault{}, limits: armLimits{}, records: newARMRecords(o.LogCapacity),
	}
}

// Settings returns the settings as they are.
func (a *ARM) Settings() ARMSettings {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.settings
}

// Change changes settings. Operations that run keep the delay they began with.
func (a *ARM) Change(change func(*ARMSettings)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	change(&a.settings)
}

// ServeHTTP answers a request. A dropped connection is reset or, where it
// cannot be taken over, ends with http.ErrAbortHandler.
func (a *ARM) ServeHTTP(w http.ResponseWriter, r *http.Request) { writeResponse(w, a.serve(r)) }

// Do answers a client's request without a network between them. A dropped
// connection is io.ErrUnexpectedEOF.
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

// RoundTrip is Do, for an http.Client.
func (a *ARM) RoundTrip(r *http.Request) (*http.Response, error) { return a.Do(r) }

// FoldID returns what IDs are compared by.
func FoldID(id string) string { return strings.TrimRight(strings.ToLower(id), "/") }

// DefineIdentity creates or replaces a user-assigned identity. It is attached
// to nothing, or to what it was.
func (a *ARM) DefineIdentity(id Identity) error {
	if err := validateUserAssigned(id); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.identities[FoldID(id.ResourceID)] = id
	return nil
}

// DeleteIdentity deletes an identity. As in Azure, machines go on listing it,
// but no token can be had for it. An unknown one is no error.
func (a *ARM) DeleteIdentity(resourceID string) {
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

// computeID is the ID of a virtual machine or a scale set, taken apart.
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
