package azure

import (
	"maps"
	"net/http"
	"slices"
	"time"
)

// ARMRequest is one entry of the fake ARM's request log.
type ARMRequest struct {
	Seq           int       `json:"seq"` // never reset
	Time          time.Time `json:"time"`
	Answered      time.Time `json:"answered"`
	Operation     string    `json:"operation"` // OpGet, OpPatch, OpPoll, OpOther
	Method        string    `json:"method"`
	Path          string    `json:"path"`
	Resource      string    `json:"resource,omitempty"` // folded ID of the machine, also for a poll of its operation
	Caller        string    `json:"caller,omitempty"`   // object ID
	APIVersion    string    `json:"api_version,omitempty"`
	IfMatch       string    `json:"if_match,omitempty"`
	CorrelationID string    `json:"correlation_id,omitempty"` // as in the response header
	// Of a PATCH, accepted or not: the identities that it adds and removes,
	// folded and sorted, and identity.type as sent.
	Add    []string `json:"add,omitempty"`
	Remove []string `json:"remove,omitempty"`
	Type   string   `json:"type,omitempty"`

	Status int    `json:"status"` // 0: no response
	Code   string `json:"code,omitempty"`
	Forced bool   `json:"forced,omitempty"` // a fault or a limit determined the response
	// Accepted: ARM accepted the PATCH, even if a fault replaced its response or its
	// operation fails. Start and End are those of its operation and may be in the
	// future. If the PATCH took effect immediately, both are the time of the PATCH.
	Accepted    bool      `json:"accepted,omitempty"`
	OperationID string    `json:"operation_id,omitempty"`
	Start       time.Time `json:"start,omitzero"`
	End         time.Time `json:"end,omitzero"`
	// Overlap: when the PATCH arrived, ARM was handling another PATCH of the same
	// machine, or an operation of this machine had not ended.
	Overlap bool `json:"overlap,omitempty"`
}

func (e *ARMRequest) number(seq int) { e.Seq = seq }

// ARMChange is one entry of the change log: an identity was attached to a
// machine or detached from it.
type ARMChange struct {
	Seq         int       `json:"seq"`
	Time        time.Time `json:"time"`
	Resource    string    `json:"resource"` // folded
	Identity    string    `json:"identity"` // folded, or SystemIdentity
	Attached    bool      `json:"attached"` // else detached
	OperationID string    `json:"operation_id,omitempty"`
	ByHand      bool      `json:"by_hand,omitempty"`
}

func (c *ARMChange) number(seq int) { c.Seq = seq }

// SystemIdentity stands for the system-assigned identity in ARMChange.Identity.
const SystemIdentity = "system"

type changeLog = ring[ARMChange, *ARMChange]

// ARMCounts count requests of one machine.
type ARMCounts struct {
	Get       int `json:"get"`
	Patch     int `json:"patch"`
	Poll      int `json:"poll"`
	Other     int `json:"other"`
	Accepted  int `json:"accepted"`  // accepted PATCH requests
	Throttled int `json:"throttled"` // responses with status 429
	Overlaps  int `json:"overlaps"`
}

// ARMStats are the counts since NewARM or the last ResetLog.
type ARMStats struct {
	Resources      map[string]ARMCounts `json:"resources"` // by folded machine ID; "": requests for no known machine
	ByStatus       map[int]int          `json:"by_status"` // 0: no response
	LogDropped     int                  `json:"log_dropped"`
	ChangesDropped int                  `json:"changes_dropped"`
}

// armRecords are the request log, the change log and the counts. armState.mu guards them.
type armRecords struct {
	requests ring[ARMRequest, *ARMRequest]
	changes  changeLog
	stats    ARMStats
}

func newARMRecords(capacity int) armRecords {
	r := armRecords{}
	r.requests.capacity, r.changes.capacity = capacity, capacity
	r.reset()
	return r
}

func (r *armRecords) reset() {
	r.requests.reset()
	r.changes.reset()
	r.stats = ARMStats{Resources: map[string]ARMCounts{}, ByStatus: map[int]int{}}
}

// begin counts a request when it arrives.
func (r *armRecords) begin(e *ARMRequest) {
	c := r.stats.Resources[e.Resource]
	switch e.Operation {
	case OpGet:
		c.Get++
	case OpPatch:
		c.Patch++
	case OpPoll:
		c.Poll++
	default:
		c.Other++
	}
	if e.Overlap {
		c.Overlaps++
	}
	r.stats.Resources[e.Resource] = c
}

// finish logs a request and counts its outcome.
func (r *armRecords) finish(e ARMRequest) {
	r.requests.add(e)
	r.stats.ByStatus[e.Status]++
	c := r.stats.Resources[e.Resource]
	if e.Accepted {
		c.Accepted++
	}
	if e.Status == http.StatusTooManyRequests {
		c.Throttled++
	}
	r.stats.Resources[e.Resource] = c
}

// Log returns the requests with a sequence number greater than since, in the
// order of their responses.
func (a *ARM) Log(since int) []ARMRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.records.requests.since(since)
}

// Changes returns the changes with a sequence number greater than since. Those
// of one machine are in the order in which they took effect.
func (a *ARM) Changes(since int) []ARMChange {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	return a.records.changes.since(since)
}

// ResetLog empties both logs and sets the counts to 0. Sequence numbers
// continue.
func (a *ARM) ResetLog() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishDueOperations()
	a.records.reset()
}

// Stats returns the counts.
func (a *ARM) Stats() ARMStats {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.records.stats
	s.Resources, s.ByStatus = maps.Clone(s.Resources), maps.Clone(s.ByStatus)
	s.LogDropped, s.ChangesDropped = a.records.requests.dropped, a.records.changes.dropped
	return s
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
