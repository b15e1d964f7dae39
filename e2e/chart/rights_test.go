package chart_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	rbacv1 "k8s.io/api/rbac/v1"
)

// right is a rule that NMI's account has in a namespace. Namespace "" means the whole cluster.
type right struct {
	Namespace string
	rbacv1.PolicyRule
}

// boundRights returns the rights that NMI's account has in addition to those of ClusterRole podidentity-nmi. It fails
// the test if a role is not bound, or is bound to another account.
func (r rendered) boundRights(t *testing.T) []right {
	t.Helper()
	subjects := []rbacv1.Subject{{Kind: "ServiceAccount", Name: "podidentity-nmi", Namespace: "kube-system"}}
	bound := map[string]bool{}
	check := func(kind, namespace, name string, ref rbacv1.RoleRef, got []rbacv1.Subject) {
		if ref.APIGroup != rbacv1.GroupName || ref.Kind != kind || ref.Name != name || !slices.Equal(got, subjects) {
			t.Errorf("binding %s/%s must give the role of its own name to NMI's ServiceAccount alone; it gives %+v to %+v", namespace, name, ref, got)
		}
		bound[namespace+"/"+name] = true
	}
	for _, binding := range r.bindings {
		check("ClusterRole", "", binding.Name, binding.RoleRef, binding.Subjects)
	}
	for _, binding := range r.roleBindings {
		check("Role", binding.Namespace, binding.Name, binding.RoleRef, binding.Subjects)
	}
	var rights []right
	add := func(namespace, name string, rules []rbacv1.PolicyRule) {
		if !bound[namespace+"/"+name] {
			t.Errorf("role %s/%s is not bound", namespace, name)
		}
		for _, rule := range rules {
			rights = append(rights, right{namespace, rule})
		}
	}
	for name, role := range r.clusterRoles {
		if name != "podidentity-nmi" {
			add("", name, role.Rules)
		}
	}
	for _, role := range r.roles {
		if role.Namespace == "" {
			t.Errorf("role %s has no namespace", role.Name)
		}
		add(role.Namespace, role.Name, role.Rules)
	}
	return rights
}

func secrets(namespace string, names ...string) right {
	return right{namespace, rbacv1.PolicyRule{
		APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"get", "list", "watch"}, ResourceNames: names,
	}}
}

func tokens(namespace string, accounts ...string) right {
	return right{namespace, rbacv1.PolicyRule{
		APIGroups: []string{""}, Resources: []string{"serviceaccounts/token"}, Verbs: []string{"create"}, ResourceNames: accounts,
	}}
}

func TestNMIMayReadPodsItsNodeAndItsCustomResources(t *testing.T) {
	objects := render(t, "")
	if len(objects.clusterRoles) != 1 || objects.clusterRoles["podidentity-nmi"] == nil {
		t.Fatalf("cluster roles are %v, want podidentity-nmi alone", objects.clusterRoles)
	}
	read := []string{"get", "list", "watch"}
	want := []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: read},
		{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get"}},
		{
			APIGroups: []string{group},
			Resources: []string{"azureidentities", "azureidentitybindings", "azurepodidentityexceptions"},
			Verbs:     read,
		},
		{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
	}
	if diff := cmp.Diff(want, objects.clusterRoles["podidentity-nmi"].Rules); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}
	daemonSet, _ := objects.nmi(t)
	subject := rbacv1.Subject{Kind: "ServiceAccount", Name: "podidentity-nmi", Namespace: "kube-system"}
	if len(objects.bindings) != 1 || objects.bindings[0].RoleRef.Name != "podidentity-nmi" ||
		!slices.Equal(objects.bindings[0].Subjects, []rbacv1.Subject{subject}) {
		t.Errorf("want one ClusterRoleBinding, of podidentity-nmi to its ServiceAccount: %+v", objects.bindings)
	}
	if len(objects.roles) != 0 || len(objects.roleBindings) != 0 {
		t.Errorf("want no Roles and RoleBindings: %+v, %+v", objects.roles, objects.roleBindings)
	}
	if len(objects.serviceAccounts) != 1 || objects.serviceAccounts[0].Name != subject.Name ||
		objects.serviceAccounts[0].Namespace != subject.Namespace ||
		daemonSet.Spec.Template.Spec.ServiceAccountName != subject.Name {
		t.Errorf("want one ServiceAccount, %s/%s, for the pods: %+v", subject.Namespace, subject.Name, objects.serviceAccounts)
	}
}

func TestUserRolesAreOptionalAndExcludeExceptions(t *testing.T) {
	roles := render(t, "rbac: {enabled: false, createUserFacingClusterRoles: true}").clusterRoles
	view, edit := roles["podidentity-view"], roles["podidentity-edit"]
	if len(roles) != 2 || view == nil || edit == nil {
		t.Fatalf("cluster roles are %v, want podidentity-view and podidentity-edit", roles)
	}
	if view.Labels["rbac.authorization.k8s.io/aggregate-to-view"] != "true" ||
		edit.Labels["rbac.authorization.k8s.io/aggregate-to-edit"] != "true" {
		t.Error("the roles lack the labels that aggregate them to the roles view and edit")
	}
	for _, rule := range edit.Rules {
		if slices.Contains(rule.Resources, "azurepodidentityexceptions") ||
			slices.Contains(rule.Resources, "azureassignedidentities") {
			t.Errorf("the role podidentity-edit has rights for %v; it must have none for exceptions and assignments", rule.Resources)
		}
	}
}

func TestNMIMayReadSecretsAndRequestTokensOnlyInTheGivenNamespaces(t *testing.T) {
	for values, want := range map[string][]right{
		"{}":                              nil,
		"{secretNamespaces: [shop, '1']}": {secrets("shop"), secrets("1")},
		"{secretNamespaces: [shop, {namespace: billing, names: [robot, '2']}]}": {secrets("shop"), secrets("billing", "robot", "2")},
		"{secretNamespaces: all}":            {secrets("")},
		"{federatedNamespaces: [shop, '1']}": {tokens("shop"), tokens("1")},
		"{federatedNamespaces: [{namespace: billing, serviceAccounts: [invoices]}, shop]}": {tokens("billing", "invoices"), tokens("shop")},
		"{federatedNamespaces: all}":                              {tokens("")},
		"{secretNamespaces: [shop], federatedNamespaces: [shop]}": {secrets("shop"), tokens("shop")},
		"{secretNamespaces: all, federatedNamespaces: all}":       {secrets(""), tokens("")},
		"{secretNamespaces: null, federatedNamespaces: null}":     nil,
		// Helm cannot create a Role in a deleted namespace. If the chart had Roles during the uninstallation of NMI, a
		// deleted namespace in the lists would block the uninstallation.
		"{uninstall: true, secretNamespaces: [shop], federatedNamespaces: all}": nil,
	} {
		got := render(t, "nmi: "+values).boundRights(t)
		order := cmpopts.SortSlices(func(a, b right) bool { return a.Namespace+a.Resources[0] < b.Namespace+b.Resources[0] })
		if diff := cmp.Diff(want, got, order); diff != "" {
			t.Errorf("%s: rights (-want +got):\n%s", values, diff)
		}
	}
}

func TestWithoutRBACThereAreNoRoles(t *testing.T) {
	got := render(t, "{rbac: {enabled: false}, nmi: {secretNamespaces: [shop], federatedNamespaces: all}}")
	if len(got.roles)+len(got.roleBindings)+len(got.clusterRoles)+len(got.bindings) != 0 {
		t.Errorf("want no roles and no bindings; got roles %v and %v, bound by %v and %v", got.roles, got.clusterRoles, got.roleBindings, got.bindings)
	}
}

func TestEventsAreWrittenOnlyIfEnabled(t *testing.T) {
	for _, rule := range render(t, "nmi: {events: false}").clusterRoles["podidentity-nmi"].Rules {
		if slices.Contains(rule.Resources, "events") {
			t.Errorf("with nmi.events=false, NMI still has the rights %v for events, want none", rule.Verbs)
		}
	}
}

func TestTwoReleasesHaveDifferentClusterWideNames(t *testing.T) {
	got := render(t, "{fullnameOverride: other, nmi: {secretNamespaces: all, federatedNamespaces: all}}")
	var names []string
	for name := range got.clusterRoles {
		names = append(names, name)
	}
	for _, binding := range got.bindings {
		names = append(names, binding.Name)
	}
	for _, policy := range got.policies {
		names = append(names, policy.Name)
	}
	for _, binding := range got.policyBindings {
		names = append(names, binding.Name)
	}
	if len(names) != 3+3+1+1 {
		t.Errorf("names are %v, want those of three ClusterRoles, their three bindings, and one policy with its binding", names)
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "other-nmi") {
			t.Errorf("the name %s does not begin with other-nmi, although fullnameOverride is other", name)
		}
	}
}

func TestInvalidNamespaceListsAreRefused(t *testing.T) {
	for values, want := range map[string]string{
		"secretNamespaces: everything":                                        "at '/nmi/secretNamespaces': value must be 'all'",
		"secretNamespaces: ''":                                                "at '/nmi/secretNamespaces': value must be 'all'",
		"secretNamespaces: {namespace: a}":                                    "at '/nmi/secretNamespaces': got object, want array",
		"secretNamespaces: ['*']":                                             "at '/nmi/secretNamespaces/0'",
		"secretNamespaces: ['']":                                              "at '/nmi/secretNamespaces/0'",
		"secretNamespaces: [1]":                                               "at '/nmi/secretNamespaces/0': got number, want string",
		"secretNamespaces: [all]":                                             "nmi.secretNamespaces: write the word all in place of the list, not in it",
		"secretNamespaces: [a, a]":                                            "nmi.secretNamespaces: namespace a is listed twice",
		"secretNamespaces: [a, {namespace: a, names: [b]}]":                   "nmi.secretNamespaces: namespace a is listed twice",
		"secretNamespaces: [{namespace: a}]":                                  "missing property 'names'",
		"secretNamespaces: [{names: [a]}]":                                    "missing property 'namespace'",
		"secretNamespaces: [{namespace: a, names: []}]":                       "at '/nmi/secretNamespaces/0/names': minItems: got 0, want 1",
		"secretNamespaces: [{namespace: a, names: ['*']}]":                    "at '/nmi/secretNamespaces/0/names/0'",
		"secretNamespaces: [{namespace: a, names: b}]":                        "at '/nmi/secretNamespaces/0/names': got string, want array",
		"secretNamespaces: [{namespace: a, serviceAccounts: [b]}]":            "additional properties 'serviceAccounts' not allowed",
		"federatedNamespaces: [{namespace: a, names: [b]}]":                   "additional properties 'names' not allowed",
		"federatedNamespaces: [{namespace: a, serviceAccounts: []}]":          "at '/nmi/federatedNamespaces/0/serviceAccounts': minItems: got 0, want 1",
		"federatedNamespaces: [{namespace: a, serviceAccounts: ['a/token']}]": "at '/nmi/federatedNamespaces/0/serviceAccounts/0'",
		"federatedNamespaces: [A]":                                            "at '/nmi/federatedNamespaces/0'",
		"federatedNamespaces: [all]":                                          "nmi.federatedNamespaces: write the word all in place of the list, not in it",
		"federatedNamespaces: true":                                           "at '/nmi/federatedNamespaces': value must be 'all'",
	} {
		if got := refusal(t, "nmi: {"+values+"}"); !strings.Contains(got, want) {
			t.Errorf("%s: the output of Helm\n%s\nlacks %q", values, got, want)
		}
	}
}

// Values with an identity of each type for which NMI needs a right. The namespace of the identity is not that of the
// release.
const (
	withSecret      = "azureIdentities: {robot: {namespace: shop, type: 1, clientPassword: {name: robot}}}"
	withCertificate = "azureIdentities: {robot: {namespace: shop, type: 2, clientPassword: {name: robot, namespace: vault}}}"
	federated       = "azureIdentities: {web: {namespace: shop, type: 3}}"
)

func TestIdentityIsRefusedIfNMILacksTheRightsForIt(t *testing.T) {
	const unreadable = "azureIdentities.robot: NMI may not read Secret shop/robot; add its namespace, or " +
		"{namespace: shop, names: [robot]}, to nmi.secretNamespaces"
	const unasked = "azureIdentities.web: NMI may not request tokens of ServiceAccounts in namespace shop; add it to " +
		"nmi.federatedNamespaces"
	for values, want := range map[string]string{
		withSecret: unreadable,
		withSecret + "\nnmi: {secretNamespaces: [billing], federatedNamespaces: all}":           unreadable,
		withSecret + "\nnmi: {secretNamespaces: [{namespace: shop, names: [other]}]}":           unreadable,
		withCertificate + "\nnmi: {secretNamespaces: [shop], allowCrossNamespaceSecrets: true}": "NMI may not read Secret vault/robot",
		withCertificate + "\nnmi: {secretNamespaces: all}": "azureIdentities.robot: Secret vault/robot is in another namespace " +
			"than the identity; move it to namespace shop, or set nmi.allowCrossNamespaceSecrets to true",
		federated: unasked,
		federated + "\nnmi: {federatedNamespaces: [billing], secretNamespaces: all}": unasked,
	} {
		if got := refusal(t, values); !strings.Contains(got, want) {
			t.Errorf("%s: the output of Helm\n%s\nlacks %q", values, got, want)
		}
	}
}

func TestIdentityIsAcceptedIfNMIHasTheRightsForIt(t *testing.T) {
	for _, values := range []string{
		withSecret + "\nnmi: {secretNamespaces: [billing, shop]}",
		withSecret + "\nnmi: {secretNamespaces: [{namespace: shop, names: [other, robot]}]}",
		withSecret + "\nnmi: {secretNamespaces: all}",
		withCertificate + "\nnmi: {secretNamespaces: [vault], allowCrossNamespaceSecrets: true}",
		federated + "\nnmi: {federatedNamespaces: [shop]}",
		// The chart cannot know under which ServiceAccounts the pods will run.
		federated + "\nnmi: {federatedNamespaces: [{namespace: shop, serviceAccounts: [web]}]}",
		federated + "\nnmi: {federatedNamespaces: all}",
		// With rbac.enabled=false, somebody else grants NMI's rights.
		withSecret + "\nrbac: {enabled: false}",
		federated + "\nrbac: {enabled: false}",
		// Missing rights must not block the uninstallation of NMI.
		withSecret + "\nnmi: {uninstall: true}",
		withCertificate + "\nnmi: {uninstall: true}",
		federated + "\nnmi: {uninstall: true}",
	} {
		if got := render(t, values).custom; len(got) != 1 {
			t.Errorf("%s: custom resources are %v, want one AzureIdentity", values, got)
		}
	}
}

func TestNotesListMissingRightsForOtherTypes(t *testing.T) {
	for values, want := range map[string][2]bool{
		"{}":                              {true, true},
		"nmi: {secretNamespaces: [shop]}": {false, true},
		"nmi: {federatedNamespaces: all}": {true, false},
		"nmi: {secretNamespaces: [shop], federatedNamespaces: all}": {false, false},
		"rbac: {enabled: false}":                                    {false, false},
		"nmi: {uninstall: true}":                                    {false, false},
	} {
		notes := notesOf(t, values)
		for i, value := range []string{"nmi.secretNamespaces", "nmi.federatedNamespaces"} {
			if got := strings.Contains(notes, value); got != want[i] {
				t.Errorf("%s: the notes mention %s: %v, want %v", values, value, got, want[i])
			}
		}
	}
}
