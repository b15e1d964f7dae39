package azure

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/google/go-cmp/cmp"
)

func TestTheStateOfAMachineIsReadFromARM(t *testing.T) {
	a := map[string]Identity{Fold(id("a")): {armID("a"), "client-a", "principal-a"}}
	cases := []struct {
		name, body string
		want       State
	}{
		{"user-assigned", describe(vm, "Succeeded", "UserAssigned", "a"), State{a, false, "Succeeded", `"7"`}},
		{"both", describe(vm, "Updating", "SystemAssigned, UserAssigned", "a"), State{a, true, "Updating", `"7"`}},
		{"both, in another case", describe(vm, "Deleting", "systemassigned,userassigned", "a"), State{a, true, "Deleting", `"7"`}},
		{"system-assigned", describe(vm, "Succeeded", "SystemAssigned"), State{nil, true, "Succeeded", `"7"`}},
		{"none", describe(vm, "Succeeded", "None"), State{nil, false, "Succeeded", `"7"`}},
		{"no word of it", `{"id":"x"}`, State{}},
		{"no values", `{"identity":{"type":null,"userAssignedIdentities":{"` + armID("a") + `":null}},"properties":null}`, State{Identities: map[string]Identity{Fold(id("a")): {ID: armID("a")}}}},
	}
	for _, r := range []Resource{vm, vmss} {
		for _, c := range cases {
			t.Run(r.Kind.String()+", "+c.name, func(t *testing.T) {
				arm, observer := replies(replying(200, c.body)), &calls{}
				got, err := newClient(t, arm, func(o *Options) { o.Observer = observer }).Get(t.Context(), r)
				if diff := cmp.Diff(c.want, got); err != nil || diff != "" {
					t.Errorf("%v\n%s", err, diff)
				}
				request := arm.requests()[0]
				if request.method != http.MethodGet || request.url != "https://management.azure.com"+r.ID()+"?api-version=2025-04-01" || !strings.HasPrefix(request.header.Get("User-Agent"), "test ") {
					t.Errorf("sent %+v, want a GET of the machine from user agent test", request)
				}
				if observer.all() != r.Kind.String()+"_get ok" {
					t.Errorf("the Observer was called with %s, want one call with outcome ok", observer.all())
				}
			})
		}
	}
}

func TestAReadIsRetriedAfterTemporaryFailuresOnly(t *testing.T) {
	reset := func(*http.Request) (*http.Response, error) { return nil, errors.New("connection reset by peer") }
	cases := []struct {
		name     string
		respond  func(*http.Request) (*http.Response, error)
		class    Class
		calls    int
		most     time.Duration
		contains string
	}{
		{"broken", replying(500, ""), Unavailable, 3, 2 * time.Second, "Internal Server Error"},
		{"busy", replying(503, "", "Retry-After: 1"), Unavailable, 3, 3 * time.Second, "Service Unavailable"},
		{"busy for long", replying(503, "", "Retry-After: 60"), Unavailable, 1, 0, "retry after 1m0s"},
		{"no connection", reset, Unavailable, 3, 2 * time.Second, "connection reset by peer"},
		{"hung", hung, Unavailable, 1, 30 * time.Second, "no response within 30s"},
		{"conflict", replying(409, ""), Conflict, 1, 0, "Conflict"},
		{"changed", replying(412, ""), Conflict, 1, 0, "Precondition"},
		{"throttled", replying(429, "", "Retry-After: 1"), Throttled, 1, 0, "retry after 1s"},
		{"refused", replying(403, ""), Denied, 1, 0, "Forbidden"},
		{"no JSON", replying(200, "<html>"), Unavailable, 1, 0, "unmarshal"},
		{"too large", replying(200, strings.Repeat(" ", maxResponse+1)), Invalid, 1, 0, "larger than"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				arm, observer, start := replies(c.respond), &calls{}, time.Now()
				_, err := newClient(t, arm, func(o *Options) { o.Observer = observer }).Get(t.Context(), vm)
				var failed *Error
				if !errors.As(err, &failed) || failed.Class != c.class || !strings.Contains(err.Error(), c.contains) {
					t.Errorf("got %v", err)
				}
				if took := time.Since(start); len(arm.requests()) != c.calls || took > c.most {
					t.Errorf("%d requests in %s; want %d in %s", len(arm.requests()), took, c.calls, c.most)
				}
				if observer.all() != "vm_get "+string(c.class) {
					t.Errorf("the Observer was called with %s, want one call with the class of the error", observer.all())
				}
			})
		})
	}
}

func TestA429ThrottlesOnlyItsSubscription(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		other := Resource{Kind: VirtualMachine, SubscriptionID: "Other", ResourceGroup: "Group", Name: "node"}
		throttle := true
		arm := &fakeAzure{respond: func(_ int, r *http.Request) (*http.Response, error) {
			if throttle && strings.Contains(r.URL.Path, "/Sub/") {
				return reply(r, 429, "", "Retry-After: 60")
			}
			return reply(r, 200, describe(vm, "Succeeded", "None"))
		}}
		observer := &calls{}
		c := newClient(t, arm, func(o *Options) { o.Observer = observer })
		expect := func(what string, err error, wait time.Duration) {
			t.Helper()
			var failed *Error
			if !errors.As(err, &failed) || failed.Class != Throttled || failed.RetryAfter != wait {
				t.Errorf("%s: got %v; want a wait of %s", what, err, wait)
			}
		}
		_, err := c.Get(t.Context(), vm)
		expect("the first call", err, time.Minute)
		time.Sleep(20 * time.Second)
		_, err = c.Get(t.Context(), Resource{Kind: ScaleSet, SubscriptionID: "SUB", ResourceGroup: "G", Name: "pool"})
		expect("another machine of the subscription", err, 40*time.Second)
		_, err = c.Begin(t.Context(), vm, State{}, []string{id("a")}, nil)
		expect("an update", err, 40*time.Second)
		if len(arm.requests()) != 1 || observer.all() != "vm_get throttled" {
			t.Errorf("%d requests, observed %s; want one", len(arm.requests()), observer.all())
		}
		if _, err := c.Get(t.Context(), other); err != nil {
			t.Errorf("another subscription: %v", err)
		}
		if _, err := newClient(t, replies(replying(200, describe(vm, "Succeeded", "None")))).Get(t.Context(), vm); err != nil {
			t.Errorf("another client: %v", err)
		}
		throttle = false
		time.Sleep(40 * time.Second)
		if _, err := c.Get(t.Context(), vm); err != nil {
			t.Errorf("after the time of Retry-After: %v", err)
		}
	})
}

func TestARunningUpdateWaitsWhileItsSubscriptionIsThrottled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		arm := &fakeAzure{respond: func(n int, r *http.Request) (*http.Response, error) {
			switch {
			case r.Method == http.MethodPatch:
				return begun(vm, "Retry-After: 5")(r)
			case n == 2:
				return reply(r, 429, "", "Retry-After: 40")
			case strings.Contains(r.URL.Path, "operations"):
				return succeeded(r)
			}
			return reply(r, 200, describe(vm, "Succeeded", "UserAssigned", "a"))
		}}
		c := newClient(t, arm)
		o := begin(t, c, vm)
		if _, err := c.Get(t.Context(), vmss); err == nil {
			t.Fatal("the read of another machine was not throttled")
		}
		start := time.Now()
		if _, err := o.Wait(t.Context()); err != nil || time.Since(start) != 40*time.Second || len(arm.requests()) != 4 {
			t.Errorf("Wait returned %v after %s and %d requests; want no error after 40s and 4 requests", err, time.Since(start), len(arm.requests()))
		}
	})
}

func TestAHangingMachineDoesNotDelayOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		arm := &fakeAzure{respond: func(_ int, r *http.Request) (*http.Response, error) {
			if strings.Contains(r.URL.Path, "virtualMachineScaleSets") {
				return hung(r)
			}
			return reply(r, 200, describe(vm, "Succeeded", "None"))
		}}
		c := newClient(t, arm)
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := c.Get(t.Context(), vmss); err == nil {
					t.Error("Get of a hanging machine returned no error")
				}
			})
		}
		synctest.Wait()
		start := time.Now()
		if _, err := c.Get(t.Context(), vm); err != nil || time.Since(start) != 0 {
			t.Errorf("Get of another machine returned %v after %s, want no error at once", err, time.Since(start))
		}
		wg.Wait()
		if took := time.Since(start); took != 30*time.Second {
			t.Errorf("Get of a hanging machine ended after %s, want 30s", took)
		}
	})
}

func TestACallEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			time.Sleep(3 * time.Second)
			cancel()
		}()
		start := time.Now()
		_, err := newClient(t, replies(hung)).Get(ctx, vm)
		var failed *Error
		if !errors.As(err, &failed) || failed.Class != Unavailable || !errors.Is(err, context.Canceled) || time.Since(start) != 3*time.Second {
			t.Errorf("got %v after %s; want context.Canceled and class Unavailable after 3s", err, time.Since(start))
		}
	})
}

// stack starts a fake ARM on loopback with TLS, and returns the configuration of a custom cloud for it.
func stack(t *testing.T, h http.HandlerFunc) (Config, Options) {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	cfg := Config{Cloud: "AzureStackCloud", Environment: Environment{ResourceManagerEndpoint: server.URL, TokenAudience: "https://management.stack/x"}}
	return cfg, Options{RootCAs: roots, Credential: credential(hasToken)}
}

func TestACustomCloudIsReachedOverTLS(t *testing.T) {
	var got []string
	cfg, o := stack(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = append(got, r.Method+" "+r.URL.Path+" "+string(body))
		switch {
		case r.Method == http.MethodPatch:
			w.Header().Set("Azure-AsyncOperation", "https://"+r.Host+"/operations/1")
			w.Header().Set("Retry-After-Ms", "1")
			io.WriteString(w, describe(vmss, "Updating", "None"))
		case r.URL.Path == "/operations/1":
			io.WriteString(w, `{"status":"Succeeded"}`)
		default:
			io.WriteString(w, describe(vmss, "Succeeded", "UserAssigned", "a"))
		}
	})
	c, err := New(cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	operation, err := c.Begin(t.Context(), vmss, State{}, []string{id("a")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	state, err := operation.Wait(t.Context())
	want := []string{
		"PATCH " + vmss.ID() + ` {"identity":{"type":"UserAssigned","userAssignedIdentities":{"` + id("a") + `":{}}}}`,
		"GET /operations/1 ", "GET " + vmss.ID() + " ",
	}
	if err != nil || len(state.Identities) != 1 || !slices.Equal(got, want) {
		t.Errorf("%+v, %v after %q", state, err, got)
	}
	o.RootCAs = nil
	c, err = New(cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	var failed *Error
	if _, err := c.Get(t.Context(), vmss); !errors.As(err, &failed) || failed.Class != Unavailable || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("with an untrusted certificate got %v; want class Unavailable and the reason", err)
	}
}

func TestARequestToAHangingServerTimesOut(t *testing.T) {
	cases := map[string]func(w http.ResponseWriter){
		"before its response": func(http.ResponseWriter) {},
		"within its response": func(w http.ResponseWriter) {
			io.WriteString(w, `{"id":`)
			w.(http.Flusher).Flush()
		},
	}
	for name, begin := range cases {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			cfg, o := stack(t, func(w http.ResponseWriter, _ *http.Request) {
				begin(w)
				<-release
			})
			t.Cleanup(func() { close(release) })
			o.RequestTimeout = 50 * time.Millisecond
			c, err := New(cfg, o)
			if err != nil {
				t.Fatal(err)
			}
			var failed *Error
			if _, err := c.Get(t.Context(), vm); !errors.As(err, &failed) || failed.Class != Unavailable || !strings.Contains(err.Error(), "no response within 50ms") {
				t.Errorf("got %v; want class Unavailable and the timeout", err)
			}
		})
	}
}

func TestAResponseBeforeTheRequestIsReadDoesNotRace(t *testing.T) {
	cfg, o := stack(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	c, err := New(cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for i := range MaxIdentities {
		names = append(names, id(strings.Repeat("n", 64)+string(rune('a'+i%26))+strings.Repeat("m", i)))
	}
	for range 5 {
		if _, err := c.Begin(t.Context(), vm, State{}, names, nil); err == nil {
			t.Error("Begin returned no error for a response with status 503")
		}
	}
}

func TestManyMachinesShareOneToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fetched atomic.Int32
		slow := credential(func(ctx context.Context) (azcore.AccessToken, error) {
			fetched.Add(1)
			time.Sleep(time.Second)
			return hasToken(ctx)
		})
		c := newClient(t, replies(replying(200, describe(vm, "Succeeded", "None"))), func(o *Options) { o.Credential = slow })
		var wg sync.WaitGroup
		for i := range 50 {
			r := vm
			r.SubscriptionID = string(rune('a' + i%5))
			wg.Go(func() {
				if _, err := c.Get(t.Context(), r); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if fetched.Load() != 1 {
			t.Errorf("%d tokens were fetched, want one", fetched.Load())
		}
	})
}
