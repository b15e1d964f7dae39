package azure

import (
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/podidentity/podidentity/internal/text"
)

// Kind is the kind of machine that has identities.
type Kind int

const (
	// VirtualMachine is a single virtual machine. Nodes of flexible scale sets are of this kind, too.
	VirtualMachine Kind = iota
	// ScaleSet is a uniform scale set, whose instances share the identities of the set.
	ScaleSet
)

// String returns the kind as it is used in names of operations.
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

// Resource identifies a machine, spelled as in the provider ID of its nodes. Azure ignores case, so compare Resources
// by Key.
type Resource struct {
	Kind                                Kind
	SubscriptionID, ResourceGroup, Name string
}

// ID returns the ARM ID, spelled as in the node's provider ID.
func (r Resource) ID() string {
	return "/subscriptions/" + r.SubscriptionID + "/resourceGroups/" + r.ResourceGroup + "/providers/Microsoft.Compute/" + r.Kind.armType() + "/" + r.Name
}

// Key returns the ID in the form that is equal for all spellings, see Fold.
func (r Resource) Key() string { return Fold(r.ID()) }

// Fold returns an ARM ID in the form that is equal for all its spellings: Azure ignores case.
func Fold(id string) string { return strings.ToLower(strings.TrimRight(id, "/")) }

// ErrNotAzure means that a node does not run in Azure.
var ErrNotAzure = errors.New("the node has no provider ID of Azure")

// The number of segments of a provider ID. The last two exist only if the node is an instance of a scale set.
const (
	machineSegments  = 8
	instanceSegments = 10
)

// maxSegment bounds the names in a provider ID. The longest that Azure allows, for a resource group, has 90 characters.
const maxSegment = 128

// ParseProviderID parses the spec.providerID of a Node. For an instance of a scale set it returns the scale set. The
// error is [ErrNotAzure] if the node does not run in Azure.
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
			return malformed(fmt.Sprintf("has %q where %q is expected", text.OneLine(words[i], maxSegment), want[i]))
		}
	}
	for _, name := range names {
		if !isName(name) {
			return malformed(fmt.Sprintf("has %q for a name", text.OneLine(name, maxSegment)))
		}
	}
	return r, nil
}

// isName reports whether a segment has only letters, digits and -_.(), is neither empty nor too long, and is not "." or
// "..".
func isName(s string) bool {
	if s == "" || len(s) > maxSegment || strings.Trim(s, ".") == "" {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-_.()", r)
	})
}

// Identity is a user-assigned identity of a machine, spelled as in ARM's response.
type Identity struct{ ID, ClientID, PrincipalID string }

// State is the state of a machine in ARM.
type State struct {
	// Identities are the user-assigned identities, by folded ID.
	Identities     map[string]Identity
	SystemAssigned bool
	// ProvisioningState is "Succeeded", "Updating", "Deleting" and so on. ARM refuses updates of a machine that is
	// "Deleting".
	ProvisioningState string
	// ETag is the version of the state; empty if ARM returned none.
	ETag string
}
