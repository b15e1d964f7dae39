package mic

import (
	"slices"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
)

// azureState are what a test knows of Azure beyond what ARM's logs say. IDs are folded.
type azureState struct {
	existing   map[string]bool // identities that exist in Azure
	refused    map[string]bool // identities that Azure refuses to attach
	immutable  map[string]bool // identities that are never to be detached
	neverBound map[string]bool // identities that no AzureIdentity ever names

	foreign           map[string]map[string]bool // by machine: attached by somebody else than MIC
	foreignPeriods    []foreignPeriod
	initiallyAttached map[string]map[string]bool // by machine: attached from the start
	deletedMachines   map[string]bool            // machines that were deleted at some time
}

// foreignPeriod is a time during which an identity was on a machine for somebody else's sake.
type foreignPeriod struct {
	machine, identity string
	from, until       time.Time // until is zero while it lasts
}

func newAzureState() azureState {
	return azureState{existing: map[string]bool{}, refused: map[string]bool{}, immutable: map[string]bool{}, neverBound: map[string]bool{},
		foreign: map[string]map[string]bool{}, initiallyAttached: map[string]map[string]bool{}, deletedMachines: map[string]bool{}}
}

func addIdentity(m map[string]map[string]bool, machine, identity string) {
	if m[machine] == nil {
		m[machine] = map[string]bool{}
	}
	m[machine][identity] = true
}

// attachExternally attaches an identity by hand, to stay.
func (w *simulation) attachExternally(machine, identity string) {
	w.requireNoError(w.arm.Attach(machine, identity))
	machine, identity = azure.FoldID(machine), azure.FoldID(identity)
	addIdentity(w.foreign, machine, identity)
	w.foreignPeriods = append(w.foreignPeriods, foreignPeriod{machine: machine, identity: identity, from: time.Now()})
}

// detachExternally detaches one by hand, whosever it was.
func (w *simulation) detachExternally(machine, identity string) {
	w.requireNoError(w.arm.Detach(machine, identity))
	w.endForeignPeriods(azure.FoldID(machine), func(id string) bool { return id == azure.FoldID(identity) })
}

func (w *simulation) endForeignPeriods(machine string, which func(identity string) bool) {
	for i, s := range w.foreignPeriods {
		if s.machine == machine && which(s.identity) && s.until.IsZero() {
			w.foreignPeriods[i].until = time.Now()
			delete(w.foreign[machine], s.identity)
		}
	}
}

// deleteMachine deletes a machine in Azure.
func (w *simulation) deleteMachine(id string) {
	w.arm.RemoveMachine(id)
	w.deletedMachines[azure.FoldID(id)] = true
	w.endForeignPeriods(azure.FoldID(id), func(string) bool { return true })
}

// wasForeign reports whether what changed was somebody else's at the time.
func (w *simulation) wasForeign(c azure.ARMChange) bool {
	return slices.ContainsFunc(w.foreignPeriods, func(s foreignPeriod) bool {
		return s.machine == c.Resource && s.identity == c.Identity && !c.Time.Before(s.from) && (s.until.IsZero() || c.Time.Before(s.until))
	})
}
