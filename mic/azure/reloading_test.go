package azure

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// reports records the calls of changed by a Reloading.
type reports struct {
	mu  sync.Mutex
	all []string
}

func (r *reports) changed(cfg Config, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	reported := cfg.Cloud
	if err != nil {
		reported = err.Error()
	}
	r.all = append(r.all, reported)
}

// take returns the reports since the last call.
func (r *reports) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	reported := r.all
	r.all = nil
	return reported
}

// anywhere is a fake of all clouds. The name of its identity is the host of the request, with "-" for ".".
func anywhere() *fakeAzure {
	return &fakeAzure{respond: func(_ int, r *http.Request) (*http.Response, error) {
		return reply(r, 200, describe(vm, "Succeeded", "UserAssigned", strings.ReplaceAll(r.URL.Host, ".", "-")))
	}}
}

func in(cloud string) string {
	return `{"cloud":"` + cloud + `","userAssignedIdentityID":"own-` + cloud + `"}`
}

// replace replaces a file by another one, as happens when a mounted Secret changes.
func replace(t *testing.T, path, content string) {
	t.Helper()
	if err := os.Rename(write(t, path+".new", content), path); err != nil {
		t.Fatal(err)
	}
}

func TestAChangedConfigurationIsAppliedAndReportedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "azure.json")
	synctest.Test(t, func(t *testing.T) {
		write(t, path, in("AzurePublicCloud"))
		reported := &reports{}
		r := NewReloading(path, env(), Options{Transport: anywhere(), Credential: credential(hasToken)}, reported.changed)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go r.Run(ctx)
		expect := func(what, host, own, report string) {
			t.Helper()
			time.Sleep(30 * time.Second) // three checks of the configuration
			synctest.Wait()
			state, err := r.Get(ctx, vm)
			if _, ok := state.Identities[Fold(id(host))]; !ok {
				t.Errorf("%s: got %+v, %v; want %s", what, state, err, host)
			}
			if got := r.OwnIdentities(); len(got) != 1 || got[0] != own {
				t.Errorf("%s: OwnIdentities returns %v, want only the identity of the configuration in use", what, got)
			}
			all := reported.take()
			if report == "" && len(all) != 0 || report != "" && (len(all) != 1 || !strings.Contains(all[0], report)) {
				t.Errorf("%s: reported %q, want %q", what, all, report)
			}
		}
		expect("at the start", "management-azure-com", "own-AzurePublicCloud", "AzurePublicCloud")
		expect("unchanged", "management-azure-com", "own-AzurePublicCloud", "")
		write(t, path, in("AzureChinaCloud"))
		expect("edited", "management-chinacloudapi-cn", "own-AzureChinaCloud", "AzureChinaCloud")
		write(t, path, in("AzureChinaCloud"))
		expect("written again", "management-chinacloudapi-cn", "own-AzureChinaCloud", "")
		replace(t, path, in("AzureUSGovernmentCloud"))
		expect("replaced", "management-usgovcloudapi-net", "own-AzureUSGovernmentCloud", "AzureUSGovernmentCloud")
		write(t, path, "{")
		expect("broken", "management-usgovcloudapi-net", "own-AzureUSGovernmentCloud", "has a JSON syntax error")
		write(t, path, in("AzureNowhereCloud"))
		expect("not usable", "management-usgovcloudapi-net", "own-AzureUSGovernmentCloud", "AzureNowhereCloud")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		expect("gone", "management-usgovcloudapi-net", "own-AzureUSGovernmentCloud", "no such file")
		write(t, path, in("AzureUSGovernmentCloud"))
		expect("back", "management-usgovcloudapi-net", "own-AzureUSGovernmentCloud", "AzureUSGovernmentCloud")
	})
}

func TestCallsReportAnInvalidConfigurationUntilItIsCorrected(t *testing.T) {
	path := filepath.Join(t.TempDir(), "azure.json")
	synctest.Test(t, func(t *testing.T) {
		reported := &reports{}
		r := NewReloading(path, env(), Options{Transport: anywhere(), Credential: credential(hasToken)}, reported.changed)
		r.CheckInterval = time.Second
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go r.Run(ctx)
		refused := func(operation string, err error) {
			t.Helper()
			var failed *Error
			if !errors.As(err, &failed) || failed.Class != Unconfigured || failed.Operation != operation || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v; want class Unconfigured, the operation, and the path of the file", err)
			}
		}
		_, err := r.Get(ctx, vm)
		refused("vm_get", err)
		_, err = r.Begin(ctx, vmss, State{}, []string{id("a")}, nil)
		refused("vmss_update", err)
		_, err = r.Resume(ctx, vm, "token")
		refused("vm_poll", err)
		if len(r.OwnIdentities()) != 0 || len(reported.take()) != 1 {
			t.Error("without a usable configuration OwnIdentities is not empty, or there was not exactly one report")
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		write(t, path, `{"cloud":"AzureNowhereCloud"}`)
		time.Sleep(time.Second)
		synctest.Wait()
		if _, err := r.Get(ctx, vm); err == nil || !strings.Contains(err.Error(), "AzureNowhereCloud") {
			t.Errorf("got %v, want an error that names the unknown cloud", err)
		}
		write(t, path, in("AzureChinaCloud"))
		time.Sleep(time.Second)
		synctest.Wait()
		if _, err := r.Get(ctx, vm); err != nil || len(reported.take()) != 2 {
			t.Errorf("after the correction got %v, want no error and two further reports", err)
		}
	})
}

func TestARunningUpdateKeepsItsConfiguration(t *testing.T) {
	path := filepath.Join(t.TempDir(), "azure.json")
	synctest.Test(t, func(t *testing.T) {
		write(t, path, in("AzurePublicCloud"))
		arm := replies(begun(vm), inProgress("Retry-After: 60"), succeeded, replying(200, describe(vm, "Succeeded", "UserAssigned", "a")))
		r := NewReloading(path, env(), Options{Transport: arm, Credential: credential(hasToken)}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go r.Run(ctx)
		o, err := r.Begin(ctx, vm, State{}, []string{id("a")}, nil)
		if err != nil {
			t.Fatal(err)
		}
		write(t, path, in("AzureChinaCloud"))
		if state, err := o.Wait(ctx); err != nil || len(state.Identities) != 1 {
			t.Errorf("the running update returned %+v, %v; want one identity", state, err)
		}
		if _, err := r.Get(ctx, vm); err != nil {
			t.Error(err)
		}
		requests := arm.requests()
		for i, want := range []string{"azure.com", "azure.com", "azure.com", "azure.com", "chinacloudapi.cn"} {
			if !strings.HasPrefix(requests[i].url, "https://management."+want) {
				t.Errorf("request %d went to %s, want %s", i, requests[i].url, want)
			}
		}
	})
}
