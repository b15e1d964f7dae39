package usage

import (
	"slices"
	"testing"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// heard is what a fleet told.
type heard struct {
	pods     []string
	machines []string
}

func (h *heard) take() heard {
	got := *h
	*h = heard{}
	slices.Sort(got.pods)
	return got
}

var vmss = azure.Resource{Kind: azure.ScaleSet, SubscriptionID: "s", ResourceGroup: "g", Name: "nodes"}

func newTestFleet() (*Tracker, *heard) {
	h := &heard{}
	return New(Requeue{
		Pod:     func(pod string) { h.pods = append(h.pods, pod) },
		Machine: func(key string, _ time.Duration) { h.machines = append(h.machines, key) },
	}), h
}

func wantOf(id string) Demand { return Demand{Key{vmss.Key(), id}, vmss, "/" + id} }

func TestAPodIsWokenWhenItsIdentityIsThereAndTheMachineOnlyForWhatIsMissing(t *testing.T) {
	f, h := newTestFleet()
	f.SetDemands("ns/a", []Demand{wantOf("x")})
	if got := h.take(); len(got.machines) != 1 {
		t.Fatalf("the first need woke %v", got)
	}
	if s, _ := f.Status("ns/a", wantOf("x").Key); s != Unknown {
		t.Fatalf("before Azure was asked it stands %v", s)
	}
	f.Machine(vmss.Key()).Observe(nil, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Fatalf("Azure's first word woke %v", got)
	}
	if s, _ := f.Status("ns/a", wantOf("x").Key); s != Missing {
		t.Fatalf("it stands %v", s)
	}
	f.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Fatalf("its coming woke %v", got)
	}
	if s, _ := f.Status("ns/a", wantOf("x").Key); s != Attached {
		t.Fatalf("it stands %v", s)
	}
	f.SetDemands("ns/b", []Demand{wantOf("x")})
	f.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if got := h.take(); len(got.pods)+len(got.machines) != 0 {
		t.Errorf("a second pod, for which all is there, and no news woke %v", got)
	}
}

func TestAnAssignmentIsKeptAsLongAsItIsTheLastOfAnIdentityThatMICHasToDetach(t *testing.T) {
	f, h := newTestFleet()
	w := wantOf("x")
	f.SetDemands("ns/a", []Demand{w})
	f.Machine(vmss.Key()).SetLedger(map[string]string{"x": "/x"})
	f.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	f.SetDemands("ns/b", []Demand{w})
	f.SetDemands("ns/a", nil)
	if !f.MayRelease("ns/a", w.Key) {
		t.Error("another pod uses the identity, and the assignment may not go")
	}
	f.SetDemands("ns/b", nil)
	if f.MayRelease("ns/b", w.Key) {
		t.Error("the last assignment may go before its identity is detached")
	}
	h.take()
	f.Machine(vmss.Key()).Observe(nil, false)
	f.Machine(vmss.Key()).SetLedger(nil)
	if got := h.take(); !slices.Contains(got.pods, "ns/b") {
		t.Errorf("after the detachment were woken: %v", got)
	}
	if !f.MayRelease("ns/b", w.Key) || !f.Absent(w.Key) {
		t.Error("it was detached, and its assignment may not go")
	}
}

func TestAnIdentityThatMICDidNotAttachKeepsNoAssignment(t *testing.T) {
	f, _ := newTestFleet()
	w := wantOf("x")
	f.SetDemands("ns/a", []Demand{w})
	f.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if f.SetDemands("ns/a", nil); f.MayRelease("ns/a", w.Key) {
		t.Error("before the ledger has been read it may go")
	}
	f.Machine(vmss.Key()).SetLedger(nil)
	if !f.MayRelease("ns/a", w.Key) {
		t.Error("it may not go")
	}
}

func TestWhatIsLeavingCountsAsMissingAndWhatHasComeIntoUseDoesNotLeave(t *testing.T) {
	f, _ := newTestFleet()
	x, y := wantOf("x"), wantOf("y")
	f.SetDemands("ns/a", []Demand{x, y})
	f.Machine(vmss.Key()).SetLedger(map[string]string{"x": "/x", "y": "/y"})
	f.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}, false)
	f.SetDemands("ns/a", []Demand{y})
	if got := f.Machine(vmss.Key()).StartDetaching([]string{"x", "y"}); !slices.Equal(got, []string{"x"}) {
		t.Fatalf("%v leave", got)
	}
	f.SetDemands("ns/b", []Demand{x})
	if s, _ := f.Status("ns/b", x.Key); s != Missing {
		t.Errorf("a pod that comes while its identity is being taken away is told %v", s)
	}
	f.Machine(vmss.Key()).MarkUnknown()
	if s, _ := f.Status("ns/a", y.Key); s != Unknown {
		t.Errorf("when an update has ended unclear, it stands %v", s)
	}
	f.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}, false)
	if s, _ := f.Status("ns/b", x.Key); s != Attached {
		t.Errorf("after an update that did not happen it stands %v", s)
	}
}

func TestAnIdentityThatSomebodyDetachesWakesThosePodsThatHaveIt(t *testing.T) {
	f, h := newTestFleet()
	f.SetDemands("ns/a", []Demand{wantOf("x")})
	f.SetDemands("ns/b", []Demand{wantOf("y")})
	both := map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}
	f.Machine(vmss.Key()).Observe(both, false)
	h.take()
	f.Machine(vmss.Key()).Observe(map[string]azure.Identity{"y": {ID: "y"}}, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Errorf("woken: %v", got.pods)
	}
}

func TestARefusedIdentityIsTriedEverMoreRarelyAndToldToThoseWhoWait(t *testing.T) {
	f, h := newTestFleet()
	f.SetDemands("ns/a", []Demand{wantOf("x")})
	f.Machine(vmss.Key()).Observe(nil, false)
	f.Status("ns/a", wantOf("x").Key)
	h.take()
	var last time.Duration
	for times := 1; times <= 12; times++ {
		until, n := f.Machine(vmss.Key()).SetAside("x", "no")
		pause := time.Until(until)
		if n != times || pause < last*3/2 && pause < refusalBackoff.Max || pause > refusalBackoff.Max*6/5+time.Second {
			t.Fatalf("after %d refusals the pause is %s, before it was %s", n, pause, last)
		}
		last = pause
	}
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Errorf("woken: %v", got.pods)
	}
	if _, message := f.Status("ns/a", wantOf("x").Key); message != "no" || f.SetAsideCount() != 1 {
		t.Errorf("the pod is told %q; set aside are %d", message, f.SetAsideCount())
	}
	f.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if f.SetAsideCount() != 0 {
		t.Error("it is attached, and still set aside")
	}
}
