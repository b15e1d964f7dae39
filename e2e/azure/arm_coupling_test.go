package azure

import (
	"strings"
	"testing"
	"time"
)

// onMachines configures nodes a and c in one scale set, b on a virtual machine, and
// d on a machine outside of Azure.
func onMachines(c *Config) {
	node := func(name string, i string, providerID string) Node {
		n := testConfig("").Nodes[0]
		n.Name, n.ProviderID = name, providerID
		n.Sources = prefixes("127.0."+i+".1", "127.0."+i+"8.0/24")
		return n
	}
	c.Nodes = []Node{
		node("a", "1", "azure://"+setID+"/virtualMachines/0"), node("c", "5", "azure://"+strings.ToUpper(setID)+"/virtualMachines/7"),
		node("b", "3", "azure://"+vmID), node("d", "7", "kind://somewhere/d"),
	}
}

const nodeC, nodeD = "127.0.5.1", "127.0.7.1"

func (s *fakeAzure) machine(ref string) Machine {
	s.t.Helper()
	m, err := s.Machine(s.t.Context(), ref)
	s.must(err)
	return m
}

func TestIMDSProvidesAnIdentityWhereItIsAttachedToTheMachine(t *testing.T) {
	s := start(t, onMachines)
	ctx := t.Context()
	s.must(s.DefineIdentity(ctx, red))
	provides := func() string {
		var nodes []string
		for node, source := range map[string]string{"a": nodeA, "b": nodeB, "c": nodeC, "d": nodeD} {
			switch got := s.get(source, tokenQuery+"&client_id="+red.ClientID); {
			case got.status == 200:
				nodes = append(nodes, node)
			case !strings.Contains(got.body, "Identity not found"):
				t.Errorf("node %s: got %s, want a token or Identity not found", node, got.body)
			}
		}
		return joined(nodes)
	}
	must := func(want, when string) {
		t.Helper()
		if got := provides(); got != want {
			t.Errorf("red was %s: IMDS issues tokens for red on the nodes %q, want %q", when, got, want)
		}
	}
	must("", "defined")
	s.must(s.AttachTo(ctx, setID, red.ResourceID))
	must("a c", "attached to the scale set")
	s.must(s.AttachTo(ctx, "b", red.ClientID))
	must("a b c", "attached to b's machine")
	s.must(s.DetachFrom(ctx, "c", strings.ToUpper(red.ResourceID)))
	must("b", "detached from c's machine")
	s.add(red, "d")
	must("b d", "attached to node d itself")
	s.add(red, "a")
	must("a b d", "attached to node a itself")
	list, err := s.Identities(ctx)
	s.must(err)
	if len(list) != 1 || joined(list[0].Nodes) != "a d" || len(list[0].Machines) != 1 || list[0].Machines[0] != vmID {
		t.Errorf("got identities %+v, want red on the nodes a and d and on the machine of b", list)
	}
	s.must(s.RemoveIdentity(ctx, red.ClientID))
	must("", "deleted")
	if m := s.machine("b"); len(m.Identities) != 1 {
		t.Errorf("the machine of b does not list the deleted identity: %+v", m)
	}
	again := red
	again.ClientID = guid(500)
	s.must(s.DefineIdentity(ctx, again))
	if got := s.get(nodeB, tokenQuery+"&client_id="+again.ClientID); got.status != 400 {
		t.Errorf("token request for a new identity with the resource ID of the deleted one: got status %d, want 400",
			got.status)
	}
}

func TestTheDefaultIdentityIncludesThoseOfTheMachine(t *testing.T) {
	s := start(t, onMachines)
	ctx := t.Context()
	s.must(s.DefineIdentity(ctx, red))
	s.must(s.DefineIdentity(ctx, blue))
	s.must(s.AttachTo(ctx, "a", red.ResourceID))
	if got := s.get(nodeC, tokenQuery).token(t).ClientID; got != red.ClientID {
		t.Errorf("with one identity attached: got a token of %s, want red", got)
	}
	s.add(blue, "c")
	if got := s.get(nodeC, tokenQuery); got.body != `{"error":"invalid_request","error_description":"`+string(errMultipleIdentities)+`"}` {
		t.Errorf("with two identities attached: got %s, want the error for multiple identities", got.body)
	}
	s.add(red, "a")
	if got := s.get(nodeA, tokenQuery).token(t).ClientID; got != red.ClientID {
		t.Errorf("with red attached to the node and to its machine: got a token of %s, want red", got)
	}
}

func TestIMDSLearnsOfAnAttachedIdentityAfterADelay(t *testing.T) {
	s := start(t, onMachines)
	ctx := t.Context()
	s.set("arm.propagation=20s")
	s.must(s.DefineIdentity(ctx, red))
	s.must(s.AttachTo(ctx, "b", red.ResourceID))
	if got := s.get(nodeB, tokenQuery); !strings.Contains(got.body, "Identity not found") {
		t.Errorf("before the propagation time has passed: got %s, want Identity not found", got.body)
	}
	s.clock.advance(20 * time.Second)
	s.get(nodeB, tokenQuery).token(t)
	s.must(s.DetachFrom(ctx, "b", red.ResourceID))
	if got := s.get(nodeB, tokenQuery); got.status != 400 {
		t.Errorf("after detaching: got %s, want status 400", got.body)
	}
}

func TestIMDSDoesNotProvideARemovedSystemAssignedIdentity(t *testing.T) {
	s := start(t, onMachines, func(c *Config) { c.Nodes[1].SystemAssigned, c.Nodes[3].SystemAssigned = &system, &system })
	for _, source := range []string{nodeA, nodeC, nodeD} {
		if got := s.get(source, tokenQuery).token(t).ClientID; got != system.ClientID {
			t.Errorf("from address %s: got a token of %s, want the system-assigned identity", source, got)
		}
	}
	if got := s.get(nodeB, tokenQuery); got.status != 400 {
		t.Errorf("node b, which has no identity: got %s, want status 400", got.body)
	}
	if m := s.machine("a"); m.SystemAssigned == nil || m.SystemAssigned.ClientID != system.ClientID || joined(m.Nodes) != "a c" {
		t.Errorf("machine of a: %+v, want the system-assigned identity and the nodes a and c", m)
	}
	c := s.armClient()
	c.mustPatch(setID, "None")
	for _, source := range []string{nodeA, nodeC} {
		if got := s.get(source, tokenQuery); got.status != 400 {
			t.Errorf("from address %s, after the system-assigned identity was removed: got %s, want status 400",
				source, got.body)
		}
	}
	c.mustPatch(vmID, "SystemAssigned")
	if got := s.get(nodeB, tokenQuery).token(t).ClientID; got != s.machine("b").SystemAssigned.ClientID {
		t.Errorf("node b, after its machine got a system-assigned identity: got a token of %s, want that identity", got)
	}
}
