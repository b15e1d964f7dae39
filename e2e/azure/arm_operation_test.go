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
			t.Errorf("began: %s, %s, %v", got.state(), got.names(), began.header)
		}
		time.Sleep(59 * time.Second)
		if s := a.poll(began); s.Status != "InProgress" || s.again != "10" || s.Error != nil {
			t.Errorf("after 59 s: %+v", s)
		}
		if m, _ := a.Machine(setID); m.Operation == "" || !m.OperationEnd.Equal(start.Add(time.Minute)) || !a.Attached(setID, red.ResourceID) {
			t.Errorf("after 59 s: %+v", m)
		}
		a.Change(func(s *ARMSettings) { s.Early = true })
		if got := a.get(setID); got.state() != "Updating" || got.names() != "blue" {
			t.Errorf("early: %s, %s", got.state(), got.names())
		}
		time.Sleep(5 * time.Second)
		if s := a.poll(began); s.Status != "Succeeded" || s.again != "" || s.Error != nil {
			t.Errorf("after 64 s: %+v", s)
		}
		if got := a.get(setID); got.state() != "Succeeded" || got.names() != "blue" || got.ETag == began.machine(t).ETag {
			t.Errorf("after 64 s: %s, %s, ETag %s", got.state(), got.names(), got.ETag)
		}
		for i, c := range a.Changes(0) {
			if !c.Time.Equal(start.Add(time.Minute)) || c.Attached != (c.Identity == FoldID(blue.ResourceID)) || c.Resource != FoldID(setID) || c.OperationID == "" || i > 1 {
				t.Errorf("change %d: %+v", i, c)
			}
		}
		first := a.Log(0)[0]
		if !first.Start.Equal(start) || !first.End.Equal(start.Add(time.Minute)) || first.OperationID == "" || !first.Accepted || first.Overlap {
			t.Errorf("logged as %+v", first)
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
			t.Errorf("logged as %+v", e)
		}
		if got := a.do("PATCH", vmID+armV, patchOf("UserAssigned", "+"+green.ResourceID)); got.status != 200 {
			t.Errorf("of another machine: %d %s", got.status, got.body)
		}
		a.Change(func(s *ARMSettings) { s.Queue = true })
		queued := a.patchSet(both, "+"+green.ResourceID, "-"+blue.ResourceID)
		if e := a.lastRequest(); !e.Overlap || !e.Accepted || !e.Start.Equal(start.Add(40*time.Second)) || !e.End.Equal(start.Add(80*time.Second)) {
			t.Errorf("queued: logged as %+v", e)
		}
		time.Sleep(41 * time.Second)
		if got := a.get(setID); got.names() != "blue red" || got.state() != "Updating" || a.poll(queued).Status != "InProgress" {
			t.Errorf("after 41 s: %s, %s", got.names(), got.state())
		}
		a.mustRefuse(a.patchSet(both, "-"+red.ResourceID, "-"+green.ResourceID), 400, "MissingIdentityIds")
		time.Sleep(40 * time.Second)
		if got := a.get(setID); got.names() != "green red" || got.state() != "Succeeded" || a.poll(queued).Status != "Succeeded" {
			t.Errorf("after 81 s: %s, %s", got.names(), got.state())
		}
		if s := a.Stats().Resources[FoldID(setID)]; s.Patch != 4 || s.Accepted != 2 || s.Overlaps != 3 || s.Poll != 2 || s.Get != 2 {
			t.Errorf("counted %+v", s)
		}
	})
}

func TestAMachineCanHaveItsOwnDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(60*time.Second))
		a.must(a.SetDelay(strings.ToUpper(setID), 0))
		if got := a.patchSet(both, "+"+blue.ResourceID); got.header.Get("Azure-AsyncOperation") != "" || got.machine(t).names() != "blue red" || got.machine(t).state() != "Succeeded" {
			t.Errorf("at once: %v %s", got.header, got.body)
		}
		a.must(a.SetDelay(setID, -1))
		if got := a.patchSet(both, "-"+blue.ResourceID); got.machine(t).state() != "Updating" {
			t.Errorf("as all: %s", got.body)
		}
		if err := a.SetDelay(vmID+"2", 0); err == nil || !strings.Contains(err.Error(), "no machine") {
			t.Errorf("an unknown machine: %v", err)
		}
	})
}

func TestOperationsEndBeforeTheirDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(time.Hour))
		began := a.patchSet(both, "+"+blue.ResourceID)
		if s := a.poll(began); s.Status != "InProgress" {
			t.Errorf("before: %+v", s)
		}
		a.must(a.EndOperations(setID))
		if s, got := a.poll(began), a.get(setID); s.Status != "Succeeded" || got.names() != "blue red" || got.state() != "Succeeded" {
			t.Errorf("after: %+v, %s, %s", s, got.names(), got.state())
		}
		if err := a.EndOperations(vmID + "2"); err == nil || !strings.Contains(err.Error(), "no machine") {
			t.Errorf("an unknown machine: %v", err)
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
				t.Errorf("status: %+v", s)
			}
			if got := a.get(setID); got.state() != "Failed" || got.names() != c.names {
				t.Errorf("apply %t: %s, %s", c.apply, got.state(), got.names())
			}
		}
		a.patchSet(both, "+"+green.ResourceID)
		time.Sleep(20 * time.Second)
		if got := a.get(setID); got.state() != "Succeeded" || got.names() != "blue green red" {
			t.Errorf("the next: %s, %s", got.state(), got.names())
		}
	})
}

func TestADeletingMachineRefusesPatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, delayed(20*time.Second))
		began := a.patchSet(both, "+"+blue.ResourceID)
		a.must(a.SetProvisioningState(setID, "Deleting"))
		if got := a.get(setID); got.state() != "Deleting" {
			t.Errorf("state %s", got.state())
		}
		a.mustRefuse(a.patchSet(both, "+"+green.ResourceID), 409, "OperationNotAllowed")
		a.RemoveMachine(setID)
		if e := a.mustRefuse(a.do("GET", setID+armV, ""), 404, "ResourceNotFound"); !strings.Contains(e.Message, "virtualMachineScaleSets/set' under resource group 'Nodes'") {
			t.Errorf("%+v", e)
		}
		a.mustRefuse(a.patchSet(both, "+"+green.ResourceID), 404, "ResourceNotFound")
		if s := a.poll(began); s.Status != "Failed" || s.Error.Code != "ResourceNotFound" {
			t.Errorf("its operation: %+v", s)
		}
		for _, state := range []string{"Updating", "Creating"} {
			a.must(a.SetProvisioningState(vmID, state))
			a.mustRefuse(a.do("PATCH", vmID+armV, patchOf("None")), 409, "Conflict")
		}
		a.must(a.SetProvisioningState(vmID, ""))
		if got := a.do("PATCH", vmID+armV, patchOf("None")); got.status != 200 {
			t.Errorf("back to normal: %d %s", got.status, got.body)
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
			t.Errorf("at once: %s", got.names())
		}
		time.Sleep(20 * time.Second)
		if got := a.get(setID); got.names() != "blue green" {
			t.Errorf("after the operation: %s", got.names())
		}
		changes := a.Changes(0)
		if len(changes) != 3 || !changes[0].ByHand || !changes[0].Attached || !changes[1].ByHand || changes[1].Attached || changes[2].ByHand {
			t.Errorf("changes: %+v", changes)
		}
		if err := a.Attach(setID, userAssigned("ghost", 40).ResourceID); err == nil {
			t.Error("a missing identity was attached")
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
			t.Errorf("order: %v", got)
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
				t.Errorf("%d %s", got.status, got.body)
			}
			a.get(setID)
			a.Machines()
		})
	}
	wg.Wait()
	if m, _ := a.Machine(setID); len(m.Identities) != 41 || len(a.Changes(0)) != 40 || len(a.Log(0)) != 80 {
		t.Errorf("%d attached, %d changes, %d requests", len(m.Identities), len(a.Changes(0)), len(a.Log(0)))
	}
}
