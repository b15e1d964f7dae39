//go:build !race

package mic

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// apiRequest is one request. In its body, values can be placeholders.
type apiRequest struct {
	method, path, contentType string
	body                      any
}

func (r apiRequest) String() string {
	if r.body == nil {
		return r.method + " " + r.path
	}
	return fmt.Sprintf("%s %s (%s) %s", r.method, r.path, r.contentType, mustMarshal(r.body))
}

// Placeholders for values that differ from server to server.
const (
	currentVersion = "CURRENT VERSION" // resourceVersion of the object when it was last read
	staleVersion   = "STALE VERSION"   // resourceVersion before the last change
	currentUID     = "CURRENT UID"
	otherUID       = "00000000-0000-4000-8000-00000000ffff" // no placeholder, but a UID that no object has
)

const (
	jsonPatch      = "application/json-patch+json"
	strategicPatch = "application/strategic-merge-patch+json"
)

type jsonObject = map[string]any

// randomRequests returns requests about one AzureAssignedIdentity, one AzureIdentity, one ConfigMap and one pod, as MIC
// and other clients send them, and variants that a server must reject. The bodies have no unknown fields: a real server
// removes unknown fields, the fake does not.
func randomRequests(r *rand.Rand, n int) (requests []apiRequest) {
	choose := []func(*rand.Rand) apiRequest{createRequest, createRequest, updateRequest, updateRequest, patchRequest, patchRequest, statusRequest, statusRequest, deleteRequest, podRequest, podRequest}
	for range n {
		requests = append(requests, pick(r, choose...)(r))
	}
	return requests
}

const (
	assignmentPath = "namespaces/blue/azureassignedidentities"
	identitiesPath = "namespaces/blue/azureidentities"
	configMapPath  = "namespaces/blue/configmaps"
	podsPath       = "namespaces/blue/pods"
)

// objectFor returns an object with the name "a" of the kind that a path is for.
func objectFor(path, version string) jsonObject {
	metadata := jsonObject{"name": "a", "namespace": "blue"}
	if version != "" {
		metadata["resourceVersion"] = version
	}
	switch path {
	case configMapPath:
		return jsonObject{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": jsonObject{"key": "value"}}
	case identitiesPath:
		return jsonObject{"apiVersion": v1.GroupVersion.String(), "kind": "AzureIdentity", "metadata": metadata, "spec": jsonObject{"type": 0, "resourceID": identityID("u0"), "clientID": clientID("c")}}
	}
	return jsonObject{"apiVersion": v1.GroupVersion.String(), "kind": "AzureAssignedIdentity", "metadata": metadata, "spec": jsonObject{"pod": "p", "podNamespace": "blue"}}
}

func randomPath(r *rand.Rand) string {
	return pick(r, assignmentPath, assignmentPath, identitiesPath, configMapPath)
}

func setMetadata(object jsonObject, key string, value any) jsonObject {
	object["metadata"].(jsonObject)[key] = value
	return object
}

func createRequest(r *rand.Rand) apiRequest {
	path := randomPath(r)
	object := objectFor(path, "")
	switch r.IntN(12) {
	case 0:
		setMetadata(object, "name", "Upper")
	case 1:
		setMetadata(object, "labels", jsonObject{"label": strings.Repeat("x", 64)})
	case 2:
		setMetadata(object, "ownerReferences", []jsonObject{{"apiVersion": "v1", "kind": "Pod", "name": "p"}})
	case 3:
		setMetadata(object, "resourceVersion", "1")
	case 4:
		setMetadata(object, "namespace", "red")
	case 5:
		if path == assignmentPath {
			object["spec"] = jsonObject{"azureIdentityRef": jsonObject{"metadata": jsonObject{"name": "i"}}}
		}
	case 6, 7, 8:
		setMetadata(object, "finalizers", []string{v1.AssignedIdentityFinalizer})
	case 9:
		if path == assignmentPath {
			object["status"] = jsonObject{"status": "Assigned"}
		}
	}
	return apiRequest{http.MethodPost, path, "", object}
}

func updateRequest(r *rand.Rand) apiRequest {
	path := randomPath(r)
	object := objectFor(path, pick(r, currentVersion, currentVersion, currentVersion, staleVersion, ""))
	switch r.IntN(8) {
	case 0:
		setMetadata(object, "uid", pick(r, currentUID, otherUID))
	case 1:
		setMetadata(object, "name", "b")
	case 2:
		setMetadata(object, "finalizers", []string{v1.AssignedIdentityFinalizer})
	case 3:
		setMetadata(object, "labels", jsonObject{"label": pick(r, "x", "y", "not valid")})
	case 4:
		if path == assignmentPath {
			object["status"] = jsonObject{"status": "Created"}
		}
	case 5:
		if path == assignmentPath {
			object["spec"] = jsonObject{}
		}
	}
	return apiRequest{http.MethodPut, path + "/a", "", object}
}

func patchRequest(r *rand.Rand) apiRequest {
	path := randomPath(r)
	body := pick[any](r,
		jsonObject{"metadata": jsonObject{"labels": jsonObject{"label": "z"}}},
		jsonObject{"metadata": jsonObject{"labels": nil}},
		jsonObject{"metadata": jsonObject{"finalizers": []string{}, "uid": currentUID}},
		jsonObject{"metadata": jsonObject{"finalizers": []string{}, "uid": otherUID}},
		jsonObject{"metadata": jsonObject{"finalizers": nil}},
		jsonObject{"metadata": jsonObject{"finalizers": []string{"example.com/other"}}},
		jsonObject{"metadata": jsonObject{"resourceVersion": staleVersion, "labels": jsonObject{"label": "y"}}},
		jsonObject{"metadata": jsonObject{"name": "b"}},
		jsonObject{},
	)
	if path == assignmentPath && r.IntN(3) == 0 {
		body = pick[any](r, jsonObject{"spec": jsonObject{"pod": "q"}}, jsonObject{"spec": jsonObject{"pod": nil}}, jsonObject{"status": jsonObject{"status": "Assigned"}})
	}
	kind := mergePatch
	switch r.IntN(6) {
	case 0:
		kind = strategicPatch
	case 1:
		kind = jsonPatch
		body = pick[any](r,
			[]jsonObject{{"op": "add", "path": "/metadata/finalizers/-", "value": "example.com/other"}},
			[]jsonObject{{"op": "test", "path": "/metadata/name", "value": "b"}, {"op": "remove", "path": "/metadata/labels"}},
			[]jsonObject{{"op": "add", "path": "/metadata/labels", "value": jsonObject{"label": "w"}}},
			[]jsonObject{{"op": "remove", "path": "/no/such/path"}},
		)
	}
	return apiRequest{http.MethodPatch, path + "/a", kind, body}
}

// statusRequest changes the status of the AzureAssignedIdentity.
func statusRequest(r *rand.Rand) apiRequest {
	path := assignmentPath + "/a/status"
	if r.IntN(3) == 0 {
		object := objectFor(assignmentPath, pick(r, currentVersion, staleVersion, ""))
		object["status"] = jsonObject{"status": "Unassigned"}
		return apiRequest{http.MethodPut, path, "", setMetadata(object, "labels", jsonObject{"label": "status"})}
	}
	return apiRequest{http.MethodPatch, path, mergePatch, pick[any](r,
		jsonObject{"status": jsonObject{"status": "Assigned", "message": nil}},
		jsonObject{"status": jsonObject{"status": "Created", "message": "text"}},
		jsonObject{"status": nil},
		jsonObject{"spec": jsonObject{"pod": "r"}, "status": jsonObject{"status": "Assigned"}},
		jsonObject{"metadata": jsonObject{"labels": jsonObject{"label": "status"}, "finalizers": nil}},
		jsonObject{"metadata": jsonObject{"resourceVersion": staleVersion}, "status": jsonObject{"status": "Assigned"}},
	)}
}

func deleteRequest(r *rand.Rand) apiRequest {
	body := pick[any](r, nil, nil,
		jsonObject{"preconditions": jsonObject{"uid": currentUID}}, jsonObject{"preconditions": jsonObject{"uid": otherUID}},
		jsonObject{"preconditions": jsonObject{"resourceVersion": currentVersion}}, jsonObject{"preconditions": jsonObject{"resourceVersion": staleVersion}})
	return apiRequest{http.MethodDelete, randomPath(r) + "/a", "", body}
}

func podRequest(r *rand.Rand) apiRequest {
	spec := jsonObject{"containers": []jsonObject{{"name": "main", "image": "registry.example.com/app:1"}}}
	if r.IntN(2) == 0 {
		spec["nodeName"] = "n0"
	}
	pod := jsonObject{"apiVersion": "v1", "kind": "Pod", "metadata": jsonObject{"name": "a"}, "spec": spec, "status": jsonObject{"phase": "Running"}}
	binding := jsonObject{"apiVersion": "v1", "kind": "Binding", "metadata": jsonObject{"name": "a"}, "target": jsonObject{"apiVersion": "v1", "kind": "Node", "name": "n1"}}
	return pick(r,
		apiRequest{http.MethodPost, podsPath, "", pod}, apiRequest{http.MethodPost, podsPath, "", pod},
		apiRequest{http.MethodPost, podsPath + "/a/binding", "", binding},
		apiRequest{http.MethodPatch, podsPath + "/a", mergePatch, jsonObject{"spec": jsonObject{"nodeName": "n2"}}},
		apiRequest{http.MethodPatch, podsPath + "/a", strategicPatch, jsonObject{"metadata": jsonObject{"labels": jsonObject{v1.BindingLabel: "s0"}}}},
		apiRequest{http.MethodPatch, podsPath + "/a", mergePatch, jsonObject{"status": jsonObject{"phase": "Failed"}}},
		apiRequest{http.MethodPatch, podsPath + "/a/status", mergePatch, jsonObject{"status": jsonObject{"phase": pick(r, "Running", "Succeeded")}}},
		apiRequest{http.MethodDelete, podsPath + "/a", "", nil},
		apiRequest{http.MethodDelete, podsPath + "/a", "", jsonObject{"gracePeriodSeconds": 0}},
	)
}

// sendAll sends the requests one after the other and reads the object after each.
func sendAll(client apiClient, requests []apiRequest) (results [][2]apiResult) {
	known := map[string]placeholders{}
	for _, r := range requests {
		object := strings.TrimSuffix(r.path, "/status")
		object = strings.TrimSuffix(strings.TrimSuffix(object, "/binding"), "/a") + "/a"
		p := known[object]
		result := client.send(r.method, r.path, r.contentType, p.fill(r.body))
		read := client.send(http.MethodGet, object, "", nil)
		known[object] = p.next(read)
		results = append(results, [2]apiResult{result, read})
	}
	return results
}

// placeholders are the values that replace the placeholders in requests about one object.
type placeholders struct{ current, stale, uid string }

func (p placeholders) next(read apiResult) placeholders {
	metadata, _ := read.object["metadata"].(jsonObject)
	version, _ := metadata["resourceVersion"].(string)
	if uid, ok := metadata["uid"].(string); ok && read.Code == http.StatusOK && version != p.current {
		return placeholders{version, p.current, uid}
	}
	return p
}

// fill returns the body with values in place of the placeholders.
func (p placeholders) fill(body any) any {
	switch v := body.(type) {
	case jsonObject:
		filled := jsonObject{}
		for key, value := range v {
			filled[key] = p.fill(value)
		}
		return filled
	case string:
		switch v {
		case currentVersion:
			return p.current
		case staleVersion:
			return p.stale
		case currentUID:
			return p.uid
		}
	}
	return body
}

func sendToFake(t *testing.T, requests []apiRequest) (results [][2]apiResult) {
	synctest.Test(t, func(t *testing.T) {
		run := newComparedRun(t)
		for _, name := range namespaces {
			run.addNamespace(name)
		}
		conn := newConnection("test", 0)
		defer conn.disconnect()
		results = sendAll(apiClient{conn.apiTransport(run.api, run.handle)}, requests)
	})
	return results
}
