package crds_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

func TestAPIServerAcceptsTheCRDs(t *testing.T) {
	resources := loadResources(t)
	if len(resources) != len(kinds) {
		t.Errorf("%s holds %d CRDs, want %d", crdFolder, len(resources), len(kinds))
	}
	for _, kind := range kinds {
		resource := resources[kind]
		if resource == nil {
			t.Errorf("%s holds no CRD of %s", crdFolder, kind)
			continue
		}
		for _, err := range resource.checkDefinition(t) {
			t.Errorf("%s: %v", kind, err)
		}
		// Groups under k8s.io are protected: the API server refuses a CRD without this annotation.
		if got := resource.crd.Annotations["api-approved.kubernetes.io"]; got != "unapproved" {
			t.Errorf("%s: annotation api-approved.kubernetes.io is %q, want unapproved", kind, got)
		}
		if got := resource.crd.Spec.Scope; got != "Namespaced" {
			t.Errorf("%s: scope is %s, want Namespaced", kind, got)
		}
	}
}

// Only MIC writes a status, and only that of assignments. On the other kinds, a status subresource would change the
// effect of existing manifests that contain a status: the API server would ignore it.
func TestOnlyAssignmentsHaveAStatusSubresource(t *testing.T) {
	for kind, resource := range loadResources(t) {
		has := resource.crd.Spec.Subresources != nil && resource.crd.Spec.Subresources.Status != nil
		if want := kind == "AzureAssignedIdentity"; has != want {
			t.Errorf("%s: status subresource is %v, want %v", kind, has, want)
		}
	}
}

func TestPrinterColumns(t *testing.T) {
	want := map[string][]string{
		"AzureIdentity":             {"Type", "ClientID", "ResourceID", "TenantID", "Age"},
		"AzureIdentityBinding":      {"AzureIdentity", "Selector", "Age"},
		"AzureAssignedIdentity":     {"Pod", "PodNamespace", "AzureIdentity", "Node", "Status", "Message", "Age"},
		"AzurePodIdentityException": {"PodLabels", "Age"},
	}
	for kind, resource := range loadResources(t) {
		var got []string
		for _, column := range resource.crd.Spec.AdditionalPrinterColumns {
			got = append(got, column.Name)
		}
		if !slices.Equal(got, want[kind]) {
			t.Errorf("%s: columns are %v, want %v", kind, got, want[kind])
		}
	}
}

func TestManifestsThatWorkedInAADPodIdentityAreAccepted(t *testing.T) {
	resources := loadResources(t)
	for _, file := range manifests(t, "accepted") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			resource, object, unknown := load(t, resources, file)
			if err := resource.create(t, object); err != nil {
				t.Errorf("the API server would refuse this manifest: %v", err)
			}
			if strings.HasPrefix(filepath.Base(file), "every-field-") && len(unknown) > 0 {
				t.Errorf("the API server would drop these fields, which AAD Pod Identity kept: %v", unknown)
			}
		})
	}
}

func TestInvalidManifestsAreRefusedWithARemedy(t *testing.T) {
	resources := loadResources(t)
	for _, file := range manifests(t, "refused") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			resource, object, _ := load(t, resources, file)
			err := resource.create(t, object)
			if err == nil {
				t.Fatal("the API server would accept this manifest, want a refusal")
			}
			if want := wantedText(t, file); !strings.Contains(err.Error(), want) {
				t.Errorf("want a refusal that contains %q, got: %v", want, err)
			}
		})
	}
}

// A cluster that used AAD Pod Identity may have stored objects like those of the refused manifests, so the metadata of
// such objects must stay changeable. Manifests with a wrong JSON type are left out: the schema of AAD Pod Identity
// refused them as well, so no cluster has stored such an object.
func TestStoredInvalidObjectsAcceptNewLabelsAndFinalizers(t *testing.T) {
	resources := loadResources(t)
	for _, file := range manifests(t, "refused") {
		if strings.HasPrefix(filepath.Base(file), "json-type-") {
			continue
		}
		t.Run(filepath.Base(file), func(t *testing.T) {
			resource, stored, _ := load(t, resources, file)
			stored.SetResourceVersion("1")
			stored.SetFinalizers([]string{"example.com/hold"})

			relabelled := stored.DeepCopy()
			relabelled.SetLabels(map[string]string{"team": "a"})
			if err := resource.update(t, stored, relabelled); err != nil {
				t.Errorf("the labels of the stored object cannot be changed: %v", err)
			}
			freed := stored.DeepCopy()
			freed.SetFinalizers(nil)
			if err := resource.update(t, stored, freed); err != nil {
				t.Errorf("the finalizer of the stored object cannot be removed: %v", err)
			}
		})
	}
}

func TestUpdateOfAStoredObjectMustBeValid(t *testing.T) {
	resources := loadResources(t)
	resource, stored, _ := load(t, resources, "testdata/refused/identity-type0-resourceid-missing.yaml")
	stored.SetResourceVersion("1")

	worse := stored.DeepCopy()
	set(t, worse, "11111111-2222-3333-4444-555555555555", "spec", "clientID")
	if err := resource.update(t, stored, worse); err == nil {
		t.Error("an update that sets clientID but no resourceID is accepted, want a refusal")
	}
	emptied := stored.DeepCopy()
	unstructured.RemoveNestedField(emptied.Object, "spec")
	if err := resource.update(t, stored, emptied); err == nil {
		t.Error("an update that removes the spec is accepted, want a refusal")
	}
	fixed := stored.DeepCopy()
	set(t, fixed, "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/i",
		"spec", "resourceID")
	if err := resource.update(t, stored, fixed); err != nil {
		t.Errorf("an update that adds the missing resourceID is refused: %v", err)
	}
}

func manifests(t *testing.T, folder string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", folder, "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests in testdata/%s (error: %v)", folder, err)
	}
	return files
}

func load(t *testing.T, resources map[string]*resource, file string) (*resource, *unstructured.Unstructured, []string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var head struct{ APIVersion, Kind string }
	if err := yaml.Unmarshal(data, &head); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	resource := resources[head.Kind]
	if resource == nil || head.APIVersion != group+"/v1" {
		t.Fatalf("%s has kind %q and apiVersion %q, which no CRD of the chart defines", file, head.Kind, head.APIVersion)
	}
	object, unknown := resource.decode(t, data)
	return resource, object, unknown
}

// wantedText returns the text that the error for a refused manifest must contain, from the first line of the manifest.
func wantedText(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(data), "\n")
	want, found := strings.CutPrefix(first, "# want: ")
	if !found || want == "" {
		t.Fatalf("%s does not begin with a line '# want: TEXT'", file)
	}
	return want
}

func set(t *testing.T, object *unstructured.Unstructured, value string, path ...string) {
	t.Helper()
	if err := unstructured.SetNestedField(object.Object, value, path...); err != nil {
		t.Fatal(err)
	}
}
