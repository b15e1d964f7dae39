//go:build !race

package mic

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// apiClient sends single requests to an API server.
type apiClient struct{ transport http.RoundTripper }

// apiResult is a response without what differs from server to server: UIDs, versions, times and the texts of errors.
type apiResult struct {
	Code   int
	Reason metav1.StatusReason // of an error
	Object string              // JSON

	object map[string]any // as the server sent it; not compared
}

// send sends a request to a path such as namespaces/blue/pods/p0. contentType is that of the body; "" is JSON.
func (c apiClient) send(method, path, contentType string, body any) apiResult {
	var data []byte
	if body != nil {
		data = mustMarshal(body)
	}
	request, err := http.NewRequest(method, "http://api.test"+absolutePath(path), bytes.NewReader(data))
	if err != nil {
		panic(err)
	}
	if contentType == "" {
		contentType = "application/json"
	}
	request.Header = http.Header{"Content-Type": {contentType}, "Accept": {"application/json"}}
	response, err := c.transport.RoundTrip(request)
	if err != nil {
		return apiResult{Reason: metav1.StatusReason(err.Error())}
	}
	defer response.Body.Close()
	data, err = io.ReadAll(response.Body)
	if err != nil {
		return apiResult{Reason: metav1.StatusReason(err.Error())}
	}
	result := apiResult{Code: response.StatusCode}
	if err := json.Unmarshal(data, &result.object); err != nil {
		return apiResult{Code: response.StatusCode, Reason: "not JSON"}
	}
	switch {
	case response.StatusCode >= http.StatusBadRequest:
		reason, _ := result.object["reason"].(string)
		result.Reason = metav1.StatusReason(reason)
	case result.object["kind"] != "Status":
		result.Object = string(mustMarshal(normalized(result.object)))
	}
	return result
}

func (r apiResult) String() string { return strings.TrimSpace(fmt.Sprintf("%d %s", r.Code, r.Reason)) }

// absolutePath prepends the path of the resource's API group.
func absolutePath(path string) string {
	if strings.Contains(path, "azure") {
		return "/apis/" + v1.GroupVersion.String() + "/" + path
	}
	return "/api/v1/" + path
}

func nodeObject(name string) map[string]any {
	return map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": name}, "spec": map[string]any{"providerID": nodeProviders[name]}}
}

// serverFields are the fields of metadata that differ from server to server.
var serverFields = []string{"uid", "resourceVersion", "creationTimestamp", "managedFields", "selfLink", "deletionGracePeriodSeconds"}

// normalized returns a copy of an object without the fields that differ from server to server. A real server sets many
// defaults in spec and status of pods and nodes, so only the fields that MIC reads remain there.
func normalized(object map[string]any) map[string]any {
	object = normalizedValue(object).(map[string]any)
	spec, _ := object["spec"].(map[string]any)
	status, _ := object["status"].(map[string]any)
	switch object["kind"] {
	case "Pod":
		object["spec"] = map[string]any{"nodeName": spec["nodeName"]}
		object["status"] = map[string]any{"phase": status["phase"]}
		if metadata, ok := object["metadata"].(map[string]any); ok {
			delete(metadata, "generation")
		}
	case "Node":
		object["spec"] = map[string]any{"providerID": spec["providerID"]}
		delete(object, "status")
	}
	return object
}

func normalizedValue(v any) any {
	switch v := v.(type) {
	case map[string]any:
		v = maps.Clone(v)
		for key, value := range v {
			v[key] = normalizedValue(value)
		}
		for _, key := range serverFields {
			delete(v, key)
		}
		for _, key := range []string{"labels", "annotations", "finalizers"} {
			if reflect.ValueOf(v[key]).Kind() != reflect.Invalid && reflect.ValueOf(v[key]).Len() == 0 {
				delete(v, key) // a real server does not store these fields if they are empty
			}
		}
		if _, ok := v["deletionTimestamp"]; ok {
			v["deletionTimestamp"] = "set"
		}
		return v
	case []any:
		v = slices.Clone(v)
		for i, value := range v {
			v[i] = normalizedValue(value)
		}
		return v
	}
	return v
}

var (
	nameHash      = regexp.MustCompile(`-[0-9a-f]{16}$`)
	ledgerDetails = regexp.MustCompile(`"(started|token)":"[^"]*",?`)
)

// snapshot returns the normalized objects, the identities attached in the fake ARM and the results of the operations,
// one per line.
func (run *comparedRun) snapshot() []string {
	lines := slices.Clone(run.results)
	uids := map[string]any{}
	for _, path := range []string{"pods", "nodes", v1.AzureIdentities, v1.AzureIdentityBindings, v1.AzureAssignedIdentities, "namespaces/" + micNamespace + "/configmaps"} {
		list := run.client.send(http.MethodGet, path, "", nil)
		items, _ := list.object["items"].([]any)
		if list.Code != http.StatusOK {
			lines = append(lines, path+": "+list.String())
		}
		for _, item := range items {
			object := item.(map[string]any)
			metadata := object["metadata"].(map[string]any)
			name, _ := metadata["name"].(string)
			kind := strings.TrimSuffix(list.object["kind"].(string), "List")
			object["kind"], object["apiVersion"] = kind, list.object["apiVersion"]
			switch kind {
			case "Pod":
				uids[fmt.Sprint(metadata["namespace"], "/", name)] = metadata["uid"]
			case "AzureAssignedIdentity":
				metadata["name"] = nameHash.ReplaceAllString(name, "-HASH")
				object["owned by the current pod"] = ownedBy(metadata, uids)
				delete(metadata, "generation") // counts MIC's updates of the spec, which depend on timing
			}
			text := string(mustMarshal(normalized(object)))
			lines = append(lines, ledgerDetails.ReplaceAllString(text, ""))
		}
	}
	for _, m := range run.arm.Machines() {
		lines = append(lines, fmt.Sprintf("machine %s: %s", azure.FoldID(m.ID), lastSegments(slices.Sorted(slices.Values(m.Identities)))))
	}
	slices.Sort(lines)
	return lines
}

// ownedBy reports whether an object has exactly one owner reference, and the reference has the UID of the pod that it
// names. uids has the UIDs of the existing pods.
func ownedBy(metadata map[string]any, uids map[string]any) bool {
	owners, _ := metadata["ownerReferences"].([]any)
	return len(owners) == 1 && owners[0].(map[string]any)["uid"] == uids[fmt.Sprint(metadata["namespace"], "/", owners[0].(map[string]any)["name"])]
}
