package azure

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// linked is the error message of ARM if MIC may not assign some identities.
func linked(names ...string) string {
	return `The client 'c' with object id 'o' has permission to perform action 'Microsoft.Compute/virtualMachines/write' on scope '` + vm.ID() +
		`'; however, it does not have permission to perform action 'Microsoft.ManagedIdentity/userAssignedIdentities/assign/action' on the linked scope(s) '` +
		strings.Join(mapped(names, armID), ",") + `' or the linked scope(s) are invalid.`
}

// missing is the error message of ARM if an identity does not exist.
func missing(name string) string {
	return `Identity operation for resource '` + vm.ID() + `' failed with error 'Failed to perform resource identity operation. Status: 'BadRequest'. Response: '{\"error\":{\"code\":\"BadRequest\",\"message\":\"Resource '` +
		armID(name) + `' was not found.\"}}'.'.`
}

func armBody(code, message, more string) string {
	text, _ := json.Marshal(message)
	return fmt.Sprintf(`{"error":{"code":%q,"message":%s%s}}`, code, text, more)
}

// refusedUpdates are responses to an update of the identities a and b, with the error that each becomes.
var refusedUpdates = []struct {
	name    string
	status  int
	body    string
	headers []string
	want    Error
}{
	{"one identity may not be assigned", 403, armBody("LinkedAuthorizationFailed", linked("a"), ""), []string{"X-Ms-Correlation-Request-Id: c-1"},
		Error{Class: BadIdentity, Code: "LinkedAuthorizationFailed", Message: linked("a"), Identities: []string{Fold(id("a"))}, CorrelationID: "c-1"}},
	{"two may not, among others that are not of the request", 403, armBody("LinkedAuthorizationFailed", linked("b", "foreign", "a"), ""), nil,
		Error{Class: BadIdentity, Code: "LinkedAuthorizationFailed", Message: linked("b", "foreign", "a"), Identities: []string{Fold(id("a")), Fold(id("b"))}}},
	{"one does not exist", 400, armBody("FailedIdentityOperation", missing("b"), ""), nil,
		Error{Class: BadIdentity, Code: "FailedIdentityOperation", Message: missing("b"), Identities: []string{Fold(id("b"))}}},
	{"one does not exist, says a 404", 404, armBody("FailedIdentityOperation", missing("b"), ""), nil,
		Error{Class: BadIdentity, Code: "FailedIdentityOperation", Message: missing("b"), Identities: []string{Fold(id("b"))}}},
	{"a field of its own goes before the sentence", 403, armBody("LinkedAuthorizationFailed", linked("a", "b"), `,"additionalInfo":[{"type":"LinkedScope","info":{"scopes":["`+armID("B")+`"]}}]`), nil,
		Error{Class: BadIdentity, Code: "LinkedAuthorizationFailed", Message: linked("a", "b"), Identities: []string{Fold(id("b"))}}},
	{"the target is a field of its own", 400, armBody("FailedIdentityOperation", "no", `,"target":"`+id("a")+`"`), nil,
		Error{Class: BadIdentity, Code: "FailedIdentityOperation", Message: "no", Identities: []string{Fold(id("a"))}}},
	{"the matter is in the details", 400, armBody("BadRequest", "see details", `,"details":[{"code":"Other","message":"x"},{"code":"FailedIdentityOperation","message":"it is gone","target":"`+id("a")+`"}]`), nil,
		Error{Class: BadIdentity, Code: "FailedIdentityOperation", Message: "it is gone", Identities: []string{Fold(id("a"))}}},
	{"the matter is in the inner error", 400, armBody("BadRequest", "see within", `,"innererror":{"code":"FailedIdentityOperation","message":"it is gone"}`), nil,
		Error{Class: BadIdentity, Code: "FailedIdentityOperation", Message: "it is gone"}},
	{"no identity is named", 403, armBody("LinkedAuthorizationFailed", "no", ""), nil,
		Error{Class: BadIdentity, Code: "LinkedAuthorizationFailed", Message: "no"}},
	{"only foreign ones are named", 403, armBody("LinkedAuthorizationFailed", linked("foreign"), ""), nil,
		Error{Class: BadIdentity, Code: "LinkedAuthorizationFailed", Message: linked("foreign")}},
	{"a longer name is another name", 400, armBody("FailedIdentityOperation", missing("a-2"), ""), nil,
		Error{Class: BadIdentity, Code: "FailedIdentityOperation", Message: missing("a-2")}},
	{"another code, but an identity is named", 400, armBody("InvalidIdentityValues", "Invalid value for the identities '"+id("a")+"'.", ""), nil,
		Error{Class: BadIdentity, Code: "InvalidIdentityValues", Message: "Invalid value for the identities '" + id("a") + "'.", Identities: []string{Fold(id("a"))}}},
	{"the scope that is missing is an identity", 403, armBody("AuthorizationFailed", "not 'Microsoft.ManagedIdentity/userAssignedIdentities/assign/action' over scope '"+id("a")+"'", ""), nil,
		Error{Class: BadIdentity, Code: "AuthorizationFailed", Message: "not 'Microsoft.ManagedIdentity/userAssignedIdentities/assign/action' over scope '" + id("a") + "'", Identities: []string{Fold(id("a"))}}},
	{"MIC may not write the machine", 403, armBody("AuthorizationFailed", "does not have authorization to perform action 'Microsoft.Compute/virtualMachines/write' over scope '"+vm.ID()+"'", ""), nil,
		Error{Class: Denied, Code: "AuthorizationFailed", Message: "does not have authorization to perform action 'Microsoft.Compute/virtualMachines/write' over scope '" + vm.ID() + "'"}},
	{"the token is not taken", 401, armBody("InvalidAuthenticationToken", "expired "+bearer, ""), nil,
		Error{Class: Denied, Code: "InvalidAuthenticationToken", Message: "expired [...]"}},
	{"the machine is gone", 404, armBody("ResourceNotFound", "The Resource 'x' was not found.", ""), nil,
		Error{Class: NotFound, Code: "ResourceNotFound", Message: "The Resource 'x' was not found."}},
	{"the machine is busy", 409, armBody("Conflict", "another operation", ""), nil,
		Error{Class: Conflict, Code: "Conflict", Message: "another operation"}},
	{"the machine has changed", 412, armBody("PreconditionFailed", "etag of "+id("a"), ""), nil,
		Error{Class: Conflict, Code: "PreconditionFailed", Message: "etag of " + id("a")}},
	{"throttled", 429, armBody("OperationNotAllowed", "too many", ""), []string{"Retry-After: 17"},
		Error{Class: Throttled, Code: "OperationNotAllowed", Message: "too many", RetryAfter: 17 * time.Second}},
	{"throttled, and without Retry-After", 429, ``, nil,
		Error{Class: Throttled, Message: "Too Many Requests, without an error message", RetryAfter: defaultRetryAfter}},
	{"throttled for absurdly long", 429, ``, []string{"Retry-After: 99999999"},
		Error{Class: Throttled, Message: "Too Many Requests, without an error message", RetryAfter: time.Hour}},
	{"throttled by milliseconds", 429, ``, []string{"X-Ms-Retry-After-Ms: 1500"},
		Error{Class: Throttled, Message: "Too Many Requests, without an error message", RetryAfter: 1500 * time.Millisecond}},
	{"a fault of Azure, whatever it names", 500, armBody("FailedIdentityOperation", missing("a"), ""), nil,
		Error{Class: Unavailable, Code: "FailedIdentityOperation", Message: missing("a")}},
	{"the response of a proxy", 502, "<html>\n<b>no</b></html>", nil,
		Error{Class: Unavailable, Message: "Bad Gateway, without an error message"}},
	{"it makes no sense", 400, armBody("InvalidParameter", "what?\n\tagain", ""), nil,
		Error{Class: Invalid, Code: "InvalidParameter", Message: "what? again"}},
	{"the body is none of ARM's", 400, `["` + id("a") + `"]`, nil,
		Error{Class: Invalid, Message: "Bad Request, without an error message"}},
	{"nothing has its type", 400, `{"error":{"code":1,"message":["x"],"details":"` + id("a") + `","additionalInfo":null}}`, nil,
		Error{Class: BadIdentity, Message: "Bad Request, without an error message", Identities: []string{Fold(id("a"))}}},
	{"sent elsewhere", 302, ``, []string{"Location: https://elsewhere/"},
		Error{Class: Unavailable, Message: "Found, without an error message"}},
}

func TestARefusedUpdateIsClassified(t *testing.T) {
	for _, c := range refusedUpdates {
		t.Run(c.name, func(t *testing.T) {
			arm := replies(replying(c.status, c.body, c.headers...))
			_, err := newClient(t, arm).Begin(t.Context(), vm, having(false, "kubelet"), []string{id("a"), id("b")}, nil)
			var got *Error
			if !errors.As(err, &got) {
				t.Fatalf("got %v, want an *Error", err)
			}
			c.want.Operation, c.want.Status = "vm_update", c.status
			c.want.Message = strings.ReplaceAll(c.want.Message, `\"`, `"`)
			got.Message = strings.ReplaceAll(got.Message, `\"`, `"`)
			if diff := cmp.Diff(&c.want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}
			if len(arm.requests()) != 1 {
				t.Errorf("the update was sent %d times, want once", len(arm.requests()))
			}
			if line := got.Error(); strings.ContainsAny(line, "\n\t") || strings.Contains(line, bearer) {
				t.Errorf("the message is %q, want one line without the token", line)
			}
		})
	}
}

func TestARefusedReadNamesNoIdentity(t *testing.T) {
	arm := replies(replying(403, armBody("AuthorizationFailed", "no action 'Microsoft.Compute/virtualMachines/read' over scope '"+vm.ID()+"', but on "+id("a"), "")))
	_, err := newClient(t, arm).Get(t.Context(), vm)
	var failed *Error
	if !errors.As(err, &failed) || failed.Class != Denied || len(failed.Identities) != 0 || !strings.Contains(err.Error(), "virtualMachines/read' over scope") {
		t.Errorf("got %v; want class Denied, the message of ARM, and no identity", err)
	}
}

func TestAnErrorIsOneLineOfBoundedLength(t *testing.T) {
	names := make([]string, 150)
	for i := range names {
		names[i] = fmt.Sprintf("identity-%03d", i)
	}
	arm := replies(replying(403, armBody(strings.Repeat("Linked", 100), linked(names...), ""), "X-Ms-Request-Id: "+strings.Repeat("i", 1000)))
	_, err := newClient(t, arm).Begin(t.Context(), vm, State{}, mapped(names, id), nil)
	var failed *Error
	if !errors.As(err, &failed) || len(failed.Identities) != 150 || !slices.IsSorted(failed.Identities) {
		t.Errorf("the error has %d identities, want all 150, sorted", len(failed.Identities))
	}
	if len(err.Error()) > 1500 {
		t.Errorf("the text of the error has %d bytes, want 1500 at most", len(err.Error()))
	}
}

func TestAnErrorContainsAllThatIsKnown(t *testing.T) {
	cases := []struct {
		in   Error
		want string
	}{
		{Error{Class: Throttled, Operation: "vm_get", Status: 429, Code: "TooManyRequests", Message: "slow down", CorrelationID: "id", RetryAfter: 1700 * time.Millisecond},
			"vm_get: throttled, status 429, TooManyRequests: slow down (retry after 2s) (correlation ID id)"},
		{Error{Class: Unavailable, Operation: "vmss_poll", Err: context.Canceled}, "vmss_poll: unavailable: context canceled"},
		{Error{Class: Unconfigured, Operation: "vm_get", Message: "no file"}, "vm_get: unconfigured: no file"},
	}
	for _, c := range cases {
		if got := c.in.Error(); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
		if !errors.Is(&c.in, c.in.Err) && c.in.Err != nil {
			t.Errorf("errors.Is does not find %v in the Error", c.in.Err)
		}
	}
}

func FuzzARMError(f *testing.F) {
	for _, s := range []string{
		"", "{}", "[]", "null", armBody("LinkedAuthorizationFailed", linked("a", "b"), ""), armBody("FailedIdentityOperation", missing("a"), `,"details":[{"code":"x"}]`),
		`{"status":"Failed","error":{"code":"FailedIdentityOperation","message":"x"}}`, strings.Repeat(`{"error":`, 100), describe(vm, "Failed", "UserAssigned", "a"),
	} {
		f.Add(403, s)
		f.Add(200, s)
	}
	requested := map[string]bool{Fold(id("a")): true, Fold(id("b")): true}
	f.Fuzz(func(t *testing.T, status int, body string) {
		parsed := parseARMError([]byte(body))
		for _, named := range parsed.named(requested) {
			if !requested[named] {
				t.Errorf("%q was not in the request", named)
			}
		}
		for _, named := range parsed.named(nil) {
			if named != strings.ToLower(named) || strings.Count(named, "/") != 8 {
				t.Errorf("%q is not the ID of an identity in lower case", named)
			}
		}
		if class := classify(status, parsed.code, parsed.status, false); class == "" {
			t.Error("classify returned no class")
		}
		e := &Error{Message: cleaner{}.clean(parsed.message, maxMessage), Code: cleaner{}.clean(parsed.code, maxCode)}
		if line := e.Error(); len(line) > 2000 || strings.Contains(line, "\n") {
			t.Errorf("the message is %q, want one line of 2000 bytes at most", line)
		}
	})
}

func TestRetryAfterIsReadInAllItsForms(t *testing.T) {
	cases := []struct {
		headers []string
		want    time.Duration
	}{
		{nil, 0},
		{[]string{"Retry-After", "5"}, 5 * time.Second},
		{[]string{"Retry-After", "-5"}, 0},
		{[]string{"Retry-After", "soon"}, 0},
		{[]string{"Retry-After", "99999999999999999999"}, 0},
		{[]string{"Retry-After", "5", "X-Ms-Retry-After-Ms", "250"}, 250 * time.Millisecond},
		{[]string{"Retry-After", "5", "Retry-After-Ms", "0"}, 5 * time.Second},
		{[]string{"Retry-After", time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat)}, 0},
		{[]string{"Retry-After", time.Now().Add(24 * time.Hour).UTC().Format(http.TimeFormat)}, time.Hour},
	}
	for _, c := range cases {
		h := http.Header{}
		for i := 0; i < len(c.headers); i += 2 {
			h.Set(c.headers[i], c.headers[i+1])
		}
		if got := retryAfter(h); got != c.want {
			t.Errorf("%v: got %s, want %s", c.headers, got, c.want)
		}
	}
}
