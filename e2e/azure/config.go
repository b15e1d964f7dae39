package azure

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
)

// Config has the addresses and the nodes of a fake Azure. It can be encoded as
// JSON, so that one process can write it for another.
type Config struct {
	IMDSAddr      string   `json:"imdsAddr"`      // host:port, plain HTTP
	EntraAddr     string   `json:"entraAddr"`     // host:port, TLS
	ControlSocket string   `json:"controlSocket"` // path of the unix socket a Client dials
	StateDir      string   `json:"stateDir"`      // path of the folder with the keys and ca.crt
	EntraHosts    []string `json:"entraHosts,omitempty"`
	ARMHosts      []string `json:"armHosts,omitempty"` // served by the same listener as Entra ID
	Tenant        string   `json:"tenant"`             // GUID of the home tenant
	Nodes         []Node   `json:"nodes"`
}

// Node is one virtual machine. Sources are the addresses from which the node and its
// pods send requests: a single address (/32, /128) is an address of the node itself,
// any other prefix is a range of pod addresses.
type Node struct {
	Name           string         `json:"name"`
	Sources        []netip.Prefix `json:"sources"`
	SystemAssigned *Identity      `json:"systemAssigned,omitempty"`
	// ProviderID is the node's spec.providerID. It determines the subscription,
	// resource group and scale set in the instance document, and the virtual
	// machine or scale set in the fake ARM. If it is empty, the node is instance 0
	// of its own scale set.
	ProviderID string `json:"providerID,omitempty"`
}

// Identity is a managed identity. An empty TenantID means the home tenant.
type Identity struct {
	ClientID   string `json:"clientID"`
	ObjectID   string `json:"objectID"`
	ResourceID string `json:"resourceID,omitempty"`
	TenantID   string `json:"tenantID,omitempty"`
}

// LoadConfig reads a Config from a JSON file and validates it. Unknown fields are an error.
func LoadConfig(file string) (Config, error) {
	var cfg Config
	data, err := os.ReadFile(file)
	if err != nil {
		return cfg, fmt.Errorf("reading the configuration of the fake Azure: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&cfg); err != nil {
		return cfg, fmt.Errorf("reading the configuration of the fake Azure from %s: %w", file, err)
	}
	if err := cfg.Validate(); err != nil {
		return cfg, fmt.Errorf("configuration of the fake Azure in %s: %w", file, err)
	}
	return cfg, nil
}

// Validate returns the errors that it finds in the configuration, joined.
func (c Config) Validate() error {
	var errs []error
	for _, a := range []struct{ name, addr string }{{"imdsAddr", c.IMDSAddr}, {"entraAddr", c.EntraAddr}} {
		if _, _, err := net.SplitHostPort(a.addr); err != nil {
			errs = append(errs, fmt.Errorf("%s %q is not host:port", a.name, a.addr))
		}
	}
	if c.ControlSocket == "" {
		errs = append(errs, errors.New("controlSocket is not set; it must be the path of a unix socket"))
	}
	if c.StateDir == "" {
		errs = append(errs, errors.New("stateDir is not set; it must be the path of a folder"))
	}
	if !isGUID(c.Tenant) {
		errs = append(errs, fmt.Errorf("tenant %q is not a GUID", c.Tenant))
	}
	return errors.Join(append(errs, validateNodes(c.Nodes))...)
}

func validateNodes(nodes []Node) error {
	var errs []error
	if len(nodes) == 0 {
		errs = append(errs, errors.New("nodes is not set; it must have at least one node"))
	}
	names := map[string]bool{}
	for i, n := range nodes {
		switch {
		case n.Name == "":
			errs = append(errs, fmt.Errorf("nodes[%d] has no name", i))
		case names[n.Name]:
			errs = append(errs, fmt.Errorf("node %q is given twice", n.Name))
		case len(n.Sources) == 0:
			errs = append(errs, fmt.Errorf("node %q has no source address ranges (sources)", n.Name))
		}
		names[n.Name] = true
		if n.SystemAssigned != nil {
			if err := validateIDs(*n.SystemAssigned); err != nil {
				errs = append(errs, fmt.Errorf("system-assigned identity of node %q: %w", n.Name, err))
			}
		}
		for _, other := range nodes[:i] {
			if p, q, ok := overlap(n.Sources, other.Sources); ok {
				errs = append(errs, fmt.Errorf("source address range %s of node %q overlaps source address range %s of node %q", p, n.Name, q, other.Name))
			}
		}
	}
	return errors.Join(errs...)
}

func overlap(a, b []netip.Prefix) (netip.Prefix, netip.Prefix, bool) {
	for _, p := range a {
		for _, q := range b {
			if p.Overlaps(q) {
				return p, q, true
			}
		}
	}
	return netip.Prefix{}, netip.Prefix{}, false
}

var guidForm = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

func isGUID(s string) bool { return guidForm.MatchString(s) }

func validateIDs(id Identity) error {
	if !isGUID(id.ClientID) {
		return fmt.Errorf("clientID %q is not a GUID", id.ClientID)
	}
	if !isGUID(id.ObjectID) {
		return fmt.Errorf("objectID %q is not a GUID", id.ObjectID)
	}
	if id.TenantID != "" && !isGUID(id.TenantID) {
		return fmt.Errorf("tenantID %q is not a GUID", id.TenantID)
	}
	return nil
}

var userAssignedForm = regexp.MustCompile(
	`(?i)^/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.ManagedIdentity/userAssignedIdentities/[^/]+$`)

func validateUserAssigned(id Identity) error {
	if err := validateIDs(id); err != nil {
		return err
	}
	if !userAssignedForm.MatchString(id.ResourceID) {
		return fmt.Errorf("resourceID %q is not the ID of a user-assigned identity"+
			" (/subscriptions/S/resourceGroups/G/providers/Microsoft.ManagedIdentity/userAssignedIdentities/NAME)", id.ResourceID)
	}
	return nil
}

// vmInstance is the parsed provider ID of a node.
type vmInstance struct {
	subscription, resourceGroup, scaleSet, name, resourceID string
}

// instance parses the provider ID. A node without a provider ID is instance 0 of
// its own scale set.
func (n Node) instance() vmInstance {
	id := strings.TrimPrefix(n.ProviderID, "azure://")
	if id == "" {
		id = "/subscriptions/00000000-0000-0000-0000-000000000001/resourceGroups/fake/providers/" +
			"Microsoft.Compute/virtualMachineScaleSets/" + n.Name + "/virtualMachines/0"
	}
	m := vmInstance{name: n.Name, resourceID: id}
	segments := strings.Split(strings.Trim(id, "/"), "/")
	for i := 0; i+1 < len(segments); i += 2 {
		switch value := segments[i+1]; strings.ToLower(segments[i]) {
		case "subscriptions":
			m.subscription = value
		case "resourcegroups":
			m.resourceGroup = value
		case "virtualmachinescalesets":
			m.scaleSet = value
		case "virtualmachines":
			m.name = value
		}
	}
	if m.scaleSet != "" {
		m.name = m.scaleSet + "_" + m.name
	}
	return m
}

var instanceForm = regexp.MustCompile(`(?i)^(.+)/virtualMachines/[^/]+$`)

// computeResource returns the ARM resource that has the identities of the node: its
// scale set or, if the node is in none, the virtual machine itself. It returns false
// if the provider ID names neither a scale set nor a virtual machine.
func (n Node) computeResource() (computeID, bool) {
	id := n.instance().resourceID
	if instance := instanceForm.FindStringSubmatch(id); instance != nil {
		if set, ok := parseComputeID(instance[1]); ok && set.kind == KindVMSS {
			return set, true
		}
	}
	return parseComputeID(id)
}
