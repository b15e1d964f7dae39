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
		t.Fatalf("%v for %d nodes", ids, len(nodeSpecs))
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
			t.Errorf("node %s has the provider ID %s", n.Name, n.ProviderID)
		}
		seen[n.ProviderID] = true
	}
}

func TestNodesResolveEntraIDAndARMToTheFakeAzure(t *testing.T) {
	for _, host := range []string{"login.microsoftonline.com", "management.azure.com"} {
		if !strings.Contains(azureHosts(), azureIP+" "+host+"\n") {
			t.Errorf("%s is not in\n%s", host, azureHosts())
		}
	}
}
