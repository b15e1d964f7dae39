package mic

import (
	"slices"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
)

// azureState is the fake ARM, and what a test knows about Azure beyond the logs of the fake. All IDs in its fields have
// the form that azure.FoldID returns.
type azureState struct {
	t   testing.TB
	arm *azure.ARM

	existing   map[string]bool // identities that exist in Azure
	refused    map[string]bool // identities that Azure refuses to attach
	immutable  map[string]bool // identities that must never be detached
	neverBound map[string]bool // identities that no AzureIdentity ever references

	foreign           map[string]map[string]bool // by machine: identities that somebody other than MIC attached
	foreignPeriods    []foreignPeriod
	initiallyAttached map[string]map[string]bool // by machine: identities attached when the machine was created
	deletedMachines   map[string]bool            // machines that were deleted at any time
}

// foreignPeriod is a period during which an identity was on a machine because somebody other than MIC had attached it.
type foreignPeriod struct {
	machine, identity string
	from, until       time.Time // until is zero while the period lasts
}

func newAzureState(t testing.TB) azureState {
	return azureState{t: t, arm: azure.NewARM(azure.ARMOptions{}), existing: map[string]bool{}, refused: map[string]bool{}, immutable: map[string]bool{}, neverBound: map[string]bool{},
		foreign: map[string]map[string]bool{}, initiallyAttached: map[string]map[string]bool{}, deletedMachines: map[string]bool{}}
}

func addIdentity(m map[string]map[string]bool, machine, identity string) {
	if m[machine] == nil {
		m[machine] = map[string]bool{}
	}
	m[machine][identity] = true
}

// attachExternally attaches an identity as somebody other than MIC; MIC must not detach it.
func (s *azureState) attachExternally(machine, identity string) {
	requireNoError(s.t, s.arm.Attach(machine, identity))
	machine, identity = azure.FoldID(machine), azure.FoldID(identity)
	addIdentity(s.foreign, machine, identity)
	s.foreignPeriods = append(s.foreignPeriods, foreignPeriod{machine: machine, identity: identity, from: time.Now()})
}

// detachExternally detaches an identity as somebody other than MIC, no matter who attached it.
func (s *azureState) detachExternally(machine, identity string) {
	requireNoError(s.t, s.arm.Detach(machine, identity))
	s.endForeignPeriods(azure.FoldID(machine), func(id string) bool { return id == azure.FoldID(identity) })
}

func (s *azureState) endForeignPeriods(machine string, which func(identity string) bool) {
	for i, p := range s.foreignPeriods {
		if p.machine == machine && which(p.identity) && p.until.IsZero() {
			s.foreignPeriods[i].until = time.Now()
			delete(s.foreign[machine], p.identity)
		}
	}
}

func (s *azureState) deleteMachine(id string) {
	s.arm.RemoveMachine(id)
	s.deletedMachines[azure.FoldID(id)] = true
	s.endForeignPeriods(azure.FoldID(id), func(string) bool { return true })
}

// wasForeign reports whether c.Identity was, at c.Time, on c.Resource because somebody other than MIC had attached it.
func (s *azureState) wasForeign(c azure.ARMChange) bool {
	return slices.ContainsFunc(s.foreignPeriods, func(p foreignPeriod) bool {
		return p.machine == c.Resource && p.identity == c.Identity && !c.Time.Before(p.from) && (p.until.IsZero() || c.Time.Before(p.until))
	})
}
