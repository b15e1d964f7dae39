package azure

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestA429FaultEndsAfterItsCountAndAppliesOnlyToItsResource(t *testing.T) {
	for _, resource := range []string{setID, "/subscriptions/SUB/", ""} {
		a := newTestARM(t)
		a.must(a.SetFault(ARMFault{Resource: resource, Status: 429, RetryAfter: 30, Count: 2}))
		if got := a.do("GET", vmID+armV, ""); (got.status == 429) != (resource != setID) {
			t.Errorf("fault of resource %q: GET of vm got status %d; want 200 with a fault of the set, else 429",
				resource, got.status)
		}
		for a.Stats().ByStatus[429] < 2 {
			got := a.patchSet(both, "+"+blue.ResourceID)
			a.mustRefuse(got, 429, "TooManyRequests")
			if e := a.lastRequest(); got.header.Get("Retry-After") != "30" || !e.Forced || e.Accepted {
				t.Errorf("fault of resource %q: headers %v, want Retry-After 30; logged as %+v, want forced, not accepted",
					resource, got.header, e)
			}
		}
		if got := a.patchSet(both, "+"+blue.ResourceID); got.status != 200 || len(a.Faults()) != 0 {
			t.Errorf("fault of resource %q: PATCH after its count got %d %s, faults %v; want 200 and no faults",
				resource, got.status, got.body, a.Faults())
		}
		if a.Stats().Resources[FoldID(setID)].Throttled == 0 {
			t.Errorf("fault of resource %q: no throttled request of the scale set is counted: %+v", resource, a.Stats())
		}
	}
	a := newTestARM(t)
	a.must(a.SetFault(ARMFault{Resource: "/subscriptions/other", Status: 429}))
	if got := a.get(setID); got.names() != "red" {
		t.Errorf("with a fault of another subscription: got %v, want the identity red", got)
	}
}

func TestTheMostSpecificFaultApplies(t *testing.T) {
	a := newTestARM(t)
	for i, f := range []ARMFault{{}, {Operation: OpGet}, {Resource: "/subscriptions/sub"}, {Resource: strings.ToUpper(setID)}, {Resource: setID, Operation: OpGet}} {
		f.Status = 500 + i
		a.must(a.SetFault(f))
		if got := a.do("GET", setID+armV, ""); got.status != 500+i {
			t.Errorf("after setting the fault %+v: GET got status %d, want the fault's status", f, got.status)
		}
	}
	if got := a.patchSet("None"); got.status != 503 {
		t.Errorf("PATCH got status %d, want 503 from the fault of the machine", got.status)
	}
	if got := a.do("GET", vmID+armV, ""); got.status != 502 {
		t.Errorf("GET of the other machine got status %d, want 502 from the fault of the subscription", got.status)
	}
	a.ClearFaults(setID)
	if got := a.do("GET", setID+armV, ""); got.status != 502 || len(a.Faults()) != 3 {
		t.Errorf("after ClearFaults: GET got status %d, want 502; faults %+v, want 3", got.status, a.Faults())
	}
	a.ClearFaults("")
	a.get(setID)
}

func TestAResponseCanBeLostBeforeOrAfterThePatchIsApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, f := range map[string]ARMFault{
			"dropped":           {Drop: true},
			"dropped, applied":  {Drop: true, Apply: true},
			"hung":              {Hang: true},
			"hung, applied":     {Hang: true, Apply: true},
			"refused":           {Status: 503, Code: "Busy", Message: "Not now."},
			"refused, applied":  {Status: 500, Code: "Busy", Apply: true},
			"refused by denial": {Status: 403, Operation: OpPatch},
		} {
			a := newTestARM(t)
			f.Resource, f.Count = setID, 1
			a.must(a.SetFault(f))
			body := patchOf(both, "+"+blue.ResourceID)
			switch {
			case f.Drop:
				if _, err := a.try(t.Context(), "PATCH", setID+armV, body); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("%s: got error %v, want io.ErrUnexpectedEOF", name, err)
				}
			case f.Hang:
				a.mustTimeOut(time.Minute, "PATCH", setID+armV, body)
			default:
				code := f.Code
				if code == "" {
					code = "AuthorizationFailed"
				}
				a.mustRefuse(a.do("PATCH", setID+armV, body), f.Status, code)
			}
			want := "red"
			if f.Apply {
				want = "blue red"
			}
			if e := a.lastRequest(); e.Accepted != f.Apply || !e.Forced || e.Status != f.Status {
				t.Errorf("%s: the PATCH is logged as %+v, want forced, its status, and accepted only if applied",
					name, e)
			}
			if got := a.get(setID); got.names() != want {
				t.Errorf("%s: the machine now has the identities %s, want red, and blue only if the PATCH was applied",
					name, got.names())
			}
		}
	})
}

func TestLatencyEndsWhenTheClientDisconnects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t)
		a.must(a.SetFault(ARMFault{Operation: OpPatch, Latency: 40 * time.Second}))
		start := time.Now()
		if got := a.patchSet(both, "+"+blue.ResourceID).machine(t); got.names() != "blue red" || time.Since(start) != 40*time.Second {
			t.Errorf("got identities %s after %s, want blue red after 40s", got.names(), time.Since(start))
		}
		a.mustTimeOut(30*time.Second, "PATCH", setID+armV, patchOf(both, "+"+green.ResourceID))
		if e := a.lastRequest(); e.Status != 0 || e.Accepted || e.Answered.Sub(e.Time) != 30*time.Second {
			t.Errorf("logged as %+v, want status 0, not accepted, and answered after 30s", e)
		}
		if got := a.get(setID); got.names() != "blue red" {
			t.Errorf("after the client disconnected: identities %s, want blue red", got.names())
		}
	})
}

func TestConcurrentPatchesOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t)
		a.must(a.SetFault(ARMFault{Resource: setID, Latency: 10 * time.Second}))
		first := make(chan int)
		go func() { first <- a.patchSet(both, "+"+blue.ResourceID).status }()
		time.Sleep(time.Second)
		a.do("PATCH", vmID+armV, patchOf("None"))
		a.patchSet(both, "+"+green.ResourceID)
		if <-first != 200 {
			t.Error("the first PATCH did not get status 200")
		}
		for _, e := range a.Log(0) {
			if e.Overlap != (len(e.Add) == 1 && e.Add[0] == FoldID(green.ResourceID)) {
				t.Errorf("overlap is %t, want true only for the PATCH that adds green: %+v", e.Overlap, e)
			}
		}
	})
}

func TestInvalidFaultsAreRefused(t *testing.T) {
	a := newTestARM(t)
	for says, f := range map[string]ARMFault{
		"neither the ID of a machine":        {Resource: "set", Status: 500},
		"valid: get, patch, poll":            {Operation: "put", Status: 500},
		"valid: 400 to 599":                  {Status: 200},
		"negative":                           {Status: 500, Count: -1},
		"only one of":                        {Status: 500, Hang: true},
		"has no effect":                      {Apply: true},
		"fails is valid for operation patch": {Operation: OpGet, Fails: true},
	} {
		if err := a.SetFault(f); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("SetFault(%+v): got error %v, want the text that the table has for this fault", f, err)
		}
	}
	for says, f := range map[string]IdentityFault{
		"not the resource ID": {Identity: "red", Denied: true},
		"valid: details":      {Identity: red.ResourceID, Denied: true, Naming: "loud"},
	} {
		if err := a.SetIdentityFault(f); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("SetIdentityFault(%+v): got error %v, want the text that the table has for this fault", f, err)
		}
	}
	if err := a.AddMachine(Machine{ID: setID + "/virtualMachines/0"}); err == nil {
		t.Error("AddMachine accepted the ID of an instance of a scale set")
	}
	if err := a.AddMachine(Machine{ID: vmID, Identities: []string{userAssigned("ghost", 40).ResourceID}}); err == nil {
		t.Error("AddMachine accepted an identity that does not exist")
	}
}
