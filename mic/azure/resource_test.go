package azure

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestAProviderIDIsParsedToItsMachine(t *testing.T) {
	cases := []struct {
		name, in string
		want     Resource
		id       string
	}{
		{
			"a virtual machine", "azure:///subscriptions/S/resourceGroups/RG/providers/Microsoft.Compute/virtualMachines/aks-1",
			Resource{VirtualMachine, "S", "RG", "aks-1"}, "/subscriptions/S/resourceGroups/RG/providers/Microsoft.Compute/virtualMachines/aks-1",
		},
		{
			"an instance of a scale set", "azure:///subscriptions/S/resourceGroups/mc_rg/providers/Microsoft.Compute/virtualMachineScaleSets/pool/virtualMachines/12",
			Resource{ScaleSet, "S", "mc_rg", "pool"}, "/subscriptions/S/resourceGroups/mc_rg/providers/Microsoft.Compute/virtualMachineScaleSets/pool",
		},
		{
			"words in any case", "AZURE:///SUBSCRIPTIONS/s/resourcegroups/rg/PROVIDERS/microsoft.compute/VIRTUALMACHINESCALESETS/Pool/virtualmachines/0",
			Resource{ScaleSet, "s", "rg", "Pool"}, "/subscriptions/s/resourceGroups/rg/providers/Microsoft.Compute/virtualMachineScaleSets/Pool",
		},
		{
			"all that a resource group may be called", "azure:///subscriptions/S/resourceGroups/Ä-1_(x).y/providers/Microsoft.Compute/virtualMachines/a",
			Resource{VirtualMachine, "S", "Ä-1_(x).y", "a"}, "/subscriptions/S/resourceGroups/Ä-1_(x).y/providers/Microsoft.Compute/virtualMachines/a",
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseProviderID(c.in)
			if err != nil || got != c.want || got.ID() != c.id || got.Key() != strings.ToLower(c.id) {
				t.Errorf("got %+v (%s), %v; want %+v (%s)", got, got.ID(), err, c.want, c.id)
			}
		})
	}
}

func TestOtherProviderIDsAreNotAzure(t *testing.T) {
	for _, s := range []string{"", "kind://docker/kind/node", "aws:///eu-1a/i-1", "gce://p/z/n", "node", "azurestack:///subscriptions/S"} {
		if _, err := ParseProviderID(s); !errors.Is(err, ErrNotAzure) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestAMalformedProviderIDIsRefusedWithAReason(t *testing.T) {
	const vm = "/subscriptions/S/resourceGroups/RG/providers/Microsoft.Compute/virtualMachines/"
	cases := []struct{ name, in, contains string }{
		{"a host", "azure://host" + vm + "n", "between"},
		{"nothing", "azure:///", "parts"},
		{"too short", "azure:///subscriptions/S", "parts"},
		{"a slash at the end", "azure://" + vm + "n/", "parts"},
		{"no name", "azure://" + vm, `"" for a name`},
		{"no group", "azure:///subscriptions/S/resourceGroups//providers/Microsoft.Compute/virtualMachines/n", `"" for a name`},
		{"a way up", "azure://" + vm + "..", `".." for a name`},
		{"a query", "azure://" + vm + "n?x=y", "for a name"},
		{"an escape", "azure://" + vm + "n%2fx", "for a name"},
		{"a backslash", "azure://" + vm + `n\x`, "for a name"},
		{"a line", "azure://" + vm + "n\nx", "for a name"},
		{"no text", "azure://" + vm + "n\xff", "for a name"},
		{"a name that is too long", "azure://" + vm + strings.Repeat("n", 200), "for a name"},
		{"another word", "azure:///subscriptions/S/groups/RG/providers/Microsoft.Compute/virtualMachines/n", `"groups" where "resourceGroups"`},
		{"a machine of Arc", "azure:///subscriptions/S/resourceGroups/RG/providers/Microsoft.HybridCompute/machines/n", `"Microsoft.HybridCompute" where "Microsoft.Compute"`},
		{"a scale set without an instance", "azure:///subscriptions/S/resourceGroups/RG/providers/Microsoft.Compute/virtualMachineScaleSets/n", `where "virtualMachines"`},
		{"an instance of a machine", "azure://" + vm + "n/virtualMachines/1", `where "virtualMachineScaleSets"`},
		{"an instance without a number", "azure:///subscriptions/S/resourceGroups/RG/providers/Microsoft.Compute/virtualMachineScaleSets/n/virtualMachines/", `"" for a name`},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseProviderID(c.in)
			if err == nil || errors.Is(err, ErrNotAzure) || !strings.Contains(err.Error(), c.contains) || strings.Contains(err.Error(), "\n") || !utf8.ValidString(err.Error()) {
				t.Errorf("got %+v, %v; want an error with %q", got, err, c.contains)
			}
		})
	}
}

func FuzzParseProviderID(f *testing.F) {
	for _, s := range []string{
		"", "azure://", "azure:///subscriptions/S/resourceGroups/RG/providers/Microsoft.Compute/virtualMachines/n",
		"azure:///subscriptions/S/resourceGroups/RG/providers/Microsoft.Compute/virtualMachineScaleSets/p/virtualMachines/0", "kind://docker/a/b",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseProviderID(s)
		if err != nil {
			return
		}
		if strings.ContainsAny(r.ID(), "?#%\\ \n\"") || strings.Contains(r.ID(), "/../") || strings.Count(r.ID(), "/") != 8 {
			t.Errorf("%q is taken for %q", s, r.ID())
		}
		if r.Kind == VirtualMachine {
			if again, err := ParseProviderID("azure://" + r.ID()); err != nil || again != r {
				t.Errorf("%q: %+v, and again %+v, %v", s, r, again, err)
			}
		}
	})
}
