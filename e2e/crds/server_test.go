// Package crds_test checks which manifests of the four custom resources the API server accepts. It runs the API
// server's own code (pruning, schema, validation rules, ratcheting) on the CRDs of the chart, without a server.
//
// The manifests are files, so that a test with a cluster can apply the same manifests.
package crds_test

import (
	"os"
	"path/filepath"
	"testing"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/install"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/objectmeta"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	schemavalidation "k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apiextensions-apiserver/pkg/crdserverscheme"
	"k8s.io/apiextensions-apiserver/pkg/registry/customresource"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	genericapirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"sigs.k8s.io/yaml"
)

const (
	crdFolder = "../../deploy/podidentity/crds"
	group     = "aadpodidentity.k8s.io"
)

var kinds = []string{"AzureAssignedIdentity", "AzureIdentity", "AzureIdentityBinding", "AzurePodIdentityException"}

// strategy has the API server's checks for the creation and the update of one kind of custom resource.
type strategy interface {
	rest.RESTCreateStrategy
	rest.RESTUpdateStrategy
}

// resource is one CRD as an API server holds it.
type resource struct {
	crd        *apiextensions.CustomResourceDefinition
	structural *structuralschema.Structural
	strategy   strategy
}

// loadResources reads the CRDs of the chart, by kind.
func loadResources(t *testing.T) map[string]*resource {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(crdFolder, "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	scheme := runtime.NewScheme()
	install.Install(scheme)
	resources := map[string]*resource{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		versioned := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(data, versioned); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		scheme.Default(versioned)
		// The API server sets storedVersions when it stores a CRD, and its validation requires them.
		for _, version := range versioned.Spec.Versions {
			if version.Storage {
				versioned.Status.StoredVersions = []string{version.Name}
			}
		}
		crd := &apiextensions.CustomResourceDefinition{}
		if err := scheme.Convert(versioned, crd, nil); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		resources[crd.Spec.Names.Kind] = newResource(t, crd)
	}
	return resources
}

func newResource(t *testing.T, crd *apiextensions.CustomResourceDefinition) *resource {
	t.Helper()
	if len(crd.Spec.Versions) != 1 {
		t.Fatalf("%s has %d versions, want 1", crd.Name, len(crd.Spec.Versions))
	}
	// For a CRD with one version, the internal type has schema and subresources in spec instead of in spec.versions.
	props := crd.Spec.Validation.OpenAPIV3Schema
	structural, err := structuralschema.NewStructural(props)
	if err != nil {
		t.Fatalf("%s: %v", crd.Name, err)
	}
	validator, _, err := schemavalidation.NewSchemaValidator(props)
	if err != nil {
		t.Fatalf("%s: %v", crd.Name, err)
	}
	var status *apiextensions.CustomResourceSubresourceStatus
	var statusValidator schemavalidation.SchemaValidator
	if crd.Spec.Subresources != nil && crd.Spec.Subresources.Status != nil {
		status = crd.Spec.Subresources.Status
		statusProps := props.Properties["status"]
		if statusValidator, _, err = schemavalidation.NewSchemaValidator(&statusProps); err != nil {
			t.Fatalf("%s: %v", crd.Name, err)
		}
	}
	kind := schema.GroupVersionKind{Group: group, Version: crd.Spec.Versions[0].Name, Kind: crd.Spec.Names.Kind}
	return &resource{
		crd:        crd,
		structural: structural,
		strategy: customresource.NewStrategy(crdserverscheme.NewUnstructuredObjectTyper(), true, kind, validator,
			statusValidator, structural, status, nil, nil),
	}
}

// checkDefinition returns the errors of the API server for the CRD, including those about the cost of its validation
// rules.
func (r *resource) checkDefinition(t *testing.T) field.ErrorList {
	return validation.ValidateCustomResourceDefinition(t.Context(), r.crd)
}

// decode decodes and prunes a manifest as the API server does before validation. It returns the object and the paths of
// the dropped fields.
func (r *resource) decode(t *testing.T, manifest []byte) (*unstructured.Unstructured, []string) {
	t.Helper()
	object := &unstructured.Unstructured{}
	if err := yaml.Unmarshal(manifest, &object.Object); err != nil {
		t.Fatal(err)
	}
	// Encode the object and decode it again, so that integers are int64 as in the API server.
	data, err := object.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	if err := object.UnmarshalJSON(data); err != nil {
		t.Fatal(err)
	}
	if object.GetNamespace() == "" {
		object.SetNamespace("default")
	}
	unknown := pruning.PruneWithOptions(object.Object, r.structural, true,
		structuralschema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true})
	defaulting.PruneNonNullableNullsWithoutDefaults(object.Object, r.structural)
	if err := objectmeta.Coerce(nil, object.Object, r.structural, false, false); err != nil {
		t.Fatal(err)
	}
	return object, unknown
}

// create returns the errors of the API server for a new object.
func (r *resource) create(t *testing.T, object *unstructured.Unstructured) error {
	ctx := genericapirequest.WithNamespace(t.Context(), object.GetNamespace())
	object = object.DeepCopy()
	rest.FillObjectMetaSystemFields(object)
	return rest.BeforeCreate(r.strategy, ctx, object)
}

// update returns the errors of the API server for the update of a stored object.
func (r *resource) update(t *testing.T, stored, object *unstructured.Unstructured) error {
	ctx := genericapirequest.WithNamespace(t.Context(), object.GetNamespace())
	return rest.BeforeUpdate(r.strategy, ctx, object.DeepCopy(), stored.DeepCopy())
}
