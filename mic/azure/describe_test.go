package azure

import "testing"

func TestParseIDReadsWhatIDReturns(t *testing.T) {
	for _, r := range []Resource{
		{VirtualMachine, "5ab51e11-0000-4000-8000-000000000002", "rg", "vm-1"},
		{ScaleSet, "5ab51e11-0000-4000-8000-000000000002", "MC_rg", "aks-nodes-vmss"},
	} {
		if got, err := ParseID(r.ID()); err != nil || got != r {
			t.Errorf("%s is read as %+v, %v", r.ID(), got, err)
		}
	}
	for _, id := range []string{"", "/subscriptions/s", "nodes", "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/disks/d"} {
		if got, err := ParseID(id); err == nil {
			t.Errorf("%q is read as %+v", id, got)
		}
	}
}

func TestDescribeReturnsWhatBeginSends(t *testing.T) {
	r := Resource{ScaleSet, "s", "g", "nodes"}
	basis := State{SystemAssigned: true, Identities: map[string]Identity{"/a": {ID: "/A"}, "/c": {ID: "/C"}}}
	const want = `PATCH /subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/virtualMachineScaleSets/nodes ` +
		`{"identity":{"type":"SystemAssigned, UserAssigned","userAssignedIdentities":{"/A":null,"/B":{}}}}`
	if got := Describe(r, basis, []string{"/B"}, []string{"/a"}); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
