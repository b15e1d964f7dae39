package mic

import (
	"slices"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
)

// azureState is what a test knows about Azure beyond the logs of the fake ARM. IDs are folded.
type azureState struct {
	existing   map[string]bool // identities that exist in Azure
	refused    map[string]bool // identities that Azure refuses to attach
	immutable  map[string]bool // identities that must never be detached
	neverBound map[string]bool // identities that no AzureIdentity ever references

	foreign           map[string]map[string]bool // by machine: attached by somebody other than MIC
	foreignPeriods    []foreignPeriod
	initiallyAttached map[string]map[string]bool // by machine: attached from the start
	deletedMachines   map[string]bool            // machines that were deleted at any time
}

// foreignPeriod is a period during which an identity was attached by somebody other than MIC.
type foreignPeriod struct {
	machine, identity string
	from, until       time.Time // until is zero while the period lasts
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

// attachExternally attaches an identity as somebody other than MIC; MIC must not detach it.
func (sim *simulation) attachExternally(machine, identity string) {
	sim.requireNoError(sim.arm.Attach(machine, identity))
	machine, identity = azure.FoldID(machine), azure.FoldID(identity)
	addIdentity(sim.foreign, machine, identity)
	sim.foreignPeriods = append(sim.foreignPeriods, foreignPeriod{machine: machine, identity: identity, from: time.Now()})
}

// detachExternally detaches an identity as somebody other than MIC, whoever attached it.
func (sim *simulation) detachExternally(machine, identity string) {
	sim.requireNoError(sim.arm.Detach(machine, identity))
	sim.endForeignPeriods(azure.FoldID(machine), func(id string) bool { return id == azure.FoldID(identity) })
}

func (sim *simulation) endForeignPeriods(machine string, which func(identity string) bool) {
	for i, s := range sim.foreignPeriods {
		if s.machine == machine && which(s.identity) && s.until.IsZero() {
			sim.foreignPeriods[i].until = time.Now()
			delete(sim.foreign[machine], s.identity)
		}
	}
}

// deleteMachine deletes a machine in Azure.
func (sim *simulation) deleteMachine(id string) {
	sim.arm.RemoveMachine(id)
	sim.deletedMachines[azure.FoldID(id)] = true
	sim.endForeignPeriods(azure.FoldID(id), func(string) bool { return true })
}

// wasForeign reports whether the changed identity was attached by somebody other than MIC at that time.
func (sim *simulation) wasForeign(c azure.ARMChange) bool {
	return slices.ContainsFunc(sim.foreignPeriods, func(s foreignPeriod) bool {
		return s.machine == c.Resource && s.identity == c.Identity && !c.Time.Before(s.from) && (s.until.IsZero() || c.Time.Before(s.until))
	})
}
