package mic

import (
	"cmp"
	"slices"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// view is what is known about one machine when it is decided what to do with it. All maps are by folded ID.
type view struct {
	now      time.Time
	attached map[string]azure.Identity
	ours     map[string]string // the ledger
	uses     map[string]viewedUse
	// spared says whether an identity must never be detached, whoever attached it.
	spared func(azure.Identity) bool
	delay  time.Duration
}

// viewedUse is an identity that pods want, or wanted.
type viewedUse struct {
	id      string
	users   int
	unused  time.Time // zero: it is not known since when, so since now
	refused *refusal
}

// plan is what to do with a machine.
type plan struct {
	add    []string // to attach, as spelled by whoever wants it
	trial  []string // to attach too, but by themselves: Azure refused them before
	remove []string // to detach, as Azure spells it
	// strike are entries of the ledger, folded, that mean nothing any more: not wanted, and either not attached or to be
	// left where they are.
	strike []string
	// next is when something will be due that is not yet; zero if nothing will.
	next time.Time
}

func (p plan) empty() bool { return len(p.add)+len(p.trial)+len(p.remove) == 0 }

// decide says what to do with a machine. It is pure.
func decide(v view) plan {
	var p plan
	due := func(t time.Time) bool {
		if !t.After(v.now) {
			return true
		}
		if p.next.IsZero() || t.Before(p.next) {
			p.next = t
		}
		return false
	}
	for key, u := range v.uses {
		if _, there := v.attached[key]; there || u.users == 0 {
			continue
		}
		switch {
		case u.refused == nil:
			p.add = append(p.add, u.id)
		case due(u.refused.until):
			p.trial = append(p.trial, u.id)
		}
	}
	for key := range v.ours {
		u := v.uses[key]
		if u.users > 0 {
			continue
		}
		have, there := v.attached[key]
		switch {
		case !there || v.spared(have):
			p.strike = append(p.strike, key)
		case u.refused != nil && !due(u.refused.until):
		case due(cmp.Or(u.unused, v.now).Add(v.delay)):
			p.remove = append(p.remove, have.ID)
		}
	}
	slices.Sort(p.add)
	slices.Sort(p.trial)
	slices.Sort(p.remove)
	slices.Sort(p.strike)
	return p
}
