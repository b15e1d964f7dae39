package azure

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func delayed(d time.Duration) func(*ARMSettings) {
	return func(s *ARMSettings) { s.Delay, s.RetryAfter = d, 10 }
}

func TestAnOperationChangesTheMachineAtItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(60*time.Second))
		start := time.Now()
		began := a.patchSet(both, "+"+blue.ResourceID, "-"+red.ResourceID)
		if got := began.machine(t); got.state() != "Updating" || got.names() != "red" || began.header.Get("Retry-After") != "10" {
			t.Errorf("after the PATCH: state %s, identities %s, headers %v; want Updating, red, Retry-After 10",
				got.state(), got.names(), began.header)
		}
		time.Sleep(59 * time.Second)
		if s := a.poll(began); s.Status != "InProgress" || s.again != "10" || s.Error != nil {
			t.Errorf("poll after 59 s: %+v, want InProgress with Retry-After 10", s)
		}
		if m, _ := a.Machine(setID); m.Operation == "" || !m.OperationEnd.Equal(start.Add(time.Minute)) || !a.Attached(setID, red.ResourceID) {
			t.Errorf("machine after 59 s: %+v, want the operation with its end, and red still attached", m)
		}
		a.Change(func(s *ARMSettings) { s.Early = true })
		if got := a.get(setID); got.state() != "Updating" || got.names() != "blue" {
			t.Errorf("with the setting Early: state %s, identities %s; want Updating, blue", got.state(), got.names())
		}
		time.Sleep(5 * time.Second)
		if s := a.poll(began); s.Status != "Succeeded" || s.again != "" || s.Error != nil {
			t.Errorf("poll after 64 s: %+v, want Succeeded without Retry-After", s)
		}
		if got := a.get(setID); got.state() != "Succeeded" || got.names() != "blue" || got.ETag == began.machine(t).ETag {
			t.Errorf("machine after 64 s: state %s, identities %s, ETag %s; want Succeeded, blue, a new ETag",
				got.state(), got.names(), got.ETag)
		}
		for i, c := range a.Changes(0) {
			if !c.Time.Equal(start.Add(time.Minute)) || c.Attached != (c.Identity == FoldID(blue.ResourceID)) || c.Resource != FoldID(setID) || c.OperationID == "" || i > 1 {
				t.Errorf("change %d: %+v; want only blue attached and red detached, by the operation, after a minute",
					i, c)
			}
		}
		first := a.Log(0)[0]
		if !first.Start.Equal(start) || !first.End.Equal(start.Add(time.Minute)) || first.OperationID == "" || !first.Accepted || first.Overlap {
			t.Errorf("the PATCH is logged as %+v, want accepted, an operation of one minute, and no overlap", first)
		}
	})
}

func TestASecondPatchIsRefusedOrQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(40*time.Second))
		start := time.Now()
		a.patchSet(both, "+"+blue.ResourceID)
		a.mustRefuse(a.patchSet(both, "+"+green.ResourceID), 409, "Conflict")
		if e := a.lastRequest(); !e.Overlap || e.Accepted {
			t.Errorf("the refused PATCH is logged as %+v, want an overlap and not accepted", e)
		}
		if got := a.do("PATCH", vmID+armV, patchOf("UserAssigned", "+"+green.ResourceID)); got.status != 200 {
			t.Errorf("PATCH of another machine: got %d %s, want 200", got.status, got.body)
		}
		a.Change(func(s *ARMSettings) { s.Queue = true })
		queued := a.patchSet(both, "+"+green.ResourceID, "-"+blue.ResourceID)
		if e := a.lastRequest(); !e.Overlap || !e.Accepted || !e.Start.Equal(start.Add(40*time.Second)) || !e.End.Equal(start.Add(80*time.Second)) {
			t.Errorf("the queued PATCH is logged as %+v, want accepted, an overlap, and an operation from 40 s to 80 s",
				e)
		}
		time.Sleep(41 * time.Second)
		if got := a.get(setID); got.names() != "blue red" || got.state() != "Updating" || a.poll(queued).Status != "InProgress" {
			t.Errorf("after 41 s: identities %s, state %s; want blue red, Updating", got.names(), got.state())
		}
		a.mustRefuse(a.patchSet(both, "-"+red.ResourceID, "-"+green.ResourceID), 400, "MissingIdentityIds")
		time.Sleep(40 * time.Second)
		if got := a.get(setID); got.names() != "green red" || got.state() != "Succeeded" || a.poll(queued).Status != "Succeeded" {
			t.Errorf("after 81 s: identities %s, state %s; want green red, Succeeded", got.names(), got.state())
		}
		if s := a.Stats().Resources[FoldID(setID)]; s.Patch != 4 || s.Accepted != 2 || s.Overlaps != 3 || s.Poll != 2 || s.Get != 2 {
			t.Errorf("counts %+v, want 4 PATCH requests (2 accepted, 3 overlaps), 2 polls and 2 GET requests", s)
		}
	})
}

func TestAMachineCanHaveItsOwnDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(60*time.Second))
		a.must(a.SetDelay(strings.ToUpper(setID), 0))
		if got := a.patchSet(both, "+"+blue.ResourceID); got.header.Get("Azure-AsyncOperation") != "" || got.machine(t).names() != "blue red" || got.machine(t).state() != "Succeeded" {
			t.Errorf("PATCH without a delay: headers %v, body %s; want no operation, and blue attached",
				got.header, got.body)
		}
		a.must(a.SetDelay(setID, -1))
		if got := a.patchSet(both, "-"+blue.ResourceID); got.machine(t).state() != "Updating" {
			t.Errorf("PATCH after the machine's own delay was removed: body %s, want the state Updating", got.body)
		}
		if err := a.SetDelay(vmID+"2", 0); err == nil || !strings.Contains(err.Error(), "no machine") {
			t.Errorf("SetDelay of an unknown machine: got error %v, want \"no machine\"", err)
		}
	})
}

func TestOperationsEndBeforeTheirDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(time.Hour))
		began := a.patchSet(both, "+"+blue.ResourceID)
		if s := a.poll(began); s.Status != "InProgress" {
			t.Errorf("poll before EndOperations: %+v, want InProgress", s)
		}
		a.must(a.EndOperations(setID))
		if s, got := a.poll(began), a.get(setID); s.Status != "Succeeded" || got.names() != "blue red" || got.state() != "Succeeded" {
			t.Errorf("after EndOperations: poll %+v, identities %s, state %s; want Succeeded, blue red, Succeeded",
				s, got.names(), got.state())
		}
		if err := a.EndOperations(vmID + "2"); err == nil || !strings.Contains(err.Error(), "no machine") {
			t.Errorf("EndOperations of an unknown machine: got error %v, want \"no machine\"", err)
		}
	})
}

func TestAnOperationFailsByAFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(20*time.Second))
		for _, c := range []struct {
			apply bool
			names string
		}{{false, "red"}, {true, "blue red"}} {
			a.must(a.SetFault(ARMFault{Resource: setID, Count: 1, Fails: true, Apply: c.apply, Code: "AllocationFailed", Message: "No room."}))
			a.get(setID) // the fault applies only to PATCH
			began := a.patchSet(both, "+"+blue.ResourceID)
			time.Sleep(20 * time.Second)
			if s := a.poll(began); s.Status != "Failed" || s.Error == nil || s.Error.Code != "AllocationFailed" || s.Error.Message != "No room." {
				t.Errorf("poll: %+v, want Failed with AllocationFailed", s)
			}
			if got := a.get(setID); got.state() != "Failed" || got.names() != c.names {
				t.Errorf("fault with apply %t: state %s, identities %s; want Failed, red, and blue only with apply",
					c.apply, got.state(), got.names())
			}
		}
		a.patchSet(both, "+"+green.ResourceID)
		time.Sleep(20 * time.Second)
		if got := a.get(setID); got.state() != "Succeeded" || got.names() != "blue green red" {
			t.Errorf("after the next PATCH: state %s, identities %s; want Succeeded, blue green red",
				got.state(), got.names())
		}
	})
}

func TestADeletingMachineRefusesPatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(20*time.Second))
		began := a.patchSet(both, "+"+blue.ResourceID)
		a.must(a.SetProvisioningState(setID, "Deleting"))
		if got := a.get(setID); got.state() != "Deleting" {
			t.Errorf("state %s, want Deleting", got.state())
		}
		a.mustRefuse(a.patchSet(both, "+"+green.ResourceID), 409, "OperationNotAllowed")
		a.RemoveMachine(setID)
		if e := a.mustRefuse(a.do("GET", setID+armV, ""), 404, "ResourceNotFound"); !strings.Contains(e.Message, "virtualMachineScaleSets/set' under resource group 'Nodes'") {
			t.Errorf("the error does not name the machine: %+v", e)
		}
		a.mustRefuse(a.patchSet(both, "+"+green.ResourceID), 404, "ResourceNotFound")
		if s := a.poll(began); s.Status != "Failed" || s.Error.Code != "ResourceNotFound" {
			t.Errorf("operation of the removed machine: %+v, want Failed with ResourceNotFound", s)
		}
		for _, state := range []string{"Updating", "Creating"} {
			a.must(a.SetProvisioningState(vmID, state))
			a.mustRefuse(a.do("PATCH", vmID+armV, patchOf("None")), 409, "Conflict")
		}
		a.must(a.SetProvisioningState(vmID, ""))
		if got := a.do("PATCH", vmID+armV, patchOf("None")); got.status != 200 {
			t.Errorf("after the provisioning state was reset: PATCH got %d %s, want 200", got.status, got.body)
		}
	})
}

func TestAManualChangeTakesEffectDuringAnOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(20*time.Second))
		a.patchSet(both, "+"+blue.ResourceID)
		a.must(a.Attach(setID, green.ResourceID))
		a.must(a.Detach(setID, strings.ToUpper(red.ResourceID)))
		a.must(a.Detach(setID, red.ResourceID))
		if got := a.get(setID); got.names() != "green" {
			t.Errorf("during the operation: identities %s, want green", got.names())
		}
		time.Sleep(20 * time.Second)
		if got := a.get(setID); got.names() != "blue green" {
			t.Errorf("after the operation: identities %s, want blue green", got.names())
		}
		changes := a.Changes(0)
		if len(changes) != 3 || !changes[0].ByHand || !changes[0].Attached || !changes[1].ByHand || changes[1].Attached || changes[2].ByHand {
			t.Errorf("got changes %+v, want one attached and one detached by hand, then one by the operation",
				changes)
		}
		if err := a.Attach(setID, userAssigned("ghost", 40).ResourceID); err == nil {
			t.Error("Attach accepted an identity that does not exist")
		}
	})
}

func TestOperationsEndInTheOrderOfTheirEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t)
		var want, got []string
		for i := range 10 {
			id := vmID + strings.Repeat("x", i)
			a.must(a.AddMachine(Machine{ID: id}))
			a.must(a.SetDelay(id, time.Duration(10-i)*time.Second))
			a.do("PATCH", id+armV, patchOf("UserAssigned", "+"+blue.ResourceID))
			want = slices.Insert(want, 0, FoldID(id))
		}
		time.Sleep(time.Hour)
		for _, c := range a.Changes(0) {
			got = append(got, c.Resource)
		}
		if !slices.Equal(got, want) {
			t.Errorf("changes of the machines %v, want them in the order in which the operations end", got)
		}
	})
}

func TestConcurrentPatchesAreAllApplied(t *testing.T) {
	a := newTestARM(t, func(s *ARMSettings) { s.Queue = true })
	var all []string
	for i := range 40 {
		id := userAssigned("many"+string(rune('a'+i%26))+strings.Repeat("x", i/26), 1000+2*i)
		a.must(a.DefineIdentity(id))
		all = append(all, id.ResourceID)
	}
	var wg sync.WaitGroup
	for _, id := range all {
		wg.Go(func() {
			if got := a.patchSet(both, "+"+id); got.status != 200 {
				t.Errorf("PATCH got %d %s, want 200", got.status, got.body)
			}
			a.get(setID)
			a.Machines()
		})
	}
	wg.Wait()
	if m, _ := a.Machine(setID); len(m.Identities) != 41 || len(a.Changes(0)) != 40 || len(a.Log(0)) != 80 {
		t.Errorf("%d identities attached, %d changes, %d requests; want 41, 40 and 80",
			len(m.Identities), len(a.Changes(0)), len(a.Log(0)))
	}
}
