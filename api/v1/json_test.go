package v1

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/runtime"
)

// The documents contain every field of AAD Pod Identity, with its spelling.
var everyField = map[string]string{
	"AzureIdentity": `{"kind":"AzureIdentity","apiVersion":"aadpodidentity.k8s.io/v1","metadata":{"name":"i","namespace":"n"},
		"spec":{"metadata":{},"type":1,"resourceID":"/r","clientID":"c","clientPassword":{"name":"s","namespace":"n"},
			"tenantID":"t","auxiliaryTenantIDs":["a","b"],"adResourceID":"x","adEndpoint":"https://login.example/","replicas":2},
		"status":{"metadata":{},"availableReplicas":1}}`,
	"AzureIdentityBinding": `{"kind":"AzureIdentityBinding","apiVersion":"aadpodidentity.k8s.io/v1","metadata":{"name":"b","namespace":"n"},
		"spec":{"metadata":{},"azureIdentity":"i","selector":"s","weight":3},
		"status":{"metadata":{},"availableReplicas":1}}`,
	"AzureAssignedIdentity": `{"kind":"AzureAssignedIdentity","apiVersion":"aadpodidentity.k8s.io/v1",
		"metadata":{"name":"p-n-i","namespace":"n","labels":{"nodename":"node1"},
			"finalizers":["azureassignedidentity.finalizers.aadpodidentity.k8s.io"]},
		"spec":{"metadata":{},
			"azureIdentityRef":{"kind":"AzureIdentity","apiVersion":"aadpodidentity.k8s.io/v1","metadata":{"name":"i"},
				"spec":{"type":1,"clientID":"c"},"status":{}},
			"azureBindingRef":{"kind":"AzureIdentityBinding","apiVersion":"aadpodidentity.k8s.io/v1","metadata":{"name":"b"},
				"spec":{"azureIdentity":"i","selector":"s"},"status":{}},
			"pod":"p","podNamespace":"n","nodename":"node1","replicas":1},
		"status":{"metadata":{},"status":"Assigned","availableReplicas":1}}`,
	"AzurePodIdentityException": `{"kind":"AzurePodIdentityException","apiVersion":"aadpodidentity.k8s.io/v1","metadata":{"name":"e","namespace":"n"},
		"spec":{"metadata":{},"podLabels":{"app":"x"}},
		"status":{"metadata":{},"status":"s"}}`,
}

func TestTheGoTypesHaveEveryFieldOfAADPodIdentity(t *testing.T) {
	scheme := runtime.NewScheme()
	if err := AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	for kind, document := range everyField {
		t.Run(kind, func(t *testing.T) {
			object, err := scheme.New(GroupVersion.WithKind(kind))
			if err != nil {
				t.Fatal(err)
			}
			decoder := json.NewDecoder(strings.NewReader(document))
			decoder.DisallowUnknownFields()
			if err := decoder.Decode(object); err != nil {
				t.Fatal(err)
			}
			encoded, err := json.Marshal(object.DeepCopyObject())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(parse(t, []byte(document)), parse(t, encoded)); diff != "" {
				t.Errorf("after a round trip (-before +after):\n%s", diff)
			}
		})
	}
}

func TestTheSchemeHasObjectsAndLists(t *testing.T) {
	scheme := runtime.NewScheme()
	if err := AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	for kind := range everyField {
		for _, k := range []string{kind, kind + "List"} {
			if !scheme.Recognizes(GroupVersion.WithKind(k)) {
				t.Errorf("the scheme does not know %s", k)
			}
		}
	}
}

func TestACopyOfAnIdentityIsCompleteAndIndependent(t *testing.T) {
	var identity AzureIdentity
	if err := json.Unmarshal([]byte(everyField["AzureIdentity"]), &identity); err != nil {
		t.Fatal(err)
	}
	copied := identity.Copy()
	if diff := cmp.Diff(&identity, copied.AzureIdentity()); diff != "" {
		t.Errorf("identity and copy differ:\n%s", diff)
	}
	copied.Spec.AuxiliaryTenantIDs[0] = "changed"
	if identity.Spec.AuxiliaryTenantIDs[0] == "changed" {
		t.Error("the copy shares memory with the identity")
	}
}

func TestACopyOfABindingIsCompleteAndHasItsKind(t *testing.T) {
	var binding AzureIdentityBinding
	if err := json.Unmarshal([]byte(everyField["AzureIdentityBinding"]), &binding); err != nil {
		t.Fatal(err)
	}
	want := binding.DeepCopy()
	// Objects from a typed client have no kind and no apiVersion.
	binding.Kind, binding.APIVersion = "", ""
	if diff := cmp.Diff(want, binding.Copy().AzureIdentityBinding()); diff != "" {
		t.Errorf("binding and copy differ:\n%s", diff)
	}
}

func parse(t *testing.T, document []byte) (parsed any) {
	t.Helper()
	if err := json.NewDecoder(bytes.NewReader(document)).Decode(&parsed); err != nil {
		t.Fatal(err)
	}
	return parsed
}
