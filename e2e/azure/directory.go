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

// App is an application registered in Entra ID: a service principal that can
// prove itself with a secret, a certificate or a federated token.
type App struct {
	ClientID string `json:"clientID"`
	ObjectID string `json:"objectID"`
	// Tenants the application is present in, the home tenant first.
	// Empty means the stand-in's home tenant only.
	Tenants      []string              `json:"tenants,omitempty"`
	Secrets      []AppSecret           `json:"secrets,omitempty"`
	Certificates []string              `json:"certificates,omitempty"` // PEM
	Federated    []FederatedCredential `json:"federated,omitempty"`
}

// AppSecret is a client secret; a zero Expires never expires.
type AppSecret struct {
	Value   string    `json:"value"`
	Expires time.Time `json:"expires,omitzero"`
}

// FederatedCredential trusts tokens of another issuer. The key set is given
// here because the stand-in has no route to the issuer's own.
type FederatedCredential struct {
	Issuer   string          `json:"issuer"`
	Subject  string          `json:"subject"`
	Audience string          `json:"audience"`
	JWKS     json.RawMessage `json:"jwks"`
}

// AttachedIdentity is a user-assigned identity and the nodes it is attached to.
type AttachedIdentity struct {
	Identity
	Nodes []string `json:"nodes"`
}

// caller is who a connection comes from.
type caller struct {
	source  netip.Addr
	node    string // empty: no node of this cloud
	fromPod bool
}

// directory holds who exists and what is attached where. Reads come from IMDS
// and Entra ID, writes from the control API.
type directory struct {
	tenant string
	nodes  []Node // read-only after construction

	mu         sync.RWMutex
	identities map[string]Identity        // by folded resource ID
	attached   map[string]map[string]bool // node -> folded resource IDs
	apps       map[string]App             // by folded client ID
	federated  map[string][]FederatedCredential
}

func newDirectory(cfg Config) *directory {
	d := &directory{
		tenant: cfg.Tenant, nodes: cfg.Nodes,
		identities: map[string]Identity{}, attached: map[string]map[string]bool{},
		apps: map[string]App{}, federated: map[string][]FederatedCredential{},
	}
	for _, n := range cfg.Nodes {
		d.attached[n.Name] = map[string]bool{}
	}
	return d
}

func (d *directory) callerOf(addr netip.Addr) caller {
	addr = addr.Unmap()
	c := caller{source: addr}
	best := -1
	for _, n := range d.nodes {
		for _, p := range n.Sources {
			if p.Contains(addr) && p.Bits() > best {
				best, c.node, c.fromPod = p.Bits(), n.Name, !p.IsSingleIP()
			}
		}
	}
	return c
}

func (d *directory) node(name string) (Node, bool) {
	i := slices.IndexFunc(d.nodes, func(n Node) bool { return n.Name == name })
	if i < 0 {
		return Node{}, false
	}
	return d.nodes[i], true
}

// pick expands "no names" and the empty name to every node.
func (d *directory) pick(names []string) ([]string, error) {
	all := make([]string, len(d.nodes))
	for i, n := range d.nodes {
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

// addIdentity is idempotent: it creates or replaces the identity of that
// resource ID and attaches it to the nodes, beside where it already is.
func (d *directory) addIdentity(id Identity, names []string) error {
	if err := validateUserAssigned(id); err != nil {
		return err
	}
	nodes, err := d.pick(names)
	if err != nil {
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
			return fmt.Errorf("clientID or objectID already belongs to %s", have.ResourceID)
		}
	}
	if _, ok := d.apps[strings.ToLower(id.ClientID)]; ok {
		return fmt.Errorf("clientID %s already belongs to an application", id.ClientID)
	}
	d.identities[key] = id
	for _, n := range nodes {
		d.attached[n][key] = true
	}
	return nil
}

// detach takes the identity off the nodes; one that is not attached is no error.
func (d *directory) detach(ref string, names []string) error {
	nodes, err := d.pick(names)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	key, ok := d.find(ref)
	if !ok {
		return fmt.Errorf("no user-assigned identity %q", ref)
	}
	for _, n := range nodes {
		delete(d.attached[n], key)
	}
	return nil
}

// removeIdentity deletes the identity everywhere; an unknown one is no error,
// because the caller wants it gone and it is.
func (d *directory) removeIdentity(ref string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	key, ok := d.find(ref)
	if !ok {
		return
	}
	delete(d.federated, strings.ToLower(d.identities[key].ClientID))
	delete(d.identities, key)
	for _, ids := range d.attached {
		delete(ids, key)
	}
}

// find takes a client, object or resource ID. The lock is held.
func (d *directory) find(ref string) (string, bool) {
	for key, id := range d.identities {
		if strings.EqualFold(key, ref) || strings.EqualFold(id.ClientID, ref) || strings.EqualFold(id.ObjectID, ref) {
			return key, true
		}
	}
	return "", false
}

func (d *directory) list() []AttachedIdentity {
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
		out = append(out, a)
	}
	slices.SortFunc(out, func(a, b AttachedIdentity) int { return strings.Compare(a.ResourceID, b.ResourceID) })
	return out
}

// selector is how a token request names an identity; at most one is set.
type selector struct{ clientID, objectID, resourceID string }

// refusal is an error in IMDS's own words.
type refusal string

func (r refusal) Error() string { return string(r) }

const (
	errIdentityNotFound   refusal = "Identity not found"
	errMultipleIdentities refusal = "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"
)

// resolve finds the identity a request from that node means: the selected one,
// else the system-assigned one, else the only user-assigned one.
func (d *directory) resolve(node string, sel selector) (Identity, error) {
	n, ok := d.node(node)
	if !ok {
		return Identity{}, errIdentityNotFound
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	var system *Identity
	if n.SystemAssigned != nil {
		id := *n.SystemAssigned
		if id.TenantID == "" {
			id.TenantID = d.tenant
		}
		if id.ResourceID == "" {
			id.ResourceID = n.machine().resourceID
		}
		system = &id
	}
	if sel == (selector{}) {
		return d.defaultIdentity(node, system)
	}
	if system != nil && sel.matches(*system) {
		return *system, nil
	}
	for key := range d.attached[node] {
		if id := d.identities[key]; sel.matches(id) {
			return id, nil
		}
	}
	return Identity{}, errIdentityNotFound
}

func (d *directory) defaultIdentity(node string, system *Identity) (Identity, error) {
	if system != nil {
		return *system, nil
	}
	switch attached := d.attached[node]; len(attached) {
	case 0:
		return Identity{}, errIdentityNotFound
	case 1:
		for key := range attached {
			return d.identities[key], nil
		}
	}
	return Identity{}, errMultipleIdentities
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
