package identity

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
)

const (
	clientA = "AAAAAAAA-0000-0000-0000-00000000000a"
	clientB = "bbbbbbbb-0000-0000-0000-00000000000b"
	objectA = "aaaaaaaa-1111-1111-1111-00000000000a"
)

func resource(name string) string {
	return "/subscriptions/s/resourcegroups/rg/providers/Microsoft.ManagedIdentity/userAssignedIdentities/" + name
}

func id(ns, name, client string) Identity {
	return Identity{Namespace: ns, Name: name, ClientID: client, ResourceID: resource(name)}
}

func bind(ns, identity, selector string) Binding {
	return Binding{Namespace: ns, Name: identity + "-binding", AzureIdentity: identity, Selector: selector}
}

func assignmentOf(ns, identity string) Assignment {
	return Assignment{IdentityNamespace: ns, IdentityName: identity, ResourceID: resource(identity), PodNamespace: "a", PodName: "p", PodUID: "uid-of-p", State: StateAssigned}
}

func labelled(ns, name, label string) Pod {
	return Pod{Namespace: ns, Name: name, UID: "uid-of-" + name, Labels: map[string]string{v1.BindingLabel: label}}
}

// decisionCase is a request of a pod with the decision about it.
type decisionCase struct {
	name    string
	rules   Rules
	pod     Pod
	want    Selector
	facts   Facts
	outcome Outcome
	reason  Reason
	chosen  string
}

// The facts of most cases: one bound identity, two bound identities, and one of another namespace.
var (
	one = Facts{Bindings: []Binding{bind("a", "x", "app")}, Identities: []Identity{id("a", "x", clientA)}}
	two = Facts{
		Bindings:   []Binding{bind("a", "x", "app"), bind("a", "y", "app")},
		Identities: []Identity{id("a", "x", clientA), id("a", "y", clientB)},
	}
	elsewhere = Facts{Bindings: []Binding{bind("b", "x", "app")}, Identities: []Identity{id("b", "x", clientA)}}
)

// assigned returns the facts of the variable one, with one assignment of its identity for each change.
func assigned(changes ...func(*Assignment)) Facts {
	f := one
	for _, change := range changes {
		a := assignmentOf("a", "x")
		change(&a)
		f.Assignments = append(f.Assignments, a)
	}
	return f
}

func state(s State) func(*Assignment) { return func(a *Assignment) { a.State = s } }

func hostPod(label string) Pod {
	p := labelled("a", "p", label)
	p.HostNetwork = true
	return p
}

func checkDecisions(t *testing.T, cases []decisionCase) {
	t.Helper()
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			d := Decide(c.rules, c.pod, c.want, c.facts)
			chosen := ""
			if d.Identity != nil {
				chosen = d.Identity.Key()
			}
			if d.Outcome != c.outcome || d.Reason != c.reason || chosen != c.chosen {
				t.Errorf("got outcome %d, reason %s, identity %q; want %d, %s, %q\n%s", d.Outcome, d.Reason, chosen, c.outcome, c.reason, c.chosen, d.Detail)
			}
			if (d.Outcome == Granted) != (d.Detail == "") {
				t.Errorf("outcome %d with detail %q; want a detail unless the outcome is Granted (%d)", d.Outcome, d.Detail, Granted)
			}
		})
	}
}

func TestTheDecisionInManagedMode(t *testing.T) {
	managed, exceptHost := Rules{Mode: Managed}, Rules{Mode: Managed, ExceptUnlabelledHostPods: true}
	withObjectID := two
	withObjectID.Identities = []Identity{two.Identities[0], two.Identities[1]}
	withObjectID.Identities[0].ObjectID = objectA
	twins := Facts{
		Bindings:   []Binding{bind("a", "x", "app"), bind("a", "x2", "app")},
		Identities: []Identity{id("a", "x", clientA), {Namespace: "a", Name: "x2", ClientID: strings.ToLower(clientA), ResourceID: strings.ToUpper(resource("x"))}},
	}
	rivals := Facts{
		Bindings:   []Binding{bind("a", "x", "app"), bind("a", "sp", "app")},
		Identities: []Identity{id("a", "x", clientA), {Namespace: "a", Name: "sp", Kind: ServicePrincipalSecret, ClientID: clientA, TenantID: "t"}},
	}
	excepted := two
	excepted.Exceptions = []Exception{{Namespace: "a", Name: "e", PodLabels: map[string]string{"none": "x", v1.BindingLabel: "APP"}}}
	exceptionElsewhere := one
	exceptionElsewhere.Exceptions = []Exception{{Namespace: "b", Name: "e", PodLabels: map[string]string{v1.BindingLabel: "app"}}}
	pod := labelled("a", "p", "app")
	checkDecisions(t, []decisionCase{
		{"the only bound identity is the default", managed, pod, Selector{}, one, Granted, Allowed, "a/x"},
		{"a pod without the label gets nothing", managed, Pod{Namespace: "a", Name: "p"}, Selector{}, one, Refused, PodNotLabelled, ""},
		{"an empty label is no label", managed, labelled("a", "p", ""), Selector{}, Facts{Bindings: []Binding{bind("a", "x", "")}, Identities: one.Identities}, Refused, PodNotLabelled, ""},
		{"the selector compares with case", managed, labelled("a", "p", "App"), Selector{}, one, Refused, NoMatchingBinding, ""},
		{"a binding whose identity is gone", managed, pod, Selector{}, Facts{Bindings: one.Bindings}, Refused, IdentityMissing, ""},
		{"a missing identity does not spoil the other", managed, pod, Selector{}, Facts{Bindings: two.Bindings, Identities: one.Identities}, Granted, Allowed, "a/x"},
		{"an identity of the same name in another namespace does not stand in", managed, pod, Selector{}, Facts{Bindings: one.Bindings, Identities: []Identity{id("b", "x", clientA)}}, Refused, IdentityMissing, ""},
		{"two identities and no wish", managed, pod, Selector{}, two, Refused, MultipleIdentities, ""},
		{"two identities, by client id without case", managed, pod, Selector{ClientID: strings.ToUpper(clientB)}, two, Granted, Allowed, "a/y"},
		{"two identities, by resource id without case", managed, pod, Selector{ResourceID: strings.ToUpper(resource("x"))}, two, Granted, Allowed, "a/x"},
		{"two identities, by object id", managed, pod, Selector{ObjectID: strings.ToUpper(objectA)}, withObjectID, Granted, Allowed, "a/x"},
		{"an unknown object id", managed, pod, Selector{ObjectID: clientB}, withObjectID, Refused, IdentityNotBound, ""},
		{"a client id of nobody", managed, pod, Selector{ClientID: "cccccccc-0000-0000-0000-00000000000c"}, two, Refused, IdentityNotBound, ""},
		{"one identity is no excuse to ignore the wish", managed, pod, Selector{ClientID: clientB}, one, Refused, IdentityNotBound, ""},
		{"managed mode does not look across namespaces", managed, pod, Selector{}, elsewhere, Refused, NoMatchingBinding, ""},
		{"two objects with the same credential count as one", managed, pod, Selector{}, twins, Granted, Allowed, "a/x"},
		{"one client id, two kinds of credential", managed, pod, Selector{ClientID: clientA}, rivals, Refused, IdentityAmbiguous, ""},
		{"two bindings to one identity", managed, pod, Selector{}, Facts{Bindings: append([]Binding{{Namespace: "a", Name: "again", AzureIdentity: "x", Selector: "app"}}, one.Bindings...), Identities: one.Identities}, Granted, Allowed, "a/x"},
		{"an invalid identity", managed, pod, Selector{}, Facts{Bindings: one.Bindings, Identities: []Identity{{Namespace: "a", Name: "x", ClientID: "me", ResourceID: resource("x")}}}, Refused, IdentityInvalid, ""},
		{"an identity of a kind nobody knows", managed, pod, Selector{}, Facts{Bindings: one.Bindings, Identities: []Identity{{Namespace: "a", Name: "x", Kind: 7, ClientID: clientA}}}, Refused, IdentityInvalid, ""},
		{"a pod in the host network that is not excepted", managed, hostPod("app"), Selector{}, one, Granted, Allowed, "a/x"},
		{"an unlabelled pod in the host network", managed, hostPod(""), Selector{}, one, Refused, PodNotLabelled, ""},
		{"an unlabelled pod in the host network, where they are excepted", exceptHost, hostPod(""), Selector{}, one, Granted, Excepted, ""},
		{"a labelled pod in the host network, where unlabelled ones are excepted", exceptHost, hostPod("app"), Selector{}, one, Granted, Allowed, "a/x"},
		{"an unlabelled pod outside the host network", exceptHost, Pod{Namespace: "a", Name: "p"}, Selector{}, one, Refused, PodNotLabelled, ""},
		{"an excepted pod", managed, pod, Selector{}, excepted, Granted, Excepted, ""},
		{"an exception of another namespace", managed, pod, Selector{}, exceptionElsewhere, Granted, Allowed, "a/x"},
		{"in managed mode assignments are ignored", managed, pod, Selector{}, assigned(state(StateUnassigned)), Granted, Allowed, "a/x"},
	})
}

func TestTheDecisionInStandardMode(t *testing.T) {
	standard := Rules{Mode: Standard}
	confined := Facts{Bindings: elsewhere.Bindings, Identities: []Identity{{Namespace: "b", Name: "x", ClientID: clientA, ResourceID: resource("x"), Namespaced: true}}}
	unowned := func(s State) func(*Assignment) { return func(a *Assignment) { a.State, a.PodUID = s, "" } }
	failed := func(why string) func(*Assignment) {
		return func(a *Assignment) { a.State, a.Message = StateCreated, why }
	}
	principal := Facts{Bindings: one.Bindings, Identities: []Identity{{Namespace: "a", Name: "x", Kind: Federated, ClientID: clientA, TenantID: "t"}}}
	principalAssigned := principal
	principalAssigned.Assignments = []Assignment{assignmentOf("a", "x")}
	principalAssigned.Assignments[0].Kind, principalAssigned.Assignments[0].ResourceID = Federated, ""
	onceUserAssigned := principal
	onceUserAssigned.Assignments = []Assignment{assignmentOf("a", "x")}
	pod := labelled("a", "p", "app")
	checkDecisions(t, []decisionCase{
		{"standard mode looks across namespaces, but waits for the assignment", standard, pod, Selector{}, elsewhere, Pending, AssignmentPending, "b/x"},
		{"standard mode with forced namespaces", Rules{Mode: Standard, ForceNamespaced: true}, pod, Selector{}, elsewhere, Refused, NoMatchingBinding, ""},
		{"an identity confined to its namespace", standard, pod, Selector{}, confined, Refused, NoMatchingBinding, ""},
		{"assigned", standard, pod, Selector{}, assigned(state(StateAssigned)), Granted, Allowed, "a/x"},
		{"assigned by AAD Pod Identity", standard, pod, Selector{}, assigned(unowned(StateAssigned)), Granted, Allowed, "a/x"},
		{"assigned by a version of AAD Pod Identity without states", standard, pod, Selector{}, assigned(unowned(StateLegacy)), Granted, Allowed, "a/x"},
		{"without a word of MIC yet", standard, pod, Selector{}, assigned(state(StateLegacy)), Pending, AssignmentPending, "a/x"},
		{"created only", standard, pod, Selector{}, assigned(state(StateCreated)), Pending, AssignmentPending, "a/x"},
		{"unassigned", standard, pod, Selector{}, assigned(state(StateUnassigned)), Pending, AssignmentPending, "a/x"},
		{"in a state that nobody knows", standard, pod, Selector{}, assigned(state("Assigning")), Pending, AssignmentPending, "a/x"},
		{"refused by Azure", standard, pod, Selector{}, assigned(failed("no role")), Pending, AssignmentFailed, "a/x"},
		{"refused by Azure, and gone since", standard, pod, Selector{}, assigned(func(a *Assignment) { failed("no role")(a); a.State = StateUnassigned }), Pending, AssignmentPending, "a/x"},
		{"one that is created and one that is assigned", standard, pod, Selector{}, assigned(failed("no role"), state(StateAssigned)), Granted, Allowed, "a/x"},
		{"of a pod of the name in another namespace", standard, pod, Selector{}, assigned(func(a *Assignment) { a.PodNamespace = "b" }), Pending, AssignmentPending, "a/x"},
		{"of another pod", standard, pod, Selector{}, assigned(func(a *Assignment) { a.PodName = "p-2" }), Pending, AssignmentPending, "a/x"},
		{"of an earlier pod of the name", standard, pod, Selector{}, assigned(func(a *Assignment) { a.PodUID = "earlier" }), Pending, AssignmentPending, "a/x"},
		{"of another identity", standard, pod, Selector{}, assigned(func(a *Assignment) { a.IdentityName = "y" }), Pending, AssignmentPending, "a/x"},
		{"of an identity of the name in another namespace", standard, pod, Selector{}, assigned(func(a *Assignment) { a.IdentityNamespace = "b" }), Pending, AssignmentPending, "a/x"},
		{"of what the identity was before", standard, pod, Selector{}, assigned(func(a *Assignment) { a.ResourceID = resource("before") }), Pending, AssignmentPending, "a/x"},
		{"of a resource that is spelled otherwise", standard, pod, Selector{}, assigned(func(a *Assignment) { a.ResourceID = strings.ToUpper(a.ResourceID) + "/" }), Granted, Allowed, "a/x"},
		{"of no user-assigned identity", standard, pod, Selector{}, principalAssigned, Granted, Allowed, "a/x"},
		{"of what was a user-assigned identity", standard, pod, Selector{}, onceUserAssigned, Pending, AssignmentPending, "a/x"},
	})
}

func TestResourceIDsOfUserAssignedIdentitiesAreRecognized(t *testing.T) {
	for id, want := range map[string]bool{
		resource("x"): true, strings.ToUpper(resource("x")): true, resource("x") + "/": true,
		"": false, "/": false, resource(""): false, resource("x") + "/y": false, resource("x") + "//": false, "x" + resource("x"): false, resource("x")[1:]: false,
		strings.Replace(resource("x"), "/s/", "//", 1):                                        false,
		"/subscriptions/s/resourcegroups/rg/providers/Microsoft.Compute/virtualMachines/x":    false,
		"/subscriptions/s/providers/Microsoft.ManagedIdentity/userAssignedIdentities/x":       false,
		"/subscriptions/s/resourcegroups/rg/providers/Microsoft.ManagedIdentity/identities/x": false,
	} {
		if got := isUserAssignedID(id); got != want {
			t.Errorf("isUserAssignedID(%q) = %v", id, got)
		}
	}
	for id, want := range map[string]bool{clientA: true, strings.ToLower(clientA): true, "": false, clientA[1:]: false, clientA + "0": false, strings.Replace(clientA, "-", "0", 1): false, strings.Replace(clientA, "A", "g", 1): false} {
		if got := isGUID(id); got != want {
			t.Errorf("isGUID(%q) = %v", id, got)
		}
	}
}

func TestAnInvalidIdentityIsRefusedWithAdvice(t *testing.T) {
	good := Identity{Namespace: "a", Name: "x", Kind: ServicePrincipalSecret, ClientID: clientA, TenantID: "contoso.example", SecretNamespace: "a", SecretName: "s", ADEndpoint: "https://login.example:8443/"}
	if problem := good.Problem(); problem != "" {
		t.Fatal(problem)
	}
	for _, c := range []struct {
		name   string
		change func(*Identity)
		says   string
	}{
		{"no client", func(i *Identity) { i.ClientID = "" }, "spec.clientID"},
		{"no tenant", func(i *Identity) { i.TenantID = "" }, "spec.tenantID"},
		{"a tenant that leads elsewhere", func(i *Identity) { i.TenantID = "t/../x" }, "tenant"},
		{"a tenant of dots", func(i *Identity) { i.TenantID = ".." }, "tenant"},
		{"a tenant that is none", func(i *Identity) { i.TenantID = "common" }, "tenant"},
		{"an auxiliary tenant that is none", func(i *Identity) { i.AuxiliaryTenantIDs = []string{"t", "a b"} }, "auxiliaryTenantIDs"},
		{"a hundred tenants", func(i *Identity) { i.AuxiliaryTenantIDs = strings.Split(strings.Repeat("t,", 99)+"t", ",") }, "at most 10"},
		{"no Secret", func(i *Identity) { i.SecretName = "" }, "clientPassword"},
		{"an endpoint without TLS", func(i *Identity) { i.ADEndpoint = "http://login.example" }, "https://"},
		{"an endpoint with a path", func(i *Identity) { i.ADEndpoint = "https://login.example/x" }, "scheme and host"},
		{"an endpoint with a user", func(i *Identity) { i.ADEndpoint = "https://a@login.example" }, "scheme and host"},
		{"an endpoint with a query", func(i *Identity) { i.ADEndpoint = "https://login.example?x=y" }, "scheme and host"},
		{"an endpoint that is no URL", func(i *Identity) { i.ADEndpoint = "https://%zz" }, "not a URL"},
		{"a federated client that is no GUID", func(i *Identity) { i.Kind, i.ClientID = Federated, "app" }, "GUID"},
	} {
		i := good
		c.change(&i)
		if problem := i.Problem(); !strings.Contains(problem, c.says) {
			t.Errorf("%s: %q", c.name, problem)
		}
	}
}

func TestAuthoritiesAreParsedToSchemeAndHost(t *testing.T) {
	for in, want := range map[string]string{
		"https://login.microsoftonline.com/": "https://login.microsoftonline.com", "https://Login.MicrosoftOnline.com": "https://login.microsoftonline.com",
		"https://adfs.example:8443//": "https://adfs.example:8443",
	} {
		if got, err := ParseAuthority(in); err != nil || got != want {
			t.Errorf("%s: %q, %v", in, got, err)
		}
	}
}

func TestASecretOfAnotherNamespaceIsUsedOnlyIfAllowed(t *testing.T) {
	i := Identity{Namespace: "a", Name: "x", Kind: ServicePrincipalCertificate, ClientID: clientA, TenantID: "t", SecretNamespace: "b", SecretName: "s"}
	facts := Facts{Bindings: []Binding{bind("a", "x", "app")}, Identities: []Identity{i}}
	if d := Decide(Rules{}, labelled("a", "p", "app"), Selector{}, facts); d.Reason != SecretNotAllowed || !strings.Contains(d.Detail, "b/s") {
		t.Errorf("got %+v", d)
	}
	if d := Decide(Rules{AllowCrossNamespaceSecrets: true}, labelled("a", "p", "app"), Selector{}, facts); d.Outcome != Granted {
		t.Errorf("got %+v", d)
	}
}

// Caches list objects in random order.
func TestTheDecisionDoesNotDependOnTheOrderOfObjects(t *testing.T) {
	a := Facts{
		Bindings:   []Binding{bind("a", "x", "app"), bind("b", "y", "app"), bind("a", "z", "app")},
		Identities: []Identity{id("a", "x", clientA), id("b", "y", clientB), id("a", "z", clientB)},
	}
	b := Facts{Bindings: []Binding{a.Bindings[2], a.Bindings[0], a.Bindings[1]}, Identities: []Identity{a.Identities[1], a.Identities[2], a.Identities[0]}}
	for _, want := range []Selector{{}, {ClientID: clientA}, {ClientID: clientB}} {
		pod := labelled("a", "p", "app")
		x, y := Decide(Rules{Mode: Standard}, pod, want, a), Decide(Rules{Mode: Standard}, pod, want, b)
		if fmt.Sprint(x.Outcome, x.Reason, x.Detail) != fmt.Sprint(y.Outcome, y.Reason, y.Detail) {
			t.Errorf("%s: the decision depends on the order of the objects: %+v and %+v", want, x, y)
		}
	}
}

func TestTheMessageOfSeveralAssignmentsDoesNotDependOnTheirOrder(t *testing.T) {
	created, failed, other := assignmentOf("a", "x"), assignmentOf("a", "x"), assignmentOf("a", "x")
	created.State, failed.State, other.State = StateCreated, StateCreated, StateCreated
	failed.Message, other.Message = "no role", "a hung PATCH"
	x := id("a", "x", clientA)
	first := Assigned(labelled("a", "p", "app"), &x, []Assignment{created, failed, other})
	second := Assigned(labelled("a", "p", "app"), &x, []Assignment{other, failed, created})
	if first.Detail != second.Detail || first.Reason != AssignmentFailed || !strings.HasSuffix(first.Detail, ": no role") {
		t.Errorf("the decisions are %+v and %+v; want the same detail, with the message \"no role\"", first, second)
	}
}

func TestAnAssignmentIsReadFromItsObject(t *testing.T) {
	object := func(change func(*v1.AzureAssignedIdentity)) *v1.AzureAssignedIdentity {
		o := &v1.AzureAssignedIdentity{
			ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p-x-1", OwnerReferences: []metav1.OwnerReference{
				{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "r", UID: "uid-of-r"}, {APIVersion: "v1", Kind: "Pod", Name: "p", UID: "uid-of-p"}}},
			Spec: v1.AzureAssignedIdentitySpec{Pod: "p", PodNamespace: "a", NodeName: "n", AzureIdentityRef: &v1.AzureIdentityCopy{
				Metadata: metav1.ObjectMeta{Namespace: "b", Name: "x"}, Spec: v1.AzureIdentitySpec{ResourceID: resource("x"), ClientID: clientA}}},
			Status: v1.AzureAssignedIdentityStatus{Status: v1.AssignmentAssigned},
		}
		change(o)
		return o
	}
	want := Assignment{IdentityNamespace: "b", IdentityName: "x", ResourceID: resource("x"), PodNamespace: "a", PodName: "p", PodUID: "uid-of-p", State: StateAssigned}
	for _, c := range []struct {
		name           string
		change         func(*v1.AzureAssignedIdentity)
		expect         func(*Assignment)
		covers, usable bool
	}{
		{"MIC's", func(*v1.AzureAssignedIdentity) {}, func(*Assignment) {}, true, true},
		{"of AAD Pod Identity", func(o *v1.AzureAssignedIdentity) { o.OwnerReferences, o.Status.Status = nil, "" }, func(a *Assignment) { a.PodUID, a.State = "", StateLegacy }, true, true},
		{"just created", func(o *v1.AzureAssignedIdentity) { o.Status.Status = "" }, func(a *Assignment) { a.State = StateLegacy }, true, false},
		{"without a copy of the identity", func(o *v1.AzureAssignedIdentity) { o.Spec.AzureIdentityRef = nil }, func(a *Assignment) { a.IdentityNamespace, a.IdentityName, a.ResourceID = "", "", "" }, false, true},
		{"with a text of Azure's", func(o *v1.AzureAssignedIdentity) {
			o.Status.Status, o.Status.Message = v1.AssignmentCreated, " Grant\nthe role\x00\t\x1b[1m to \xff MIC "
		}, func(a *Assignment) { a.State, a.Message = StateCreated, "Grant the role [1m to MIC" }, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			expected := want
			c.expect(&expected)
			got := FromAzureAssignedIdentity(object(c.change))
			if diff := cmp.Diff(expected, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			x := id("b", "x", clientA)
			if covers := got.Covers(labelled("a", "p", ""), &x); covers != c.covers || got.Usable() != c.usable {
				t.Errorf("covers the pod and the identity: %t, usable: %t", covers, got.Usable())
			}
		})
	}
	long := FromAzureAssignedIdentity(object(func(o *v1.AzureAssignedIdentity) { o.Status.Message = strings.Repeat("€ ", 5000) })).Message
	if len(long) > maxMessage || !utf8.ValidString(long) || !strings.HasSuffix(long, "…") {
		t.Errorf("a long text is kept as %d bytes, ending in %q", len(long), long[len(long)-6:])
	}
}

// FuzzDecide checks for all inputs that a granted identity is bound to the pod by an equal selector in an allowed
// namespace. In standard mode the identity must also be assigned: to the pod with this UID (or by an object without an
// owner), and with the current type and resource ID of the identity.
func FuzzDecide(f *testing.F) {
	assigned, uid := string(StateAssigned), "uid-of-p"
	f.Add("a", "app", "a", "x", "app", clientA, clientA, false, "", "", "", 0)
	f.Add("a", "app", "b", "x", "app", clientA, "", true, assigned, uid, resource("x"), 0)
	f.Add("a", "app", "b", "x", "app", clientA, "", true, assigned, uid, resource("before"), 0)
	f.Add("a", "app", "b", "x", "app", clientA, "", true, assigned, "uid-of-another", resource("x"), 0)
	f.Add("a", "app", "b", "x", "app", clientA, "", true, "", uid, resource("x"), 0)
	f.Add("a", "app", "b", "x", "app", clientA, "", true, "", "", strings.ToUpper(resource("x"))+"/", 0)
	f.Add("a", "", "a", "x", "", clientA, "", false, "", "", "", 1)
	f.Fuzz(func(t *testing.T, podNS, label, bindNS, name, selector, client, wish string, standard bool, state, owner, resourceID string, kind int) {
		rules := Rules{}
		facts := Facts{Bindings: []Binding{{Namespace: bindNS, Name: "b", AzureIdentity: name, Selector: selector}}, Identities: []Identity{{Namespace: bindNS, Name: name, ClientID: client, ResourceID: resource("x")}}}
		if standard {
			rules.Mode = Standard
			facts.Assignments = []Assignment{{IdentityNamespace: bindNS, IdentityName: name, Kind: Kind(kind), ResourceID: resourceID, PodNamespace: podNS, PodName: "p", PodUID: owner, State: State(state)}}
		}
		d := Decide(rules, labelled(podNS, "p", label), Selector{ClientID: wish}, facts)
		if d.Outcome != Granted {
			return
		}
		if label == "" || label != selector || (!standard && podNS != bindNS) || (wish != "" && !strings.EqualFold(wish, client)) {
			t.Errorf("granted %+v", d)
		}
		if standard && (kind != 0 || !strings.EqualFold(strings.TrimSuffix(resourceID, "/"), resource("x")) || owner != "" && owner != uid || state != assigned && (state != "" || owner != "")) {
			t.Errorf("granted %+v by %+v", d, facts.Assignments)
		}
	})
}
