package azure

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/arm"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/compute/armcompute/v7"
)

func joined(words []string) string {
	slices.Sort(words)
	return strings.Join(words, " ")
}

// armClient sends requests to the fake ARM of a running fake Azure with Azure's own
// libraries. It gets its token from the fake Entra ID.
type armClient struct {
	*fakeAzure
	sets *armcompute.VirtualMachineScaleSetsClient
	vms  *armcompute.VirtualMachinesClient
}

func (s *fakeAzure) armClient() *armClient {
	s.t.Helper()
	s.must(s.AddApp(s.t.Context(), app))
	options := s.options()
	options.Cloud.Services = map[cloud.ServiceName]cloud.ServiceConfiguration{
		cloud.ResourceManager: {Endpoint: "https://" + s.at.Entra, Audience: "https://management.core.windows.net/"},
	}
	credential, err := azidentity.NewClientSecretCredential(tenant, app.ClientID, "hush",
		&azidentity.ClientSecretCredentialOptions{ClientOptions: options, DisableInstanceDiscovery: true})
	s.must(err)
	factory, err := armcompute.NewClientFactory("Sub", credential, &arm.ClientOptions{ClientOptions: options, DisableRPRegistration: true})
	s.must(err)
	return &armClient{s, factory.NewVirtualMachineScaleSetsClient(), factory.NewVirtualMachinesClient()}
}

func identities(changes ...string) map[string]*armcompute.UserAssignedIdentitiesValue {
	out := map[string]*armcompute.UserAssignedIdentitiesValue{}
	for _, c := range changes {
		if out[c[1:]] = nil; c[0] == '+' {
			out[c[1:]] = &armcompute.UserAssignedIdentitiesValue{}
		}
	}
	return out
}

// mustPatch sends a PATCH and waits until its operation has ended.
func (c *armClient) mustPatch(id, kind string, changes ...string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	often := &runtime.PollUntilDoneOptions{Frequency: 10 * time.Millisecond}
	of, _ := parseComputeID(id)
	if of.kind == KindVM {
		update := armcompute.VirtualMachineUpdate{Identity: &armcompute.VirtualMachineIdentity{Type: to.Ptr(armcompute.ResourceIdentityType(kind)), UserAssignedIdentities: identities(changes...)}}
		poller, err := c.vms.BeginUpdate(ctx, of.resourceGroup, of.name, update, nil)
		c.must(err)
		_, err = poller.PollUntilDone(ctx, often)
		c.must(err)
		return
	}
	poller, err := c.begin(ctx, of, kind, nil, changes...)
	c.must(err)
	_, err = poller.PollUntilDone(ctx, often)
	c.must(err)
}

func (c *armClient) begin(ctx context.Context, of computeID, kind string, o *armcompute.VirtualMachineScaleSetsClientBeginUpdateOptions,
	changes ...string) (*runtime.Poller[armcompute.VirtualMachineScaleSetsClientUpdateResponse], error) {
	update := armcompute.VirtualMachineScaleSetUpdate{Identity: &armcompute.VirtualMachineScaleSetIdentity{
		Type: to.Ptr(armcompute.ResourceIdentityType(kind)), UserAssignedIdentities: identities(changes...),
	}}
	return c.sets.BeginUpdate(ctx, of.resourceGroup, of.name, update, o)
}

func TestTheAzureSDKPatchesAndPollsToTheEnd(t *testing.T) {
	s := start(t, onMachines)
	ctx := t.Context()
	for _, id := range []Identity{red, blue} {
		s.must(s.DefineIdentity(ctx, id))
	}
	c := s.armClient()
	of, _ := parseComputeID(setID)
	c.mustPatch(setID, both, "+"+red.ResourceID)
	before, err := c.sets.Get(ctx, of.resourceGroup, of.name, nil)
	s.must(err)
	if len(before.Identity.UserAssignedIdentities) != 1 || *before.Identity.Type != armcompute.ResourceIdentityTypeSystemAssignedUserAssigned || before.Etag == nil {
		t.Fatalf("read the scale set %+v, want one user-assigned identity, both types, and an ETag", before)
	}

	s.set("arm.delay=40s", "arm.retry-after=1")
	poller, err := c.begin(ctx, of, both, &armcompute.VirtualMachineScaleSetsClientBeginUpdateOptions{IfMatch: before.Etag}, "+"+blue.ResourceID, "-"+red.ResourceID)
	s.must(err)
	if _, err := poller.Poll(ctx); err != nil || poller.Done() {
		t.Fatalf("the first poll failed, or the operation had already ended: error %v", err)
	}
	token, err := poller.ResumeToken()
	s.must(err)
	s.clock.advance(40 * time.Second)
	// A new client continues to poll the operation with the resume token, as another
	// process would.
	resumed, err := s.armClient().begin(ctx, of, both, &armcompute.VirtualMachineScaleSetsClientBeginUpdateOptions{ResumeToken: token})
	s.must(err)
	for who, p := range map[string]*runtime.Poller[armcompute.VirtualMachineScaleSetsClientUpdateResponse]{"resumed": resumed, "first": poller} {
		after, err := p.PollUntilDone(ctx, &runtime.PollUntilDoneOptions{Frequency: 10 * time.Millisecond})
		s.must(err)
		names := []string{}
		for id := range after.Identity.UserAssignedIdentities {
			names = append(names, id)
		}
		if len(names) != 1 || FoldID(names[0]) != FoldID(blue.ResourceID) || *after.Properties.ProvisioningState != "Succeeded" || *after.Etag == *before.Etag {
			t.Errorf("%s poller: identities %v, state %s, ETag %s; want blue, Succeeded, a new ETag",
				who, names, *after.Properties.ProvisioningState, *after.Etag)
		}
	}
	if got := s.get(nodeC, tokenQuery+"&client_id="+blue.ClientID); got.status != 200 {
		t.Errorf("token request from another node of the scale set: got %d %s, want 200", got.status, got.body)
	}
	_, err = c.begin(ctx, of, both, &armcompute.VirtualMachineScaleSetsClientBeginUpdateOptions{IfMatch: before.Etag}, "+"+red.ResourceID)
	mustBeError(t, err, 412, "PreconditionFailed")

	stats := s.stats().ARM.Resources[FoldID(setID)]
	if stats.Patch != 3 || stats.Accepted != 2 || stats.Poll != 3 || stats.Overlaps != 0 {
		t.Errorf("counts of the scale set %+v, want 3 PATCH requests (2 accepted, no overlap) and 3 polls", stats)
	}
	log, err := s.ARMLog(ctx, 0)
	s.must(err)
	if first := log[0]; first.Caller != app.ObjectID || first.APIVersion != "2025-04-01" || first.Operation != OpPatch || joined(first.Add) != FoldID(red.ResourceID) || first.Type != both {
		t.Errorf("first request logged as %+v, want the PATCH by the application that adds red", first)
	}
	changes, err := s.ARMChanges(ctx, 1)
	s.must(err)
	if len(changes) != 3 || changes[1].Attached || !changes[2].Attached || changes[1].OperationID != changes[2].OperationID {
		t.Errorf("changes %+v, want 3, of which the last two detach red and attach blue in one operation", changes)
	}
}

func mustBeError(t *testing.T, err error, status int, code string) {
	t.Helper()
	var refused *azcore.ResponseError
	if !errors.As(err, &refused) || refused.StatusCode != status || refused.ErrorCode != code {
		t.Errorf("got error %v, want a response with status %d and code %s", err, status, code)
	}
}

func TestTheAzureSDKReadsARMsErrors(t *testing.T) {
	s := start(t, onMachines)
	ctx := t.Context()
	c := s.armClient()
	of, _ := parseComputeID(setID)
	vm, _ := parseComputeID(vmID)
	ghost := userAssigned("ghost", 40)
	_, err := c.begin(ctx, of, both, nil, "+"+ghost.ResourceID)
	mustBeError(t, err, 400, "FailedIdentityOperation")
	s.set("arm.late-errors=true", "arm.delay=5s")
	poller, err := c.begin(ctx, of, both, nil, "+"+ghost.ResourceID)
	s.must(err)
	s.clock.advance(time.Minute)
	_, err = poller.PollUntilDone(ctx, &runtime.PollUntilDoneOptions{Frequency: 10 * time.Millisecond})
	if mustBeError(t, err, 200, "FailedIdentityOperation"); !strings.Contains(err.Error(), ghost.ResourceID) {
		t.Error(err)
	}
	s.must(s.SetARMFault(ctx, ARMFault{Resource: "b", Status: 429, RetryAfter: 7}))
	_, err = c.vms.Get(ctx, vm.resourceGroup, vm.name, nil)
	mustBeError(t, err, 429, "TooManyRequests")
	if faults, err := s.ARMFaults(ctx); err != nil || len(faults) != 1 || faults[0].Resource != FoldID(vmID) {
		t.Errorf("got faults %+v, error %v; want one fault of the virtual machine", faults, err)
	}
	s.must(s.ClearARMFaults(ctx, "b"))
	s.must(s.SetProvisioningState(ctx, "b", "Deleting"))
	got, err := c.vms.Get(ctx, vm.resourceGroup, vm.name, nil)
	s.must(err)
	if *got.Properties.ProvisioningState != "Deleting" {
		t.Errorf("state %s, want Deleting", *got.Properties.ProvisioningState)
	}
	s.must(s.RemoveMachine(ctx, "b"))
	_, err = c.vms.Get(ctx, vm.resourceGroup, vm.name, nil)
	mustBeError(t, err, 404, "ResourceNotFound")
	s.must(s.AddMachine(ctx, Machine{ID: vmID}))
	s.must(s.SetDelay(ctx, "b", 0))
	c.mustPatch(vmID, "SystemAssigned")
	s.must(s.DefineIdentity(ctx, red))
	s.must(s.SetIdentityFault(ctx, IdentityFault{Identity: red.ResourceID, Denied: true}))
	_, err = c.begin(ctx, of, both, nil, "+"+red.ResourceID)
	mustBeError(t, err, 403, "LinkedAuthorizationFailed")
	s.must(s.ResetLog(ctx))
	if log, err := s.ARMLog(ctx, 0); err != nil || len(log) != 0 || len(s.stats().ARM.Resources) != 0 {
		t.Errorf("after the reset: log %v, error %v; want an empty log and no counts", log, err)
	}
}

func TestARMAcceptsOnlyTokensOfTheFakeEntraID(t *testing.T) {
	s := start(t, onMachines)
	s.add(red, "a")
	client := s.https()
	ask := func(token string) int {
		r, err := http.NewRequest("GET", "https://"+s.at.Entra+setID+armV, nil)
		s.must(err)
		r.Header.Set("Authorization", "Bearer "+token)
		resp, err := client.Do(r)
		s.must(err)
		resp.Body.Close()
		return resp.StatusCode
	}
	foreign := blue
	foreign.TenantID = guid(800)
	s.add(foreign, "b")
	tokenFor := func(resource string, sources ...string) string {
		return s.get(append(sources, nodeA)[0], "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="+resource).token(t).AccessToken
	}
	mine := tokenFor("https://management.azure.com/")
	for token, want := range map[string]int{
		mine: 200, tokenFor("https://management.core.windows.net"): 200, tokenFor("https://" + s.at.Entra): 200,
		tokenFor("https://vault.azure.net"): 401, tokenFor("https://management.azure.com/", nodeB): 401, mine[:len(mine)-8] + "AAAAAAAA": 401, "nonsense": 401,
	} {
		if got := ask(token); got != want {
			t.Errorf("got status %d, want %d, with the token %s", got, want, token)
		}
	}
	s.clock.advance(25 * time.Hour)
	if got := ask(mine); got != 401 {
		t.Errorf("a day later, with the expired token: got status %d, want 401", got)
	}
}

func TestTheCertificateIsValidForEachNameAndTheAddress(t *testing.T) {
	hosts := certificateHosts(Config{EntraHosts: []string{"login.test"}, ARMHosts: []string{"management.test"}, EntraAddr: "127.0.0.7:443"})
	if joined(hosts) != "127.0.0.7 login.test management.test" {
		t.Errorf("hosts %v, want both configured names and the IP address", hosts)
	}
}

func TestARMsSwitchesAreSetAndReset(t *testing.T) {
	s := start(t)
	before, err := s.Switches(t.Context())
	s.must(err)
	changes := []string{
		"arm.delay=40s", "arm.retry-after=10", "arm.limits=true", "arm.early=true", "arm.queue=true", "arm.late-errors=true",
		"arm.naming=none", "arm.dangling=true", "arm.casing=upper", "arm.etags=false", "arm.propagation=5s",
	}
	s.set(changes...)
	after, err := s.Switches(t.Context())
	s.must(err)
	for _, c := range changes {
		key, value, _ := strings.Cut(c, "=")
		if after[key] != value || before[key] == value || before[key] == "" {
			t.Errorf("switch %s: %q became %q, want the value that was set, different from the default",
				key, before[key], after[key])
		}
	}
	for wrong, says := range map[string]string{
		"arm.nonsense": "arm.propagation", "arm.naming": "details, text, none", "arm.delay": "a duration", "arm.casing": "resourcegroups",
	} {
		err := s.Set(t.Context(), map[string]string{"arm.early": "false", "imds.drop": "true", wrong: "x"})
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("switch %s=x: got error %v, want one that lists what is valid", wrong, err)
		}
	}
	if all, err := s.Switches(t.Context()); err != nil || all["arm.early"] != "true" || all["imds.drop"] != "false" {
		t.Errorf("after the refused changes: switches %v, error %v; want arm.early and imds.drop unchanged", all, err)
	}
	s.set("reset=all")
	for key, value := range before {
		if all, err := s.Switches(t.Context()); err != nil || all[key] != value {
			t.Errorf("switch %s=%s after the reset, want the default %s", key, all[key], value)
		}
	}
}

func TestTheControlAPIRefusesWhatARMRefuses(t *testing.T) {
	s := start(t, onMachines)
	ctx := t.Context()
	for says, err := range map[string]error{
		`no machine "nowhere"`:          s.AttachTo(ctx, "nowhere", red.ResourceID),
		"no user-assigned identity":     s.AttachTo(ctx, "a", red.ResourceID),
		"no machine \"d\"":              s.SetDelay(ctx, "d", time.Second),
		"valid: 400 to 599":             s.SetARMFault(ctx, ARMFault{Resource: "a", Status: 99}),
		"not the ID of a user-assigned": s.DefineIdentity(ctx, Identity{ClientID: guid(1), ObjectID: guid(2), ResourceID: setID}),
		"is not the ID of a virtual":    s.AddMachine(ctx, Machine{ID: "set"}),
		"not the resource ID of a use":  s.SetIdentityFault(ctx, IdentityFault{Identity: "red"}),
	} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want an error that contains %q, got %v", says, err)
		}
	}
	machines, err := s.Machines(ctx)
	s.must(err)
	if len(machines) != 2 || machines[0].Kind != KindVM || joined(machines[0].Nodes) != "b" || machines[1].Kind != KindVMSS {
		t.Errorf("got machines %+v, want the virtual machine of b and the scale set", machines)
	}
	if _, err := s.Machine(ctx, "d"); err == nil {
		t.Error("node d, which is outside of Azure, has a machine")
	}
}
