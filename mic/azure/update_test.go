package azure

import (
	"errors"
	"fmt"
	"net/http"
	"testing"
)

func TestAnUpdateContainsOnlyTheDifference(t *testing.T) {
	cases := []struct {
		name        string
		basis       State
		add, remove []string
		want        string
	}{
		{"the first identity", State{}, []string{id("a")}, nil,
			`{"identity":{"type":"UserAssigned","userAssignedIdentities":{"` + id("a") + `":{}}}}`},
		{"the first beside a system-assigned one", having(true), []string{id("a")}, nil,
			`{"identity":{"type":"SystemAssigned, UserAssigned","userAssignedIdentities":{"` + id("a") + `":{}}}}`},
		{"one more", having(false, "kubelet"), []string{id("a")}, nil,
			`{"identity":{"type":"UserAssigned","userAssignedIdentities":{"` + id("a") + `":{}}}}`},
		{"one less", having(false, "kubelet", "a"), nil, []string{id("a")},
			`{"identity":{"type":"UserAssigned","userAssignedIdentities":{"` + armID("a") + `":null}}}`},
		{"one less beside a system-assigned one", having(true, "kubelet", "a"), nil, []string{Fold(id("a"))},
			`{"identity":{"type":"SystemAssigned, UserAssigned","userAssignedIdentities":{"` + armID("a") + `":null}}}`},
		{"both", having(false, "a", "b"), []string{id("c")}, []string{id("a")},
			`{"identity":{"type":"UserAssigned","userAssignedIdentities":{"` + id("c") + `":{},"` + armID("a") + `":null}}}`},
		{"the last goes", having(false, "a"), nil, []string{id("a")},
			`{"identity":{"type":"None"}}`},
		{"the last goes beside a system-assigned one", having(true, "a", "b"), nil, []string{id("a"), id("b")},
			`{"identity":{"type":"SystemAssigned"}}`},
		{"the last is replaced", having(false, "a"), []string{id("b")}, []string{id("a")},
			`{"identity":{"type":"UserAssigned","userAssignedIdentities":{"` + id("b") + `":{},"` + armID("a") + `":null}}}`},
		{"what is there is not added, what is not there is not removed", having(false, "a"), []string{Fold(id("A")), id("b"), id("B") + "/"}, []string{id("z")},
			`{"identity":{"type":"UserAssigned","userAssignedIdentities":{"` + id("b") + `":{}}}}`},
		{"nothing", having(true, "a"), []string{armID("a")}, []string{id("z")}, ""},
		{"nothing of nothing", State{}, nil, []string{id("a")}, ""},
	}
	for _, r := range []Resource{vm, vmss} {
		for _, c := range cases {
			t.Run(r.Kind.String()+", "+c.name, func(t *testing.T) {
				arm := replies(replying(200, describe(r, "Succeeded", "None")))
				o, err := newClient(t, arm).Begin(t.Context(), r, c.basis, c.add, c.remove)
				if err != nil {
					t.Fatal(err)
				}
				requests := arm.requests()
				if c.want == "" {
					state, err := o.Wait(t.Context())
					if len(requests) != 0 || o.Token() != "" || err != nil || len(state.Identities) != len(c.basis.Identities) {
						t.Errorf("sent %v; Wait returned %+v, %v; want no request and the unchanged state", requests, state, err)
					}
					return
				}
				if len(requests) != 1 || requests[0].method != http.MethodPatch || requests[0].body != c.want {
					t.Fatalf("sent %+v\nwant %s", requests, c.want)
				}
				if want := "https://management.azure.com" + r.ID() + "?api-version=2025-04-01"; requests[0].url != want {
					t.Errorf("sent to %s, want %s", requests[0].url, want)
				}
				if got := requests[0].header.Get("If-Match"); got != c.basis.ETag {
					t.Errorf("If-Match %q, want %q", got, c.basis.ETag)
				}
				if got := requests[0].header.Get("Authorization"); got != "Bearer "+bearer {
					t.Errorf("the header Authorization is %q, want the token of the credential", got)
				}
			})
		}
	}
}

func TestAnInvalidUpdateIsNotSent(t *testing.T) {
	var many []string
	var names []string
	for i := range MaxIdentities/2 + 1 {
		many, names = append(many, id(fmt.Sprintf("new-%d", i))), append(names, fmt.Sprintf("old-%d", i))
	}
	cases := []struct {
		name        string
		basis       State
		add, remove []string
	}{
		{"more than ARM takes", having(false, names...), many, mapped(names, id)},
		{"wanted and unwanted at once", having(false, "a"), []string{id("a")}, []string{armID("A")}},
		{"wanted and unwanted at once, and not there", State{}, []string{id("a")}, []string{armID("a")}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			arm := replies(replying(200, ""))
			_, err := newClient(t, arm).Begin(t.Context(), vm, c.basis, c.add, c.remove)
			var failed *Error
			if !errors.As(err, &failed) || failed.Class != Invalid || len(arm.requests()) != 0 {
				t.Errorf("got %v after %d requests; want class Invalid and no request", err, len(arm.requests()))
			}
		})
	}
	arm := replies(replying(200, describe(vm, "Succeeded", "None")))
	if _, err := newClient(t, arm).Begin(t.Context(), vm, having(false, names[1:]...), many[1:], mapped(names[1:], id)); err != nil || len(arm.requests()) != 1 {
		t.Errorf("an update with MaxIdentities identities: got %v, want no error and one request", err)
	}
}

func mapped(in []string, f func(string) string) []string {
	var out []string
	for _, s := range in {
		out = append(out, f(s))
	}
	return out
}

func TestAnUpdateIsSentOnce(t *testing.T) {
	cases := []struct {
		name    string
		respond func(*http.Request) (*http.Response, error)
	}{
		{"broken", replying(500, "")},
		{"busy", replying(503, "", "Retry-After: 1")},
		{"nobody there", func(*http.Request) (*http.Response, error) { return nil, errors.New("connection refused") }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			arm := replies(c.respond)
			_, err := newClient(t, arm).Begin(t.Context(), vm, State{}, []string{id("a")}, nil)
			var failed *Error
			if !errors.As(err, &failed) || failed.Class != Unavailable || len(arm.requests()) != 1 {
				t.Errorf("got %v after %d requests; want class Unavailable and one request", err, len(arm.requests()))
			}
		})
	}
}
