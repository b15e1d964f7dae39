package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/podidentity/podidentity/e2e/azure"
)

// The Azure subscription that the cluster appears to run in.
const (
	TenantID       = "72f988bf-0000-4000-8000-000000000001"
	SubscriptionID = "5ab51e11-0000-4000-8000-000000000002"
	ResourceGroup  = "podidentity-e2e"
	ScaleSet       = "nodes"
)

// The host names of Entra ID and ARM. Nodes resolve them to the fake Azure.
var (
	entraHosts = []string{"login.microsoftonline.com"}
	armHosts   = []string{"management.azure.com"}
)

// TwoVMs returns Options.ProviderIDs that make each node a virtual machine of its own. By default both nodes are
// instances of one scale set, so an identity that is attached to the scale set is attached to both nodes.
func TwoVMs() map[string]string {
	ids := map[string]string{}
	for _, n := range nodeSpecs {
		ids[n.Name] = fmt.Sprintf("azure:///subscriptions/%s/resourceGroups/%s/providers/Microsoft.Compute/virtualMachines/%s",
			SubscriptionID, ResourceGroup, n.Name)
	}
	return ids
}

// azureConfigJSON returns the configuration of the fake Azure: the addresses at which it listens, in the namespace
// podid-azure, and for each node its source addresses. The fake IMDS finds the node of a request by the source address
// of the packets.
func azureConfigJSON(providerIDs map[string]string) (json.RawMessage, error) {
	cfg := azure.Config{
		IMDSAddr:      net.JoinHostPort(imdsIP, "80"),
		EntraAddr:     net.JoinHostPort(azureIP, "443"),
		ControlSocket: azureSocket,
		StateDir:      azureDir,
		EntraHosts:    entraHosts,
		ARMHosts:      armHosts,
		Tenant:        TenantID,
	}
	for i, n := range nodeSpecs {
		cfg.Nodes = append(cfg.Nodes, azure.Node{
			Name:           n.Name,
			Sources:        []netip.Prefix{netip.MustParsePrefix(n.IP + "/32"), netip.MustParsePrefix(n.PodCIDR)},
			ProviderID:     providerIDs[n.Name],
			SystemAssigned: systemAssigned(i),
		})
	}
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configuring the fake Azure: %w", err)
	}
	return json.Marshal(cfg)
}

// systemAssigned is the system-assigned identity of a node. If a pod gets a token of this identity, the pod has
// bypassed NMI, or an AzurePodIdentityException matches the pod. In standard mode, the chart creates an exception for
// the pods of MIC.
func systemAssigned(index int) *azure.Identity {
	return &azure.Identity{
		ClientID: fmt.Sprintf("5e1f0000-0000-4000-8000-%012d", index+1),
		ObjectID: fmt.Sprintf("5e1f0001-0000-4000-8000-%012d", index+1),
		TenantID: TenantID,
	}
}

func azureHosts() string {
	lines := ""
	for _, host := range slices.Concat(entraHosts, armHosts) {
		lines += azureIP + " " + host + "\n"
	}
	return lines
}

func azureReady(ctx context.Context) error { return azure.Dial(azureSocket).Ready(ctx) }

// Azure returns the client that controls the fake Azure.
func (c *Cluster) Azure() *azure.Client { return azure.Dial(azureSocket) }

// EntraCA is the path of the CA certificate of the fake Entra ID and ARM.
func (c *Cluster) EntraCA() string { return filepath.Join(azureDir, "ca.crt") }

// ServeAzure runs the fake Azure with a configuration file, until the context ends.
func ServeAzure(ctx context.Context, file string) error {
	cfg, err := azure.LoadConfig(file)
	if err != nil {
		return err
	}
	return azure.Run(ctx, cfg)
}

// Issuer returns what Entra ID needs to trust the tokens of this cluster's ServiceAccounts: the issuer URL and the keys
// of the issuer.
func (c *Cluster) Issuer(ctx context.Context) (url string, keys json.RawMessage, err error) {
	document, err := c.Kubectl(ctx, "get", "--raw", "/.well-known/openid-configuration")
	if err != nil {
		return "", nil, err
	}
	var configuration struct{ Issuer string }
	if err := json.Unmarshal([]byte(document), &configuration); err != nil || configuration.Issuer == "" {
		return "", nil, fmt.Errorf("no issuer in the API server's OpenID configuration (JSON error: %v): %s", err, document)
	}
	jwks, err := c.Kubectl(ctx, "get", "--raw", "/openid/v1/jwks")
	return configuration.Issuer, json.RawMessage(jwks), err
}

// Trust lets pods of a ServiceAccount of this cluster get tokens of an application or a managed identity: it adds a
// federated credential.
func (c *Cluster) Trust(ctx context.Context, clientID, namespace, serviceAccount string) error {
	issuer, keys, err := c.Issuer(ctx)
	if err != nil {
		return err
	}
	return c.Azure().AddFederated(ctx, clientID, azure.FederatedCredential{
		Issuer: issuer, Subject: "system:serviceaccount:" + namespace + ":" + serviceAccount, Audience: "api://AzureADTokenExchange", JWKS: keys,
	})
}
