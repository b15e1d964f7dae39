//go:build !race

package mic

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
)

// operation is one step of a compared sequence. All random choices are made before the sequence runs, so that the
// operations are the same with the fake API server and with the real one.
type operation struct {
	name string
	// afterConvergence makes the run wait before the operation until MIC has converged, and compare the objects.
	// Operations that depend on what MIC has written need this wait.
	afterConvergence bool
	run              func(*comparedRun) string // returns the result of the operation, which is compared
	pause            time.Duration             // after the operation
}

func (o operation) String() string { return o.name }

// operationKinds are the functions that choose an operation, each with its frequency relative to the others.
var operationKinds = []struct {
	weight int
	choose func(*rand.Rand) operation
}{
	{10, createPodOperation}, {6, deletePodOperation}, {3, schedulePodOperation}, {3, patchPodOperation},
	{5, createBindingOperation}, {3, changeBindingOperation}, {5, createIdentityOperation}, {4, changeIdentityOperation},
	{1, nodeOperation}, {2, staleUpdateOperation}, {4, assignmentOperation}, {3, leaderOperation}, {3, apiFaultOperation},
	{3, azureOperation},
}

const operationsInSequence = 40

func randomOperations(r *rand.Rand) (operations []operation) {
	total := 0
	for _, k := range operationKinds {
		total += k.weight
	}
	for range 6 {
		operations = append(operations, createIdentityOperation(r), createBindingOperation(r), createPodOperation(r))
	}
	for len(operations) < operationsInSequence {
		n := r.IntN(total)
		i := slices.IndexFunc(operationKinds, func(k struct {
			weight int
			choose func(*rand.Rand) operation
		}) bool {
			n -= k.weight
			return n < 0
		})
		o := operationKinds[i].choose(r)
		o.pause = pick(r, 0, 0, randomDuration(r, 0, time.Second), randomDuration(r, time.Second, 10*time.Second))
		o.afterConvergence = o.afterConvergence || r.IntN(8) == 0
		operations = append(operations, o)
	}
	return operations
}

// requestOperation is an operation that sends one request.
func requestOperation(method, path, contentType string, body any) operation {
	name := fmt.Sprintf("%s %s", method, path)
	if body != nil {
		name += " " + string(mustMarshal(body))
	}
	return operation{name: name, run: func(run *comparedRun) string { return run.client.send(method, path, contentType, body).String() }}
}

const mergePatch = "application/merge-patch+json"

func podPath(r *rand.Rand) (namespace, name, path string) {
	namespace, name = pick(r, namespaces...), pick(r, podNames...)
	return namespace, name, "namespaces/" + namespace + "/pods/" + name
}

func randomNode(r *rand.Rand) string { return pick(r, slices.Sorted(maps.Keys(nodeProviders))...) }

// createPodOperation creates a pod. If the pod has a node, the operation also sets the phase, as a kubelet does.
func createPodOperation(r *rand.Rand) operation {
	namespace, name, path := podPath(r)
	spec := map[string]any{"containers": []map[string]any{{"name": "main", "image": "registry.example.com/app:1"}}}
	if r.IntN(4) > 0 {
		spec["nodeName"] = randomNode(r)
	}
	body := map[string]any{
		"apiVersion": "v1", "kind": "Pod", "spec": spec,
		"metadata": map[string]any{"name": name, "labels": map[string]string{v1.BindingLabel: pick(r, selectors...)}},
	}
	create := requestOperation(http.MethodPost, strings.TrimSuffix(path, "/"+name), "", body)
	return operation{name: create.name + " in " + namespace, run: func(run *comparedRun) string {
		result := create.run(run)
		if spec["nodeName"] == nil {
			return result
		}
		return result + ", " + setPhase(run, path, "Running")
	}}
}

func setPhase(run *comparedRun, path, phase string) string {
	return run.client.send(http.MethodPatch, path+"/status", mergePatch, map[string]any{"status": map[string]any{"phase": phase}}).String()
}

func deletePodOperation(r *rand.Rand) operation {
	_, _, path := podPath(r)
	if r.IntN(3) == 0 {
		return requestOperation(http.MethodDelete, path, "", nil)
	}
	return requestOperation(http.MethodDelete, path, "", map[string]any{"gracePeriodSeconds": 0})
}

// schedulePodOperation binds a pod to a node as the scheduler does.
func schedulePodOperation(r *rand.Rand) operation {
	_, name, path := podPath(r)
	bind := requestOperation(http.MethodPost, path+"/binding", "", map[string]any{
		"apiVersion": "v1", "kind": "Binding", "metadata": map[string]any{"name": name},
		"target": map[string]any{"apiVersion": "v1", "kind": "Node", "name": randomNode(r)},
	})
	return operation{name: bind.name, run: func(run *comparedRun) string { return bind.run(run) + ", " + setPhase(run, path, "Running") }}
}

func patchPodOperation(r *rand.Rand) operation {
	_, _, path := podPath(r)
	if r.IntN(2) == 0 {
		phase := pick(r, "Succeeded", "Failed")
		return operation{name: path + " has phase " + phase, run: func(run *comparedRun) string { return setPhase(run, path, phase) }}
	}
	label := pick[any](r, "s0", "s1", "s2", nil)
	return requestOperation(http.MethodPatch, path, mergePatch, map[string]any{"metadata": map[string]any{"labels": map[string]any{v1.BindingLabel: label}}})
}

func createBindingOperation(r *rand.Rand) operation {
	name, selector := pick(r, identityNames...), pick(r, selectors...)
	return requestOperation(http.MethodPost, "namespaces/"+pick(r, namespaces...)+"/azureidentitybindings", "", map[string]any{
		"apiVersion": v1.GroupVersion.String(), "kind": "AzureIdentityBinding", "metadata": map[string]any{"name": name + "-" + selector},
		"spec": map[string]any{"azureIdentity": name, "selector": selector},
	})
}

func changeBindingOperation(r *rand.Rand) operation {
	path := "namespaces/" + pick(r, namespaces...) + "/azureidentitybindings/" + pick(r, identityNames...) + "-" + pick(r, selectors...)
	if r.IntN(2) == 0 {
		return requestOperation(http.MethodDelete, path, "", nil)
	}
	return requestOperation(http.MethodPatch, path, mergePatch, map[string]any{"spec": map[string]any{"selector": pick(r, selectors...)}})
}

func randomIdentityBody(r *rand.Rand) map[string]any {
	spec := map[string]any{"type": 0, "resourceID": pick(r, identityID, func(n string) string { return strings.ToLower(identityID(n)) })(pick(r, managedNames...)), "clientID": clientID("c")}
	if r.IntN(8) == 0 {
		spec = map[string]any{"type": int(v1.Federated), "tenantID": "contoso.example", "clientID": clientID("fed")}
	}
	return map[string]any{"apiVersion": v1.GroupVersion.String(), "kind": "AzureIdentity", "spec": spec}
}

func createIdentityOperation(r *rand.Rand) operation {
	body := randomIdentityBody(r)
	body["metadata"] = map[string]any{"name": pick(r, identityNames...)}
	return requestOperation(http.MethodPost, "namespaces/"+pick(r, namespaces...)+"/azureidentities", "", body)
}

func identityPath(r *rand.Rand) string {
	return "namespaces/" + pick(r, namespaces...) + "/azureidentities/" + pick(r, identityNames...)
}

func changeIdentityOperation(r *rand.Rand) operation {
	path := identityPath(r)
	switch r.IntN(3) {
	case 0:
		return requestOperation(http.MethodDelete, path, "", nil)
	case 1:
		behavior := pick[any](r, v1.BehaviorNamespaced, nil)
		return requestOperation(http.MethodPatch, path, mergePatch, map[string]any{"metadata": map[string]any{"annotations": map[string]any{v1.BehaviorAnnotation: behavior}}})
	}
	return requestOperation(http.MethodPatch, path, mergePatch, map[string]any{"spec": map[string]any{"resourceID": identityID(pick(r, managedNames...))}})
}

func nodeOperation(r *rand.Rand) operation {
	node := randomNode(r)
	if r.IntN(2) == 0 {
		return requestOperation(http.MethodDelete, "nodes/"+node, "", nil)
	}
	return requestOperation(http.MethodPost, "nodes", "", nodeObject(node))
}

// staleUpdateOperation patches an AzureIdentity, and then updates it from the version before the patch.
func staleUpdateOperation(r *rand.Rand) operation {
	path, value := identityPath(r), fmt.Sprint(r.IntN(1000))
	return operation{name: "two updates of one version of " + path, run: func(run *comparedRun) string {
		read := run.client.send(http.MethodGet, path, "", nil)
		annotate := map[string]any{"metadata": map[string]any{"annotations": map[string]any{"note": value}}}
		first := run.client.send(http.MethodPatch, path, mergePatch, annotate)
		if read.Code != http.StatusOK {
			return read.String() + ", " + first.String()
		}
		return read.String() + ", " + first.String() + ", " + run.client.send(http.MethodPut, path, "", read.object).String()
	}}
}

// assignmentOperation changes one of MIC's assignments as a user would.
func assignmentOperation(r *rand.Rand) operation {
	n, kind := r.IntN(1000), pick(r, "delete", "delete without finalizers", "change the status of")
	return operation{name: kind + " an assignment", afterConvergence: true, run: func(run *comparedRun) string {
		list := run.client.send(http.MethodGet, v1.AzureAssignedIdentities, "", nil)
		items, _ := list.object["items"].([]any)
		if len(items) == 0 {
			return "none"
		}
		// The order ignores the hash in a name, because the hash depends on the UID of the pod, which differs between
		// the runs.
		slices.SortFunc(items, func(a, b any) int { return strings.Compare(sortKey(a), sortKey(b)) })
		metadata := items[n%len(items)].(map[string]any)["metadata"].(map[string]any)
		path := fmt.Sprintf("namespaces/%s/azureassignedidentities/%s", metadata["namespace"], metadata["name"])
		result := fmt.Sprint(n%len(items), " of ", len(items), ": ")
		switch kind {
		case "change the status of":
			return result + run.client.send(http.MethodPatch, path+"/status", mergePatch, map[string]any{"status": map[string]any{"status": v1.AssignmentCreated}}).String()
		case "delete without finalizers":
			result += run.client.send(http.MethodPatch, path, mergePatch, map[string]any{"metadata": map[string]any{"finalizers": nil}}).String() + ", "
		}
		return result + run.client.send(http.MethodDelete, path, "", nil).String()
	}}
}

func sortKey(object any) string {
	metadata := object.(map[string]any)["metadata"].(map[string]any)
	return fmt.Sprint(metadata["namespace"], "/", nameHash.ReplaceAllString(fmt.Sprint(metadata["name"]), ""), " ", string(mustMarshal(normalized(object.(map[string]any)["spec"].(map[string]any)))))
}

// leaderOperation kills the leader, now or at one of its next writes, or lets it step down.
func leaderOperation(r *rand.Rand) operation {
	switch n, applied := 1+r.IntN(5), r.IntN(2) == 0; r.IntN(3) {
	case 0:
		return operation{name: "kill the leader", run: func(run *comparedRun) string {
			run.leader.kill()
			run.leader = run.start()
			return ""
		}}
	case 1:
		return operation{name: "the leader steps down", run: func(run *comparedRun) string {
			run.leader.stepDown()
			run.leader = run.start()
			return ""
		}}
	default:
		return operation{name: fmt.Sprintf("kill the leader at write %d, applied: %t", n, applied), run: func(run *comparedRun) string {
			run.leader.crashAt(n, applied, func() { run.killed.Store(true) })
			return ""
		}}
	}
}

// apiFaultOperation makes requests of the leader fail before they reach the API server, or aborts the leader's watches.
func apiFaultOperation(r *rand.Rand) operation {
	if r.IntN(3) == 0 {
		return operation{name: "break the watches", run: func(run *comparedRun) string {
			run.leader.conn.breakWatches()
			return ""
		}}
	}
	count, code := 1+r.IntN(6), pick(r, http.StatusInternalServerError, http.StatusServiceUnavailable, http.StatusTooManyRequests)
	return operation{name: fmt.Sprintf("the next %d requests of MIC fail with %d", count, code), run: func(run *comparedRun) string {
		var failed atomic.Int64
		run.leader.conn.hook(func(q request) error {
			if q.target != toAPI || failed.Add(1) > int64(count) {
				return nil
			}
			return apierrors.NewGenericServerResponse(code, "", v1.GroupVersion.WithResource("").GroupResource(), "", "injected fault", 1, true)
		}, nil)
		return ""
	}}
}

// azureOperation changes the behavior of the fake ARM, or detaches an identity.
func azureOperation(r *rand.Rand) operation {
	machine, identity := scaleSetID(pick(r, "Set-A", "Set-B")), identityID(pick(r, managedNames...))
	switch r.IntN(3) {
	case 0:
		delay := pick(r, 0, 3*time.Second, 15*time.Second)
		return operation{name: fmt.Sprintf("Azure takes %s for an update", delay), run: func(run *comparedRun) string {
			run.arm.Change(func(s *azure.ARMSettings) { s.Delay = delay })
			return ""
		}}
	case 1:
		fault := azure.ARMFault{Operation: azure.OpPatch, Status: pick(r, http.StatusConflict, http.StatusBadGateway), Count: 1}
		return operation{name: fmt.Sprintf("the next update fails with %d", fault.Status), run: func(run *comparedRun) string {
			requireNoError(run.t, run.arm.SetFault(fault))
			return ""
		}}
	default:
		return operation{name: "detach " + lastSegment(identity) + " from " + lastSegment(machine), afterConvergence: true, run: func(run *comparedRun) string {
			attached := run.arm.Attached(machine, identity)
			if attached {
				run.detachExternally(machine, identity)
			}
			return fmt.Sprint("was attached: ", attached)
		}}
	}
}
