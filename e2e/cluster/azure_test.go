package cluster

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/podidentity/podidentity/e2e/azure"
)

func TestTwoVMsMakesEachNodeAVirtualMachine(t *testing.T) {
	ids := TwoVMs()
	if len(ids) != len(nodeSpecs) {
		t.Fatalf("TwoVMs returned %v, want one provider ID for each of %d nodes", ids, len(nodeSpecs))
	}
	raw, err := azureConfigJSON(ids)
	if err != nil {
		t.Fatal(err)
	}
	var cfg azure.Config
	if err := json.Unmarshal(raw, &cfg); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, n := range cfg.Nodes {
		if seen[n.ProviderID] || !strings.HasSuffix(n.ProviderID, "/providers/Microsoft.Compute/virtualMachines/"+n.Name) {
			t.Errorf("node %s has the provider ID %s, want that of a virtual machine of its own, with the name of the node", n.Name, n.ProviderID)
		}
		seen[n.ProviderID] = true
	}
}

func TestNodesResolveEntraIDAndARMToTheFakeAzure(t *testing.T) {
	for _, host := range []string{"login.microsoftonline.com", "management.azure.com"} {
		if !strings.Contains(azureHosts(), azureIP+" "+host+"\n") {
			t.Errorf("nodes do not resolve %s to the fake Azure; their host entries:\n%s", host, azureHosts())
		}
	}
}
