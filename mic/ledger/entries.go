package ledger

import (
	"maps"
	"slices"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// Entries is the content of a ledger.
type Entries struct {
	Machine  string            // its resource ID
	Attached map[string]string // resource IDs of what MIC attached or may have attached, by folded ID
	// Update is the update that MIC is about to send, or that it sent and whose end it does not know yet. It is nil if
	// there is none.
	Update *Update
}

// Update is one update of the identities of a machine, a PATCH request.
type Update struct {
	Started time.Time `json:"started"`
	Add     []string  `json:"add,omitempty"`
	Remove  []string  `json:"remove,omitempty"`
	// Token is what azure.Client.Resume needs to continue the update; it is not an access token. It is empty until MIC has
	// the response of Azure. So Azure may have accepted an update without a Token.
	Token string `json:"token,omitempty"`
}

// Clone returns a copy. It shares neither the map Attached nor the Update with e.
func (e Entries) Clone() Entries {
	e.Attached = maps.Clone(e.Attached)
	if e.Update != nil {
		u := *e.Update
		e.Update = &u
	}
	return e
}

// Same reports whether writing other in place of e would change nothing. It returns false if e or other has an update
// in progress.
func (e Entries) Same(other Entries) bool {
	return maps.Equal(e.Attached, other.Attached) && e.Update == nil && other.Update == nil
}

// Begin returns the entries that are valid from before an update is sent until its end is known. They contain
// everything that MIC may have attached in this time.
func (e Entries) Begin(now time.Time, add, remove []string) Entries {
	next := e.Clone()
	// Round removes the reading of the monotonic clock, which may stop while the host is suspended: time.Since would
	// then return too short a time.
	next.Update = &Update{Started: now.Round(0), Add: add, Remove: remove}
	for _, id := range add {
		next.Attached[azure.Fold(id)] = id
	}
	return next
}

// End returns the entries after the end of the update. identities are the identities of the machine after the update,
// by folded ID. End removes each identity of the update that the machine does not have.
func (e Entries) End(identities map[string]azure.Identity) Entries {
	next := e.Clone()
	if u := next.Update; u != nil {
		for _, id := range slices.Concat(u.Add, u.Remove) {
			if _, present := identities[azure.Fold(id)]; !present {
				delete(next.Attached, azure.Fold(id))
			}
		}
	}
	next.Update = nil
	return next
}

// Without returns a copy of e without the given identities in Attached. identities are folded IDs, see azure.Fold.
func (e Entries) Without(identities []string) Entries {
	next := e.Clone()
	for _, id := range identities {
		delete(next.Attached, id)
	}
	return next
}

// With returns the entries with further identities: resource IDs by folded ID.
func (e Entries) With(identities map[string]string) Entries {
	next := e.Clone()
	maps.Copy(next.Attached, identities)
	return next
}

// Applied returns the state that a machine will have when Azure has finished the update. state is the state before.
func (u *Update) Applied(state azure.State) azure.State {
	state.Identities = maps.Clone(state.Identities)
	for _, id := range u.Remove {
		delete(state.Identities, azure.Fold(id))
	}
	for _, id := range u.Add {
		if state.Identities == nil {
			state.Identities = map[string]azure.Identity{}
		}
		state.Identities[azure.Fold(id)] = azure.Identity{ID: id}
	}
	return state
}
