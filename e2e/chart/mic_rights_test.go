package chart_test

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	rbacv1 "k8s.io/api/rbac/v1"
)

var read = []string{"get", "list", "watch"}

func TestMICMayReadItsInputAndWriteOnlyAssignments(t *testing.T) {
	objects := render(t, standard(""))
	want := []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods", "nodes", "namespaces"}, Verbs: read},
		{APIGroups: []string{group}, Resources: []string{"azureidentities", "azureidentitybindings"}, Verbs: read},
		{
			APIGroups: []string{group}, Resources: []string{"azureassignedidentities"},
			Verbs: append(slices.Clone(read), "create", "patch", "delete"),
		},
		{APIGroups: []string{group}, Resources: []string{"azureassignedidentities/status"}, Verbs: []string{"patch"}},
		{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
	}
	role := objects.clusterRoles["podidentity-mic"]
	if len(objects.clusterRoles) != 2 || role == nil {
		t.Fatalf("cluster roles are %v, want podidentity-nmi and podidentity-mic", objects.clusterRoles)
	}
	if diff := cmp.Diff(want, role.Rules); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}
	deployment, _ := objects.mic(t)
	if account := deployment.Spec.Template.Spec.ServiceAccountName; account != "podidentity-mic" ||
		!slices.ContainsFunc(objects.bindings, func(b *rbacv1.ClusterRoleBinding) bool {
			return b.RoleRef.Name == role.Name && slices.Equal(b.Subjects, micAccount)
		}) {
		t.Errorf("want pods and a binding of %s with ServiceAccount podidentity-mic: pods have %s, bindings are %+v", role.Name, account, objects.bindings)
	}
}

var micAccount = []rbacv1.Subject{{Kind: "ServiceAccount", Name: "podidentity-mic", Namespace: "kube-system"}}

func TestMICMayWriteItsLedgerAndItsLeaseInTheirNamespace(t *testing.T) {
	ledger := rbacv1.PolicyRule{
		APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"get", "list", "create", "update", "delete"},
	}
	lease := func(name string) []rbacv1.PolicyRule {
		of := rbacv1.PolicyRule{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}}
		create, renew := of, of
		create.Verbs = []string{"create"}
		renew.Verbs, renew.ResourceNames = []string{"get", "update"}, []string{name}
		return []rbacv1.PolicyRule{create, renew}
	}
	for values, want := range map[string]map[string][]rbacv1.PolicyRule{
		"": {"kube-system": append([]rbacv1.PolicyRule{ledger}, lease("aad-pod-identity-mic")...)},
		"mic: {leaderElection: {namespace: kube-system, name: mic}}": {"kube-system": append([]rbacv1.PolicyRule{ledger}, lease("mic")...)},
		"mic: {leaderElection: {namespace: leases}}":                 {"kube-system": {ledger}, "leases": lease("aad-pod-identity-mic")},
	} {
		objects := render(t, standard(values))
		got := map[string][]rbacv1.PolicyRule{}
		for _, role := range objects.roles {
			got[role.Namespace] = role.Rules
			if !slices.ContainsFunc(objects.roleBindings, func(b *rbacv1.RoleBinding) bool {
				return b.Namespace == role.Namespace && b.RoleRef.Kind == "Role" && b.RoleRef.Name == role.Name && slices.Equal(b.Subjects, micAccount)
			}) {
				t.Errorf("%q: no binding of role %s/%s to MIC's ServiceAccount: %+v", values, role.Namespace, role.Name, objects.roleBindings)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q: roles (-want +got):\n%s", values, diff)
		}
	}
}

func TestNMIReadsAssignmentsInStandardModeOnly(t *testing.T) {
	rules := func(values string) []rbacv1.PolicyRule {
		return render(t, values).clusterRoles["podidentity-nmi"].Rules
	}
	assignments := rbacv1.PolicyRule{APIGroups: []string{group}, Resources: []string{"azureassignedidentities"}, Verbs: read}
	more := append(rules(""), assignments)
	order := cmpopts.SortSlices(func(a, b rbacv1.PolicyRule) bool { return a.Resources[0] < b.Resources[0] })
	if diff := cmp.Diff(more, rules(standard("")), order); diff != "" {
		t.Errorf("rules of standard mode (-want +got, where want is the rules of managed mode and one for assignments):\n%s", diff)
	}
}

func TestWithoutRBACMICHasNoRolesAndCanUseAnotherServiceAccount(t *testing.T) {
	objects := render(t, standard("rbac: {enabled: false}\nmic: {serviceAccount: {create: false, name: robot}}"))
	if len(objects.roles)+len(objects.roleBindings)+len(objects.clusterRoles)+len(objects.bindings) != 0 {
		t.Errorf("want no roles and no bindings; got roles %v and %v, bound by %v and %v", objects.roles, objects.clusterRoles, objects.roleBindings, objects.bindings)
	}
	deployment, _ := objects.mic(t)
	if account := deployment.Spec.Template.Spec.ServiceAccountName; account != "robot" || len(objects.serviceAccounts) != 1 {
		t.Errorf("the pods have ServiceAccount %s, want robot; the chart creates %v, want only NMI's", account, objects.serviceAccounts)
	}
}

func TestTwoReleasesWithMICHaveDifferentClusterWideNames(t *testing.T) {
	objects := render(t, standard("fullnameOverride: other"))
	for name := range objects.clusterRoles {
		if name != "other-nmi" && name != "other-mic" {
			t.Errorf("the name of cluster role %s is neither other-nmi nor other-mic, although fullnameOverride is other", name)
		}
	}
	for _, binding := range objects.bindings {
		if binding.Name != "other-nmi" && binding.Name != "other-mic" {
			t.Errorf("the name of binding %s is neither other-nmi nor other-mic, although fullnameOverride is other", binding.Name)
		}
	}
}
