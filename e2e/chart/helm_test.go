// Package chart_test renders the Helm chart as users do and checks the objects.
package chart_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/yaml"

	"github.com/podidentity/podidentity/e2e/cluster"
)

const (
	chart = "../../deploy/podidentity"
	group = "aadpodidentity.k8s.io"
)

// helmBinary is the path of the helm program that clusters use.
var helmBinary string

func TestMain(m *testing.M) {
	binaries, err := cluster.EnsureBinaries(context.Background(), func(line string) { fmt.Println("chart:", line) })
	if err != nil {
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
	helmBinary = binaries.Helm()
	os.Exit(m.Run())
}

// helm runs Helm without configuration of the user, and without a cluster.
func helm(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	home := t.TempDir()
	command := exec.CommandContext(t.Context(), helmBinary, args...)
	command.Env = []string{
		"HOME=" + home,
		"HELM_CACHE_HOME=" + home, "HELM_CONFIG_HOME=" + home, "HELM_DATA_HOME=" + home,
		"KUBECONFIG=" + filepath.Join(home, "none"),
	}
	var out, errs bytes.Buffer
	command.Stdout, command.Stderr = &out, &errs
	err = command.Run()
	return out.String(), errs.String(), err
}

// rendered contains the objects that the chart renders, by kind.
type rendered struct {
	daemonSets      []*appsv1.DaemonSet
	deployments     []*appsv1.Deployment
	budgets         []*policyv1.PodDisruptionBudget
	serviceAccounts []*corev1.ServiceAccount
	configMaps      []*corev1.ConfigMap
	secrets         []*corev1.Secret
	clusterRoles    map[string]*rbacv1.ClusterRole
	bindings        []*rbacv1.ClusterRoleBinding
	roles           []*rbacv1.Role
	roleBindings    []*rbacv1.RoleBinding
	policies        []*admissionv1.ValidatingAdmissionPolicy
	policyBindings  []*admissionv1.ValidatingAdmissionPolicyBinding
	// custom has the custom resources of this project as plain values. Package crds_test tests what the API server
	// accepts.
	custom []map[string]any
}

// render renders the chart as release "podidentity" in namespace "kube-system". Values are YAML.
func render(t *testing.T, values string) rendered {
	t.Helper()
	stdout, stderr, err := helm(t, "template", "podidentity", chart, "--namespace", "kube-system", "--values",
		valuesFile(t, values))
	if err != nil {
		t.Fatalf("helm template: %v\n%s", err, stderr)
	}
	return parse(t, stdout)
}

// refusal returns the error of Helm for values that the chart refuses.
func refusal(t *testing.T, values string) string {
	t.Helper()
	_, stderr, err := helm(t, "template", "podidentity", chart, "--values", valuesFile(t, values))
	if err == nil {
		t.Fatalf("the chart accepts these values, want a refusal:\n%s", values)
	}
	return stderr
}

// notesOf returns the notes that Helm prints after an installation in namespace "default".
func notesOf(t *testing.T, values string) string {
	t.Helper()
	stdout, stderr, err := helm(t, "install", "podidentity", chart, "--dry-run=client", "--values", valuesFile(t, values))
	if err != nil {
		t.Fatalf("helm install --dry-run=client: %v\n%s", err, stderr)
	}
	_, notes, found := strings.Cut(stdout, "\nNOTES:\n")
	if !found {
		t.Fatalf("the output of helm install has no notes:\n%s", stdout)
	}
	return notes
}

func valuesFile(t *testing.T, values string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(values), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// parse decodes the built-in kinds strictly: a misspelled field in a template is an error here, not a field that the
// API server drops.
func parse(t *testing.T, manifests string) rendered {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		admissionv1.AddToScheme, appsv1.AddToScheme, corev1.AddToScheme, policyv1.AddToScheme, rbacv1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	result := rendered{clusterRoles: map[string]*rbacv1.ClusterRole{}}
	for _, manifest := range strings.Split("\n"+manifests, "\n---") {
		var content map[string]any
		if err := yaml.Unmarshal([]byte(manifest), &content); err != nil {
			t.Fatalf("%v:\n%s", err, manifest)
		}
		if content == nil {
			continue
		}
		if content["apiVersion"] == group+"/v1" {
			result.custom = append(result.custom, content)
			continue
		}
		object, _, err := decoder.Decode([]byte(manifest), nil, nil)
		if err != nil {
			t.Fatalf("%v:\n%s", err, manifest)
		}
		switch object := object.(type) {
		case *appsv1.DaemonSet:
			result.daemonSets = append(result.daemonSets, object)
		case *appsv1.Deployment:
			result.deployments = append(result.deployments, object)
		case *policyv1.PodDisruptionBudget:
			result.budgets = append(result.budgets, object)
		case *corev1.Secret:
			result.secrets = append(result.secrets, object)
		case *corev1.ServiceAccount:
			result.serviceAccounts = append(result.serviceAccounts, object)
		case *corev1.ConfigMap:
			result.configMaps = append(result.configMaps, object)
		case *rbacv1.ClusterRole:
			result.clusterRoles[object.Name] = object
		case *rbacv1.ClusterRoleBinding:
			result.bindings = append(result.bindings, object)
		case *rbacv1.Role:
			result.roles = append(result.roles, object)
		case *rbacv1.RoleBinding:
			result.roleBindings = append(result.roleBindings, object)
		case *admissionv1.ValidatingAdmissionPolicy:
			result.policies = append(result.policies, object)
		case *admissionv1.ValidatingAdmissionPolicyBinding:
			result.policyBindings = append(result.policyBindings, object)
		default:
			t.Fatalf("the chart renders a %T, which the tests do not know: add it to parse", object)
		}
	}
	return result
}

// nmi returns the one DaemonSet and its one container.
func (r rendered) nmi(t *testing.T) (*appsv1.DaemonSet, *corev1.Container) {
	t.Helper()
	if len(r.daemonSets) != 1 || len(r.daemonSets[0].Spec.Template.Spec.Containers) != 1 {
		t.Fatalf("want one DaemonSet with one container: %+v", r.daemonSets)
	}
	return r.daemonSets[0], &r.daemonSets[0].Spec.Template.Spec.Containers[0]
}

// mic returns the one Deployment and its one container.
func (r rendered) mic(t *testing.T) (*appsv1.Deployment, *corev1.Container) {
	t.Helper()
	if len(r.deployments) != 1 || len(r.deployments[0].Spec.Template.Spec.Containers) != 1 {
		t.Fatalf("want one Deployment with one container: %+v", r.deployments)
	}
	return r.deployments[0], &r.deployments[0].Spec.Template.Spec.Containers[0]
}
