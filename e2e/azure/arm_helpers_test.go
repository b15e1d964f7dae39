package azure

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	setID = "/subscriptions/Sub/resourceGroups/Nodes/providers/Microsoft.Compute/virtualMachineScaleSets/set"
	vmID  = "/subscriptions/Sub/resourceGroups/Nodes/providers/Microsoft.Compute/virtualMachines/vm"
	armV  = "?api-version=2025-04-01"
)

var green = userAssigned("green", 30)

// testARM is a fake ARM with a scale set and a virtual machine. Its methods send
// requests without a network.
type testARM struct {
	*ARM
	t *testing.T
}

func newTestARM(t *testing.T, change ...func(*ARMSettings)) *testARM {
	t.Helper()
	a := &testARM{NewARM(ARMOptions{Tenant: tenant}), t}
	for _, id := range []Identity{red, blue, green} {
		a.must(a.DefineIdentity(id))
	}
	own := Identity{ClientID: guid(90), ObjectID: guid(91)}
	a.must(a.AddMachine(Machine{ID: setID, SystemAssigned: &own, Identities: []string{red.ResourceID}}))
	a.must(a.AddMachine(Machine{ID: vmID}))
	for _, c := range change {
		a.Change(c)
	}
	return a
}

func (a *testARM) must(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

func (a *testARM) try(ctx context.Context, method, target, body string, headers ...string) (answer, error) {
	a.t.Helper()
	r, err := http.NewRequestWithContext(ctx, method, "https://management.azure.com"+target, strings.NewReader(body))
	a.must(err)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
	}
	resp, err := a.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(text)}, err
}

func (a *testARM) do(method, target, body string, headers ...string) answer {
	a.t.Helper()
	out, err := a.try(a.t.Context(), method, target, body, headers...)
	a.must(err)
	return out
}

// patchOf returns the body of a PATCH. kind is the value of identity.type. A change is
// "+" (add) or "-" (remove) and the ID of an identity.
func patchOf(kind string, changes ...string) string {
	identities := map[string]any{}
	for _, c := range changes {
		if id := c[1:]; c[0] == '+' {
			identities[id] = struct{}{}
		} else {
			identities[id] = nil
		}
	}
	identity := map[string]any{"type": kind}
	if len(changes) > 0 {
		identity["userAssignedIdentities"] = identities
	}
	return string(encode(map[string]any{"identity": identity}))
}

func (a *testARM) patchSet(kind string, changes ...string) answer {
	a.t.Helper()
	return a.do("PATCH", setID+armV, patchOf(kind, changes...))
}

func (a *testARM) get(id string) armResource {
	a.t.Helper()
	return a.do("GET", id+armV, "").machine(a.t)
}

func (a answer) machine(t *testing.T) armResource {
	t.Helper()
	if a.status != 200 {
		t.Fatalf("got status %d, want 200 with a machine; body: %s", a.status, a.body)
	}
	var doc armResource
	if err := json.Unmarshal([]byte(a.body), &doc); err != nil {
		t.Fatalf("decoding the machine in the body: %v; body: %s", err, a.body)
	}
	return doc
}

// names returns the names of the user-assigned identities, sorted and separated by
// spaces.
func (r armResource) names() string {
	if r.Identity == nil {
		return ""
	}
	var names []string
	for id := range r.Identity.UserAssignedIdentities {
		names = append(names, id[strings.LastIndex(id, "/")+1:])
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func (r armResource) kind() string {
	if r.Identity == nil {
		return "None"
	}
	return r.Identity.Type
}

func (r armResource) state() string { return r.Properties["provisioningState"].(string) }

func (a answer) armError(t *testing.T) armError {
	t.Helper()
	var doc struct{ Error armError }
	if err := json.Unmarshal([]byte(a.body), &doc); err != nil || doc.Error.Code == "" || doc.Error.Message == "" {
		t.Fatalf("the response is no error of ARM with a code and a message (decoding error: %v): status %d, body %s", err, a.status, a.body)
	}
	return doc.Error
}

func (a *testARM) mustRefuse(got answer, status int, code string) armError {
	a.t.Helper()
	e := got.armError(a.t)
	if got.status != status || e.Code != code {
		a.t.Errorf("got status %d with body %s, want status %d with code %s", got.status, got.body, status, code)
	}
	return e
}

// operationStatus is the response to a poll of an operation.
type operationStatus struct {
	Status, Name string
	Error        *armError
	again        string // Retry-After
}

func (a *testARM) poll(began answer) operationStatus {
	a.t.Helper()
	link := began.header.Get("Azure-AsyncOperation")
	target, ok := strings.CutPrefix(link, "https://management.azure.com")
	if !ok {
		a.t.Fatalf("the header Azure-AsyncOperation %q is no URL of https://management.azure.com; status %d, body %s", link, began.status, began.body)
	}
	got := a.do("GET", target, "")
	var out operationStatus
	if err := json.Unmarshal([]byte(got.body), &out); err != nil || got.status != 200 {
		a.t.Fatalf("poll of the operation: got status %d, want 200 with JSON (decoding error: %v); body: %s", got.status, err, got.body)
	}
	out.again = got.header.Get("Retry-After")
	return out
}

func (a *testARM) lastRequest() ARMRequest {
	a.t.Helper()
	log := a.Log(0)
	if len(log) == 0 {
		a.t.Fatal("the request log of ARM is empty")
	}
	return log[len(log)-1]
}

// mustTimeOut sends a request that must get no response within the time.
func (a *testARM) mustTimeOut(within time.Duration, method, target, body string) {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), within)
	defer cancel()
	if got, err := a.try(ctx, method, target, body); !errors.Is(err, context.DeadlineExceeded) {
		a.t.Errorf("got status %d, error %v; want no response within %s", got.status, err, within)
	}
}
