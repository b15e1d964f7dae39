package azure

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestUpdatesOfAMachineAreThrottledAsDocumented(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, func(s *ARMSettings) { s.Limits = true })
		patches := func(n int) (accepted int, last answer) {
			for range n {
				if last = a.patchSet(both, "+"+blue.ResourceID); last.status == 200 {
					accepted++
				}
			}
			return accepted, last
		}
		a.do("PATCH", setID+armV, "") // a request with an invalid body takes a token, too
		// The numbers of the example in Azure's documentation, from its second minute on.
		for minute, c := range []struct{ requests, accepted int }{{7, 7}, {0, 0}, {13, 12}, {5, 4}, {0, 0}, {9, 8}} {
			got, last := patches(c.requests)
			if got != c.accepted {
				t.Errorf("minute %d: %d of %d PATCH requests accepted, want the number in the table",
					minute, got, c.requests)
			}
			if got < c.requests {
				e := a.mustRefuse(last, 429, "OperationNotAllowed")
				if last.header.Get("Retry-After") != "60" || len(e.Details) != 1 || e.Details[0].Target != "UpdateVMScaleSet" {
					t.Errorf("refused with headers %v and error %+v, want Retry-After 60 and details about UpdateVMScaleSet",
						last.header, e)
				}
				if r := a.lastRequest(); !r.Forced || r.Accepted {
					t.Errorf("the throttled PATCH is logged as %+v, want forced and not accepted", r)
				}
			}
			time.Sleep(time.Minute)
		}
		time.Sleep(20 * time.Second)
		patches(12)
		if _, last := patches(1); last.header.Get("Retry-After") != "40" {
			t.Errorf("20 s into the minute: headers %v, want Retry-After 40", last.header)
		}
		if got := a.do("PATCH", vmID+armV, patchOf("None")); got.status != 200 || got.header.Get("X-Ms-Ratelimit-Remaining-Resource") == "" {
			t.Errorf("PATCH of another machine: status %d, headers %v; want 200 with X-Ms-Ratelimit-Remaining-Resource",
				got.status, got.header)
		}
	})
}

func TestReadsAndPollsHaveSeparateBuckets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, func(s *ARMSettings) { s.Limits, s.Delay = true, time.Minute })
		began := a.patchSet(both, "+"+blue.ResourceID)
		poll := strings.TrimPrefix(began.header.Get("Azure-AsyncOperation"), "https://management.azure.com")
		for target, most := range map[string]int{setID + armV: 36, vmID + armV: 36, poll: 45} {
			for i := range most + 1 {
				if got := a.do("GET", target, ""); (got.status == 200) != (i < most) {
					t.Errorf("request %d (counted from 0) to %s: got status %d, want 429 only once the bucket is empty",
						i, target, got.status)
				}
			}
		}
		a.Change(func(s *ARMSettings) { s.Limits = false })
		if got := a.do("GET", poll, ""); got.status != 200 {
			t.Errorf("with the limits off: got status %d, want 200", got.status)
		}
	})
}

func TestASubscriptionHasABucket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestARM(t, func(s *ARMSettings) { s.Limits = true })
		throttled := 0
		for i := range 126 {
			id := fmt.Sprintf("%s%d", vmID, i)
			a.must(a.AddMachine(Machine{ID: id}))
			for range 12 {
				if got := a.do("PATCH", id+armV, patchOf("None")); got.status == 429 {
					throttled++
					if e := got.armError(t); !strings.Contains(e.Message, "for this subscription") {
						t.Fatalf("the error does not name the subscription: %+v", e)
					}
				}
			}
		}
		if throttled != 126*12-1500 {
			t.Errorf("%d requests throttled, want 12", throttled)
		}
		other := strings.Replace(vmID, "Sub", "Other", 1)
		a.must(a.AddMachine(Machine{ID: other}))
		if got := a.do("PATCH", other+armV, patchOf("None")); got.status != 200 {
			t.Errorf("PATCH in another subscription: got status %d, want 200", got.status)
		}
	})
}
