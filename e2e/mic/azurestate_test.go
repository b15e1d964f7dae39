package mic

import (
	"slices"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
)

// azureFacts are what a test knows of Azure beyond what ARM's logs say. IDs are folded.
type azureFacts struct {
	defined    map[string]bool // identities that exist in Azure
	bad        map[string]bool // identities that Azure refuses to attach
	immutable  map[string]bool // identities that are never to be detached
	neverBound map[string]bool // identities that no AzureIdentity ever names

	foreign       map[string]map[string]bool // by machine: attached by somebody else than MIC
	spans         []span
	attachedFirst map[string]map[string]bool // by machine: attached from the start
	machineGone   map[string]bool            // machines that were deleted at some time
}

// span is a time during which an identity was on a machine for somebody else's sake.
type span struct {
	machine, identity string
	from, until       time.Time // until is zero while it lasts
}

func newAzureFacts() azureFacts {
	return azureFacts{defined: map[string]bool{}, bad: map[string]bool{}, immutable: map[string]bool{}, neverBound: map[string]bool{},
		foreign: map[string]map[string]bool{}, attachedFirst: map[string]map[string]bool{}, machineGone: map[string]bool{}}
}

func note(m map[string]map[string]bool, machine, identity string) {
	if m[machine] == nil {
		m[machine] = map[string]bool{}
	}
	m[machine][identity] = true
}

// attachedByOthers attaches an identity by hand, to stay.
func (w *world) attachedByOthers(machine, identity string) {
	w.must(w.arm.Attach(machine, identity))
	machine, identity = azure.FoldID(machine), azure.FoldID(identity)
	note(w.foreign, machine, identity)
	w.spans = append(w.spans, span{machine: machine, identity: identity, from: time.Now()})
}

// detachedByOthers detaches one by hand, whosever it was.
func (w *world) detachedByOthers(machine, identity string) {
	w.must(w.arm.Detach(machine, identity))
	w.noLongerForeign(azure.FoldID(machine), func(id string) bool { return id == azure.FoldID(identity) })
}

func (w *world) noLongerForeign(machine string, which func(identity string) bool) {
	for i, s := range w.spans {
		if s.machine == machine && which(s.identity) && s.until.IsZero() {
			w.spans[i].until = time.Now()
			delete(w.foreign[machine], s.identity)
		}
	}
}

// machineDeleted deletes a machine in Azure.
func (w *world) machineDeleted(id string) {
	w.arm.RemoveMachine(id)
	w.machineGone[azure.FoldID(id)] = true
	w.noLongerForeign(azure.FoldID(id), func(string) bool { return true })
}

// wasForeign reports whether what changed was somebody else's at the time.
func (w *world) wasForeign(c azure.ARMChange) bool {
	return slices.ContainsFunc(w.spans, func(s span) bool {
		return s.machine == c.Resource && s.identity == c.Identity && !c.Time.Before(s.from) && (s.until.IsZero() || c.Time.Before(s.until))
	})
}
