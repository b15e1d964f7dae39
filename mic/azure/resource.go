package azure

import (
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/podidentity/podidentity/internal/text"
)

// Kind is what kind of machine carries identities.
type Kind int

const (
	// VirtualMachine is a machine by itself; nodes of flexible scale sets are such, too.
	VirtualMachine Kind = iota
	// ScaleSet is a uniform scale set, whose instances share the identities of the set.
	ScaleSet
)

// String is the word for the kind in the names of operations.
func (k Kind) String() string {
	if k == ScaleSet {
		return "vmss"
	}
	return "vm"
}

func (k Kind) armType() string {
	if k == ScaleSet {
		return "virtualMachineScaleSets"
	}
	return "virtualMachines"
}

// Resource is a machine, as its nodes name it. Two that differ only in case are the same to Azure; compare by Key.
type Resource struct {
	Kind                                Kind
	SubscriptionID, ResourceGroup, Name string
}

// ID returns the ARM ID, spelled as the node spells it.
func (r Resource) ID() string {
	return "/subscriptions/" + r.SubscriptionID + "/resourceGroups/" + r.ResourceGroup + "/providers/Microsoft.Compute/" + r.Kind.armType() + "/" + r.Name
}

// Key returns what all spellings of the machine's ID have in common.
func (r Resource) Key() string { return Fold(r.ID()) }

// Fold returns what all spellings of an ARM ID have in common: Azure compares them without case.
func Fold(id string) string { return strings.ToLower(strings.TrimRight(id, "/")) }

// ErrNotAzure says that a node is no machine of Azure.
var ErrNotAzure = errors.New("the node has no provider ID of Azure")

// The words between the variable parts of a provider ID. The last two stand only where the node is an instance of a
// scale set.
const (
	machineSegments  = 8
	instanceSegments = 10
)

// maxSegment bounds the names in a provider ID. Azure's own longest, a resource group's, has 90 characters.
const maxSegment = 128

// ParseProviderID reads the spec.providerID of a Node. The instance of a scale set gives the scale set. The error is
// [ErrNotAzure] where the node is none of Azure's.
func ParseProviderID(s string) (Resource, error) {
	provider, id, ok := strings.Cut(s, "://")
	if !ok || !strings.EqualFold(provider, "azure") {
		return Resource{}, ErrNotAzure
	}
	malformed := func(what string) (Resource, error) {
		return Resource{}, fmt.Errorf("provider ID %q %s; it must be azure:///subscriptions/SUBSCRIPTION/resourceGroups/GROUP/providers/Microsoft.Compute/virtualMachines/NAME or .../virtualMachineScaleSets/NAME/virtualMachines/INSTANCE", text.OneLine(s, 512), what)
	}
	rest, ok := strings.CutPrefix(id, "/")
	if !ok {
		return malformed("has something between azure:// and the ID")
	}
	part := strings.Split(rest, "/")
	if len(part) != machineSegments && len(part) != instanceSegments {
		return malformed(fmt.Sprintf("has %d parts", len(part)))
	}
	r := Resource{SubscriptionID: part[1], ResourceGroup: part[3], Name: part[7]}
	names := []string{part[1], part[3], part[7]}
	words := []string{part[0], part[2], part[4], part[5], part[6]}
	want := []string{"subscriptions", "resourceGroups", "providers", "Microsoft.Compute", r.Kind.armType()}
	if len(part) == instanceSegments {
		r.Kind = ScaleSet
		want[4] = r.Kind.armType()
		words, want = append(words, part[8]), append(want, "virtualMachines")
		names = append(names, part[9])
	}
	for i := range want {
		if !strings.EqualFold(words[i], want[i]) {
			return malformed(fmt.Sprintf("has %q where %q belongs", text.OneLine(words[i], maxSegment), want[i]))
		}
	}
	for _, name := range names {
		if !isName(name) {
			return malformed(fmt.Sprintf("has %q for a name", text.OneLine(name, maxSegment)))
		}
	}
	return r, nil
}

// isName reports whether a part of an ID can stand in a path as it is, and means no other part of it.
func isName(s string) bool {
	if s == "" || len(s) > maxSegment || strings.Trim(s, ".") == "" {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-_.()", r)
	})
}

// Identity is a user-assigned identity of a machine, as ARM spells it.
type Identity struct{ ID, ClientID, PrincipalID string }

// State is what ARM says of a machine.
type State struct {
	// Identities are the user-assigned ones, by folded ID.
	Identities     map[string]Identity
	SystemAssigned bool
	// ProvisioningState is "Succeeded", "Updating", "Deleting" and the like. What is "Deleting" will take no update.
	ProvisioningState string
	// ETag is the version of the state; empty if ARM gave none.
	ETag string
}
