package usage

import (
	"cmp"
	"slices"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// View is what Decide needs to know of one machine. All maps are by folded resource ID.
type View struct {
	Now        time.Time
	Attached   map[string]azure.Identity
	InLedger   map[string]string // resource IDs of what MIC attached or may have attached
	Identities map[string]IdentityView
	// Protected reports whether an identity is never detached, no matter who attached it.
	Protected   func(azure.Identity) bool
	DetachDelay time.Duration
}

// IdentityView is an identity that pods need or needed, or that is in the ledger.
type IdentityView struct {
	ID          string
	Users       int       // the number of pods that need it
	UnusedSince time.Time // used only if Users is 0; a zero time means Now
	Refusal     *Refusal
}

// Plan is what to do with a machine.
type Plan struct {
	Add    []string // to attach, spelled as in IdentityView.ID
	Trial  []string // to attach in updates without those of Add, because Azure refused them before
	Remove []string // to detach, spelled as in Azure
	// Prune are entries to remove from the ledger, by folded ID: no pod needs them, and they are not attached or are
	// protected.
	Prune []string
	// Next is when the next part of the plan becomes due; zero if there is none.
	Next time.Time
}

// Empty reports whether no update is needed now.
func (p Plan) Empty() bool { return len(p.Add)+len(p.Trial)+len(p.Remove) == 0 }

// Decide returns what to do with a machine now. It is pure.
func Decide(v View) Plan {
	var p Plan
	due := func(t time.Time) bool {
		if !t.After(v.Now) {
			return true
		}
		if p.Next.IsZero() || t.Before(p.Next) {
			p.Next = t
		}
		return false
	}
	for key, u := range v.Identities {
		if _, present := v.Attached[key]; present || u.Users == 0 {
			continue
		}
		switch {
		case u.Refusal == nil:
			p.Add = append(p.Add, u.ID)
		case due(u.Refusal.RetryAfter):
			p.Trial = append(p.Trial, u.ID)
		}
	}
	for key := range v.InLedger {
		u := v.Identities[key]
		if u.Users > 0 {
			continue
		}
		have, present := v.Attached[key]
		switch {
		case !present || v.Protected(have):
			p.Prune = append(p.Prune, key)
		case u.Refusal != nil && !due(u.Refusal.RetryAfter):
		case due(cmp.Or(u.UnusedSince, v.Now).Add(v.DetachDelay)):
			p.Remove = append(p.Remove, have.ID)
		}
	}
	slices.Sort(p.Add)
	slices.Sort(p.Trial)
	slices.Sort(p.Remove)
	slices.Sort(p.Prune)
	return p
}
