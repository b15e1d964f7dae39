package azure

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const pollURL = "https://management.azure.com/subscriptions/Sub/providers/Microsoft.Compute/locations/here/operations/1?p=1&s=signature"

// begun returns the response to a PATCH that started an update.
func begun(r Resource, headers ...string) func(*http.Request) (*http.Response, error) {
	return replying(200, describe(r, "Updating", "None"), append(headers, "Azure-AsyncOperation: "+pollURL)...)
}

func inProgress(headers ...string) func(*http.Request) (*http.Response, error) {
	return replying(200, `{"status":"InProgress"}`, headers...)
}

var succeeded = replying(200, `{"status":"Succeeded"}`)

func failing(code, message string) func(*http.Request) (*http.Response, error) {
	return replying(200, `{"status":"Failed","id":"/operations/1",`+strings.TrimPrefix(armBody(code, message, ""), "{"))
}

// pauses returns the times between the requests, in seconds.
func pauses(all []seen) []float64 {
	var out []float64
	for i := 1; i < len(all); i++ {
		out = append(out, all[i].at.Sub(all[i-1].at).Seconds())
	}
	return out
}

func begin(t *testing.T, c *Client, r Resource) *Operation {
	t.Helper()
	o, err := c.Begin(t.Context(), r, having(false, "kubelet"), []string{id("a")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// polledUpdates are the responses to one update and its polls. pauses are the seconds between the requests, and calls
// are the calls of the Observer.
var polledUpdates = []struct {
	name      string
	responses []func(*http.Request) (*http.Response, error)
	pauses    []float64
	calls     string
}{
	{"done at once, by the status in the response", []func(*http.Request) (*http.Response, error){
		replying(200, describe(vm, "Succeeded", "UserAssigned", "a", "kubelet"))},
		nil, "vm_update ok, vm_get ok"},
	{"done at once, with a URL to poll", []func(*http.Request) (*http.Response, error){begun(vm), succeeded},
		[]float64{0, 0}, "vm_update ok, vm_poll ok, vm_get ok"},
	{"without Retry-After, at growing intervals", []func(*http.Request) (*http.Response, error){
		begun(vm), inProgress(), inProgress(), inProgress(), inProgress(), inProgress(), succeeded},
		[]float64{0, 1, 2, 4, 5, 5, 0}, "vm_update ok, " + strings.Repeat("vm_poll ok, ", 6) + "vm_get ok"},
	{"at the interval of Retry-After", []func(*http.Request) (*http.Response, error){
		begun(vm, "Retry-After: 10"), inProgress("Retry-After: 20"), inProgress("Retry-After: 7"), succeeded},
		[]float64{10, 20, 7, 0}, "vm_update ok, vm_poll ok, vm_poll ok, vm_poll ok, vm_get ok"},
	{"throttled on the way", []func(*http.Request) (*http.Response, error){
		begun(vm), replying(429, "", "Retry-After: 33"), succeeded},
		[]float64{0, 33, 0}, "vm_update ok, vm_poll throttled, vm_poll ok, vm_get ok"},
	{"failed polls", []func(*http.Request) (*http.Response, error){
		begun(vm), replying(500, ""), replying(503, "", "Retry-After: 9"), func(*http.Request) (*http.Response, error) { return nil, errors.New("connection reset by peer") }, replying(200, "<html>"), succeeded},
		[]float64{0, 1, 9, 2, 4, 0}, "vm_update ok, vm_poll unavailable, vm_poll unavailable, vm_poll unavailable, vm_poll unavailable, vm_poll ok, vm_get ok"},
	{"a response that hangs", []func(*http.Request) (*http.Response, error){begun(vm), hung, succeeded},
		[]float64{0, 31, 0}, "vm_update ok, vm_poll unavailable, vm_poll ok, vm_get ok"},
	{"begun with a 202", []func(*http.Request) (*http.Response, error){
		replying(202, "", "Azure-AsyncOperation: "+pollURL), inProgress(), succeeded},
		[]float64{0, 1, 0}, "vm_update ok, vm_poll ok, vm_poll ok, vm_get ok"},
	{"throttled when the machine is read", []func(*http.Request) (*http.Response, error){
		begun(vm), succeeded, replying(429, "", "Retry-After: 5")},
		[]float64{0, 0, 5}, "vm_update ok, vm_poll ok, vm_get throttled, vm_get ok"},
	{"forgotten by ARM", []func(*http.Request) (*http.Response, error){
		begun(vm), inProgress(), replying(404, armBody("NotFound", "no such operation", ""))},
		[]float64{0, 1, 0}, "vm_update ok, vm_poll ok, vm_poll not_found, vm_get ok"},
	{"a response about another machine", []func(*http.Request) (*http.Response, error){
		begun(vm), succeeded, replying(200, describe(vmss, "Succeeded", "UserAssigned", "other"))},
		[]float64{0, 0, 0}, "vm_update ok, vm_poll ok, vm_get ok, vm_get ok"},
}

func TestWaitPollsAnUpdateUntilItEnds(t *testing.T) {
	for _, c := range polledUpdates {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				arm := replies(append(c.responses, replying(200, describe(vm, "Succeeded", "UserAssigned", "a", "kubelet")))...)
				observer := &calls{}
				o := begin(t, newClient(t, arm, func(o *Options) { o.Observer = observer }), vm)
				state, err := o.Wait(t.Context())
				if err != nil || len(state.Identities) != 2 || state.Identities[Fold(id("a"))] != (Identity{armID("a"), "client-a", "principal-a"}) || state.ETag != `"7"` || state.ProvisioningState != "Succeeded" {
					t.Errorf("got %+v, %v", state, err)
				}
				if got := pauses(arm.requests()); !slices.Equal(got, c.pauses) {
					t.Errorf("waited %v, want %v", got, c.pauses)
				}
				if observer.all() != c.calls {
					t.Errorf("observed %s\nwant %s", observer.all(), c.calls)
				}
				if again, err := o.Wait(t.Context()); o.Token() != "" || err != nil || len(again.Identities) != 2 {
					t.Errorf("a done operation has token %q and returns %+v, %v", o.Token(), again, err)
				}
			})
		})
	}
}

func TestAFailedUpdateIsClassifiedLikeARefusedOne(t *testing.T) {
	a := Fold(id("a"))
	cases := []struct {
		name     string
		respond  func(*http.Request) (*http.Response, error)
		class    Class
		named    []string
		contains string
	}{
		{"an identity that is gone", failing("FailedIdentityOperation", missing("a")), BadIdentity, []string{a}, "was not found"},
		{"an identity that is not named", failing("LinkedAuthorizationFailed", "no"), BadIdentity, nil, "no"},
		{"another code that names one", failing("BadRequest", "no "+id("a")), BadIdentity, []string{a}, "no /subscriptions"},
		{"preempted", failing("OperationPreempted", "by another"), Conflict, nil, "by another"},
		{"canceled", replying(200, `{"status":"Canceled"}`), Conflict, nil, "gave no reason"},
		{"a fault of Azure", failing("InternalExecutionError", "on "+id("a")), Unavailable, nil, "on /subscriptions"},
		{"an extension", failing("VMExtensionProvisioningError", "boom"), Unavailable, nil, "boom"},
		{"without a reason", replying(200, `{"status":"Failed"}`), Unavailable, nil, "gave no reason"},
		{"by the status of the response", replying(409, armBody("Conflict", "busy", "")), Conflict, nil, "busy"},
	}
	for _, r := range []Resource{vm, vmss} {
		for _, c := range cases {
			t.Run(r.Kind.String()+", "+c.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					arm := replies(begun(r), inProgress("Retry-After: 3"), c.respond)
					observer := &calls{}
					o := begin(t, newClient(t, arm, func(o *Options) { o.Observer = observer }), r)
					_, err := o.Wait(t.Context())
					var got *Error
					if !errors.As(err, &got) || got.Class != c.class || !slices.Equal(got.Identities, c.named) || !strings.Contains(got.Message, c.contains) || got.Operation != r.Kind.String()+"_poll" {
						t.Fatalf("got %v with the identities %v", err, got.Identities)
					}
					if _, again := o.Wait(t.Context()); o.Token() != "" || !errors.Is(again, err) || len(arm.requests()) != 3 {
						t.Errorf("after the failure: token %q, %d requests, and Wait returns %v; want no token, 3 requests and the same error", o.Token(), len(arm.requests()), again)
					}
					if want := r.Kind.String() + "_poll " + string(c.class); !strings.HasSuffix(observer.all(), want) {
						t.Errorf("observed %s; want %s at the end", observer.all(), want)
					}
				})
			})
		}
	}
}

func TestAnotherClientResumesAnUpdate(t *testing.T) {
	for _, r := range []Resource{vm, vmss} {
		synctest.Test(t, func(t *testing.T) {
			o := begin(t, newClient(t, replies(begun(r))), r)
			token := o.Token()
			if token == "" {
				t.Fatal("the running update has no resume token")
			}
			arm := replies(inProgress(), succeeded, replying(200, describe(r, "Succeeded", "SystemAssigned, UserAssigned", "a")))
			next, err := newClient(t, arm).Resume(t.Context(), r, token)
			if err != nil || next.Token() != token || len(arm.requests()) != 0 {
				t.Fatalf("resumed with %d requests, token %q: %v", len(arm.requests()), next.Token(), err)
			}
			state, err := next.Wait(t.Context())
			if err != nil || !state.SystemAssigned || len(state.Identities) != 1 || next.Token() != "" {
				t.Errorf("Wait returned %+v, %v and left token %q; want the new state and no token", state, err, next.Token())
			}
			requests := arm.requests()
			if len(requests) != 3 || requests[0].url != pollURL || requests[0].method != http.MethodGet || !strings.Contains(requests[2].url, r.ID()) {
				t.Errorf("sent %+v, want two polls and a read of the machine", requests)
			}
		})
	}
}

func TestAResumedUpdateReportsAllIdentitiesThatAzureNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := begin(t, newClient(t, replies(begun(vm))), vm)
		next, err := newClient(t, replies(failing("FailedIdentityOperation", missing("a")))).Resume(t.Context(), vm, o.Token())
		if err != nil {
			t.Fatal(err)
		}
		_, err = next.Wait(t.Context())
		var failed *Error
		if !errors.As(err, &failed) || failed.Class != BadIdentity || !slices.Equal(failed.Identities, []string{Fold(id("a"))}) {
			t.Errorf("got %v; want class BadIdentity with identity a", err)
		}
	})
}

func TestAnInvalidResumeTokenIsRefusedAndNotQuoted(t *testing.T) {
	o := begin(t, newClient(t, replies(begun(vm))), vm)
	cases := []struct{ name, token string }{
		{"none", ""},
		{"no JSON", "signature"},
		{"of a scale set", strings.ReplaceAll(o.Token(), "VirtualMachines", "VirtualMachineScaleSets")},
		{"of nothing that is known", `{"type":"VirtualMachinesClientUpdateResponse","token":{"s":"signature"}}`},
		{"of another type", `{"type":"VirtualMachinesClientUpdateResponse","token":"signature"}`},
		{"of what is done", strings.ReplaceAll(o.Token(), `"Updating"`, `"Succeeded"`)},
		{"of what has failed", strings.ReplaceAll(o.Token(), `"Updating"`, `"Failed"`)},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			arm := replies(succeeded)
			_, err := newClient(t, arm).Resume(t.Context(), vm, c.token)
			var failed *Error
			if !errors.As(err, &failed) || failed.Class != Invalid || strings.Contains(err.Error(), "signature") || len(arm.requests()) != 0 {
				t.Errorf("got %v after %d requests; want class Invalid, no token in the text, and no request", err, len(arm.requests()))
			}
		})
	}
}

func TestMICsTokenIsSentToARMOnly(t *testing.T) {
	cases := []struct {
		name, url string
		sent      bool
	}{
		{"another host", "https://evil.example/operations/1", false},
		{"a host that ends alike", "https://evilmanagement.azure.com/operations/1", false},
		{"without TLS", "http://management.azure.com/operations/1", false},
		{"a part of ARM", "https://here.management.azure.com/operations/1", true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			arm := replies(replying(200, describe(vm, "Updating", "None"), "Azure-AsyncOperation: "+c.url), succeeded, replying(200, describe(vm, "Succeeded", "None")))
			o := begin(t, newClient(t, arm), vm)
			_, err := o.Wait(t.Context())
			if sent := len(arm.requests()) > 1; sent != c.sent || (err == nil) != c.sent {
				t.Errorf("Wait returned %v after %d requests; want an error and no poll exactly if the URL is not ARM's", err, len(arm.requests()))
			}
			var failed *Error
			if err != nil && (!errors.As(err, &failed) || failed.Class != Invalid && failed.Class != Unavailable) {
				t.Errorf("got %v; want class Invalid or Unavailable", err)
			}
		})
	}
}

func TestWaitTimesOut(t *testing.T) {
	cases := []struct {
		name      string
		responses []func(*http.Request) (*http.Response, error)
		context   time.Duration
		after     time.Duration
		is        error
		contains  string
		class     Class
	}{
		{"with the caller's time", []func(*http.Request) (*http.Response, error){begun(vm), inProgress("Retry-After: 10")}, 25 * time.Second, 25 * time.Second, context.DeadlineExceeded, "stopped waiting", Unavailable},
		{"with the caller's time, in a response that hangs", []func(*http.Request) (*http.Response, error){begun(vm), hung}, 12 * time.Second, 12 * time.Second, context.DeadlineExceeded, "stopped waiting", Unavailable},
		{"with the time for all", []func(*http.Request) (*http.Response, error){begun(vm), inProgress("Retry-After: 50")}, time.Hour, 20 * time.Minute, nil, "after the limit of 20m0s", Unavailable},
		{"at once if ARM wants more time than there is", []func(*http.Request) (*http.Response, error){begun(vm, "Retry-After: 3600")}, 2 * time.Hour, 0, nil, "after the limit of 20m0s", Unavailable},
		{"at once if the subscription is throttled for longer", []func(*http.Request) (*http.Response, error){begun(vm), replying(429, "", "Retry-After: 3600")}, 2 * time.Hour, 0, nil, "retry after 1h0m0s", Throttled},
		{"with the time for all, among failures", []func(*http.Request) (*http.Response, error){begun(vm), replying(503, "")}, time.Hour, 19*time.Minute + 57*time.Second, nil, "after the limit of 20m0s; the last response: Service Unavailable", Unavailable},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := begin(t, newClient(t, replies(c.responses...)), vm)
				token := o.Token()
				ctx, cancel := context.WithTimeout(t.Context(), c.context)
				defer cancel()
				start := time.Now()
				_, err := o.Wait(ctx)
				var failed *Error
				if !errors.As(err, &failed) || failed.Class != c.class || c.is != nil && !errors.Is(err, c.is) {
					t.Errorf("got %v", err)
				}
				if c.contains != "" && !strings.Contains(err.Error(), c.contains) {
					t.Errorf("the message is %q", err)
				}
				if took := time.Since(start); took != c.after {
					t.Errorf("took %s, want %s", took, c.after)
				}
				if o.Token() != token || token == "" {
					t.Error("after the timeout the operation has another resume token or none")
				}
			})
		})
	}
}

func TestWaitCanBeCalledAgainAfterATimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := begin(t, newClient(t, replies(begun(vm), inProgress("Retry-After: 60"), replying(403, armBody("AuthorizationFailed", "no", "")), succeeded, replying(200, describe(vm, "Succeeded", "UserAssigned", "a")))), vm)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := o.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("the first Wait returned %v, want context.DeadlineExceeded", err)
		}
		var failed *Error
		if _, err := o.Wait(t.Context()); !errors.As(err, &failed) || failed.Class != Denied || o.Token() == "" {
			t.Fatalf("the second Wait returned %v; want class Denied and a remaining token", err)
		}
		if state, err := o.Wait(t.Context()); err != nil || len(state.Identities) != 1 {
			t.Errorf("the third Wait returned %+v, %v; want one identity", state, err)
		}
	})
}
