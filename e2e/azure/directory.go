package azure

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// App is an application registered in Entra ID: a service principal that
// authenticates with a secret, a certificate or a federated credential.
type App struct {
	ClientID string `json:"clientID"`
	ObjectID string `json:"objectID"`
	// Tenants in which the application is registered. Empty means only the home
	// tenant of the fake Azure.
	Tenants      []string              `json:"tenants,omitempty"`
	Secrets      []AppSecret           `json:"secrets,omitempty"`
	Certificates []string              `json:"certificates,omitempty"` // PEM
	Federated    []FederatedCredential `json:"federated,omitempty"`
}

// AppSecret is a client secret. It never expires if Expires is zero.
type AppSecret struct {
	Value   string    `json:"value"`
	Expires time.Time `json:"expires,omitzero"`
}

// FederatedCredential trusts tokens of another issuer. It contains the issuer's key
// set, because the fake Entra ID, unlike the real one, cannot fetch it from the issuer.
type FederatedCredential struct {
	Issuer   string          `json:"issuer"`
	Subject  string          `json:"subject"`
	Audience string          `json:"audience"`
	JWKS     json.RawMessage `json:"jwks"`
}

// AttachedIdentity is a user-assigned identity, the nodes to which a Client attached
// it directly, and the machines to which it is attached in the fake ARM.
type AttachedIdentity struct {
	Identity
	Nodes    []string `json:"nodes"`
	Machines []string `json:"machines,omitempty"`
}

// caller is the source address of a connection, and the node that the address belongs
// to.
type caller struct {
	source  netip.Addr
	node    string // empty: the address belongs to no configured node
	fromPod bool
}

// directory has the identities, the applications, and the nodes to which identities
// are attached directly. The fake IMDS and the fake Entra ID read it, and the control
// API writes it. Only the fake ARM knows which identities are attached to a machine.
// The directory calls the fake ARM while it holds mu, so the fake ARM must never call
// the directory: the two locks could deadlock.
type directory struct {
	topology
	tenant string // read-only after construction
	arm    *ARM

	mu         sync.RWMutex
	identities map[string]Identity        // by folded resource ID
	attached   map[string]map[string]bool // node -> folded resource IDs, in addition to those of its machine
	apps       map[string]App             // by folded client ID
	federated  map[string][]FederatedCredential
}

// topology has the nodes and their machines. It does not change after newDirectory
// has created it.
type topology struct {
	nodes    []Node
	machines map[string]string // node -> folded ID of its machine in ARM, if it has one
}

func newDirectory(cfg Config, arm *ARM) *directory {
	d := &directory{
		topology: topology{cfg.Nodes, map[string]string{}}, tenant: cfg.Tenant, arm: arm,
		identities: map[string]Identity{}, attached: map[string]map[string]bool{},
		apps: map[string]App{}, federated: map[string][]FederatedCredential{},
	}
	for _, n := range cfg.Nodes {
		d.attached[n.Name] = map[string]bool{}
		if resource, ok := n.computeResource(); ok {
			d.machines[n.Name] = resource.key()
			if have, shared := arm.Machine(resource.id); !shared || have.SystemAssigned == nil {
				// This cannot fail: the ID is valid.
				_ = arm.AddMachine(Machine{ID: resource.id, SystemAssigned: n.SystemAssigned})
			}
		}
	}
	return d
}

func (t topology) callerOf(addr netip.Addr) caller {
	addr = addr.Unmap()
	c := caller{source: addr}
	best := -1
	for _, n := range t.nodes {
		for _, p := range n.Sources {
			if p.Contains(addr) && p.Bits() > best {
				best, c.node, c.fromPod = p.Bits(), n.Name, !p.IsSingleIP()
			}
		}
	}
	return c
}

func (t topology) node(name string) (Node, bool) {
	i := slices.IndexFunc(t.nodes, func(n Node) bool { return n.Name == name })
	if i < 0 {
		return Node{}, false
	}
	return t.nodes[i], true
}

// selectNodes returns the nodes with these names. No names, or the empty name,
// means all nodes.
func (t topology) selectNodes(names []string) ([]string, error) {
	all := make([]string, len(t.nodes))
	for i, n := range t.nodes {
		all[i] = n.Name
	}
	if len(names) == 0 || slices.Contains(names, "") {
		return all, nil
	}
	for _, name := range names {
		if !slices.Contains(all, name) {
			return nil, fmt.Errorf("no node %q; the nodes are %s", name, strings.Join(all, ", "))
		}
	}
	return names, nil
}

// addIdentity creates or replaces the identity with id's resource ID and attaches
// it to the nodes; no names, or the empty name, means all nodes. It does not detach
// the identity from other nodes. addIdentity is idempotent.
func (d *directory) addIdentity(id Identity, names []string) error {
	nodes, err := d.selectNodes(names)
	if err != nil {
		return err
	}
	return d.defineIdentity(id, nodes)
}

// defineIdentity does the same as addIdentity, except that without nodes it
// attaches the identity to no node. The nodes must exist.
func (d *directory) defineIdentity(id Identity, nodes []string) error {
	if err := validateUserAssigned(id); err != nil {
		return err
	}
	if id.TenantID == "" {
		id.TenantID = d.tenant
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	key := strings.ToLower(id.ResourceID)
	for other, have := range d.identities {
		if other != key && (strings.EqualFold(have.ClientID, id.ClientID) || strings.EqualFold(have.ObjectID, id.ObjectID)) {
			return fmt.Errorf("clientID %s or objectID %s already belongs to %s", id.ClientID, id.ObjectID, have.ResourceID)
		}
	}
	if _, ok := d.apps[strings.ToLower(id.ClientID)]; ok {
		return fmt.Errorf("clientID %s already belongs to an application", id.ClientID)
	}
	d.identities[key] = id
	for _, n := range nodes {
		d.attached[n][key] = true
	}
	return d.arm.DefineIdentity(id)
}

// detach detaches the identity from the nodes; no names, or the empty name, means
// all nodes. An unknown identity is an error. An identity that is not attached is
// not an error.
func (d *directory) detach(ref string, names []string) error {
	nodes, err := d.selectNodes(names)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	key, ok := d.findIdentity(ref)
	if !ok {
		return fmt.Errorf("no user-assigned identity %q", ref)
	}
	for _, n := range nodes {
		delete(d.attached[n], key)
	}
	return nil
}

// removeIdentity deletes the identity and its federated credentials, and detaches
// it from all nodes. Machines in ARM still list the identity: see
// ARM.DeleteIdentity. removeIdentity does nothing for an unknown identity.
func (d *directory) removeIdentity(ref string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	key, ok := d.findIdentity(ref)
	if !ok {
		return
	}
	delete(d.federated, strings.ToLower(d.identities[key].ClientID))
	delete(d.identities, key)
	d.arm.DeleteIdentity(key)
	for _, ids := range d.attached {
		delete(ids, key)
	}
}

// findIdentity returns the folded resource ID of the identity whose client, object or
// resource ID is ref, and whether it exists. The caller holds the lock.
func (d *directory) findIdentity(ref string) (string, bool) {
	for key, id := range d.identities {
		if strings.EqualFold(key, ref) || strings.EqualFold(id.ClientID, ref) || strings.EqualFold(id.ObjectID, ref) {
			return key, true
		}
	}
	return "", false
}

func (d *directory) listIdentities() []AttachedIdentity {
	machines := d.arm.Machines()
	d.mu.RLock()
	defer d.mu.RUnlock()
	out := make([]AttachedIdentity, 0, len(d.identities))
	for key, id := range d.identities {
		a := AttachedIdentity{Identity: id, Nodes: []string{}}
		for _, n := range d.nodes {
			if d.attached[n.Name][key] {
				a.Nodes = append(a.Nodes, n.Name)
			}
		}
		for _, m := range machines {
			if slices.Contains(m.Identities, key) {
				a.Machines = append(a.Machines, m.ID)
			}
		}
		out = append(out, a)
	}
	slices.SortFunc(out, func(a, b AttachedIdentity) int { return strings.Compare(a.ResourceID, b.ResourceID) })
	return out
}

// selector is the identity that a token request selects; at most one field is
// set.
type selector struct{ clientID, objectID, resourceID string }

// refusal is an error that consists only of its message, for example an error message of IMDS.
type refusal string

func (r refusal) Error() string { return string(r) }

const (
	errIdentityNotFound   refusal = "Identity not found"
	errMultipleIdentities refusal = "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"
)

// resolve returns the identity whose token IMDS issues for a request from the node. If
// sel is set, this is the identity that sel selects, provided that the node has it.
// Otherwise it is the node's system-assigned identity or, if the node has none, its
// only user-assigned identity. The error is a refusal.
func (d *directory) resolve(node string, sel selector) (Identity, error) {
	n, ok := d.node(node)
	if !ok {
		return Identity{}, errIdentityNotFound
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	system := d.systemAssigned(n)
	if sel == (selector{}) {
		return d.defaultIdentity(node, system)
	}
	if system != nil && sel.matches(*system) {
		return *system, nil
	}
	for key, id := range d.identities {
		if sel.matches(id) && d.provides(node, key) {
			return id, nil
		}
	}
	return Identity{}, errIdentityNotFound
}

// systemAssigned returns the system-assigned identity of the node, or nil. If the
// node's machine exists in the fake ARM without a system-assigned identity, the result
// is nil, whatever the configuration of the node says. Otherwise the result is
// Node.SystemAssigned or, if that is nil, the identity of the machine in the fake ARM.
func (d *directory) systemAssigned(n Node) *Identity {
	own := n.SystemAssigned
	if machine, ok := d.machines[n.Name]; ok {
		switch inARM, known := d.arm.systemAssigned(machine); {
		case !known:
		case inARM == nil:
			return nil
		case own == nil:
			own = inARM
		}
	}
	if own == nil {
		return nil
	}
	id := *own
	if id.TenantID == "" {
		id.TenantID = d.tenant
	}
	if id.ResourceID == "" {
		id.ResourceID = n.instance().resourceID
	}
	return &id
}

// provides reports whether IMDS of the node issues tokens for the user-assigned
// identity whose folded resource ID is key. The caller holds the lock.
func (d *directory) provides(node, key string) bool {
	return d.attached[node][key] || d.arm.provides(d.machines[node], d.identities[key])
}

func (d *directory) defaultIdentity(node string, system *Identity) (Identity, error) {
	if system != nil {
		return *system, nil
	}
	var only *Identity
	for key, id := range d.identities {
		if !d.provides(node, key) {
			continue
		}
		if only != nil {
			return Identity{}, errMultipleIdentities
		}
		only = &id
	}
	if only == nil {
		return Identity{}, errIdentityNotFound
	}
	return *only, nil
}

// machineOf returns the folded ID of the machine of the node with the name ref. If ref
// is not the name of a node, or the node has no machine in the fake ARM, machineOf
// returns ref itself, which may be the ID of a machine.
func (t topology) machineOf(ref string) string {
	if machine, ok := t.machines[ref]; ok {
		return machine
	}
	return ref
}

// resourceOf returns the resource ID of the identity whose client, object or resource
// ID is ref. If there is none, it returns ref.
func (d *directory) resourceOf(ref string) string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if key, ok := d.findIdentity(ref); ok {
		return d.identities[key].ResourceID
	}
	return ref
}

// showMachines returns the machines of the fake ARM, each with its nodes.
func (d *directory) showMachines() []Machine {
	out := d.arm.Machines()
	for i := range out {
		for _, n := range d.nodes {
			if d.machines[n.Name] == FoldID(out[i].ID) {
				out[i].Nodes = append(out[i].Nodes, n.Name)
			}
		}
	}
	return out
}

func (s selector) matches(id Identity) bool {
	switch {
	case s.clientID != "":
		return strings.EqualFold(s.clientID, id.ClientID)
	case s.objectID != "":
		return strings.EqualFold(s.objectID, id.ObjectID)
	}
	return strings.EqualFold(s.resourceID, id.ResourceID)
}
