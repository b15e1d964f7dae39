package usage

import (
	"cmp"
	"slices"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// view is what is known about one machine when it is decided what to do with it. All maps are by folded ID.
type View struct {
	Now        time.Time
	Attached   map[string]azure.Identity
	InLedger   map[string]string // the ledger
	Identities map[string]IdentityView
	// spared says whether an identity must never be detached, whoever attached it.
	Protected   func(azure.Identity) bool
	DetachDelay time.Duration
}

// viewedUse is an identity that pods want, or wanted.
type IdentityView struct {
	ID          string
	Users       int
	UnusedSince time.Time // zero: it is not known since when, so since now
	Refusal     *Refusal
}

// plan is what to do with a machine.
type Plan struct {
	Add    []string // to attach, as spelled by whoever wants it
	Trial  []string // to attach too, but by themselves: Azure refused them before
	Remove []string // to detach, as Azure spells it
	// strike are entries of the ledger, folded, that mean nothing any more: not wanted, and either not attached or to be
	// left where they are.
	Prune []string
	// next is when something will be due that is not yet; zero if nothing will.
	Next time.Time
}

func (p Plan) Empty() bool { return len(p.Add)+len(p.Trial)+len(p.Remove) == 0 }

// decide says what to do with a machine. It is pure.
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
		if _, there := v.Attached[key]; there || u.Users == 0 {
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
		have, there := v.Attached[key]
		switch {
		case !there || v.Protected(have):
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
