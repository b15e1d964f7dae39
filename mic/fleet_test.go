package mic

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

func newTestFleet() (*fleet, *heard) {
	h := &heard{}
	return newFleet(func(pod string) { h.pods = append(h.pods, pod) },
		func(key string, _ time.Duration) { h.machines = append(h.machines, key) }), h
}

func wantOf(id string) needed { return needed{want{vmss.Key(), id}, vmss, "/" + id} }

func TestAPodIsWokenWhenItsIdentityIsThereAndTheMachineOnlyForWhatIsMissing(t *testing.T) {
	f, h := newTestFleet()
	f.set("ns/a", []needed{wantOf("x")})
	if got := h.take(); len(got.machines) != 1 {
		t.Fatalf("the first need woke %v", got)
	}
	if s, _ := f.standing("ns/a", wantOf("x").want); s != unknown {
		t.Fatalf("before Azure was asked it stands %v", s)
	}
	f.saw(vmss.Key(), nil, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Fatalf("Azure's first word woke %v", got)
	}
	if s, _ := f.standing("ns/a", wantOf("x").want); s != missing {
		t.Fatalf("it stands %v", s)
	}
	f.saw(vmss.Key(), map[string]azure.Identity{"x": {ID: "x"}}, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Fatalf("its coming woke %v", got)
	}
	if s, _ := f.standing("ns/a", wantOf("x").want); s != attached {
		t.Fatalf("it stands %v", s)
	}
	f.set("ns/b", []needed{wantOf("x")})
	f.saw(vmss.Key(), map[string]azure.Identity{"x": {ID: "x"}}, false)
	if got := h.take(); len(got.pods)+len(got.machines) != 0 {
		t.Errorf("a second pod, for which all is there, and no news woke %v", got)
	}
}

func TestAnAssignmentIsKeptAsLongAsItIsTheLastOfAnIdentityThatMICHasToDetach(t *testing.T) {
	f, h := newTestFleet()
	w := wantOf("x")
	f.set("ns/a", []needed{w})
	f.setOurs(vmss.Key(), map[string]string{"x": "/x"})
	f.saw(vmss.Key(), map[string]azure.Identity{"x": {ID: "x"}}, false)
	f.set("ns/b", []needed{w})
	f.set("ns/a", nil)
	if !f.mayGo("ns/a", w.want) {
		t.Error("another pod uses the identity, and the assignment may not go")
	}
	f.set("ns/b", nil)
	if f.mayGo("ns/b", w.want) {
		t.Error("the last assignment may go before its identity is detached")
	}
	h.take()
	f.saw(vmss.Key(), nil, false)
	f.setOurs(vmss.Key(), nil)
	if got := h.take(); !slices.Contains(got.pods, "ns/b") {
		t.Errorf("after the detachment were woken: %v", got)
	}
	if !f.mayGo("ns/b", w.want) || !f.absent(w.want) {
		t.Error("it was detached, and its assignment may not go")
	}
}

func TestAnIdentityThatMICDidNotAttachKeepsNoAssignment(t *testing.T) {
	f, _ := newTestFleet()
	w := wantOf("x")
	f.set("ns/a", []needed{w})
	f.saw(vmss.Key(), map[string]azure.Identity{"x": {ID: "x"}}, false)
	if f.set("ns/a", nil); f.mayGo("ns/a", w.want) {
		t.Error("before the ledger has been read it may go")
	}
	f.setOurs(vmss.Key(), nil)
	if !f.mayGo("ns/a", w.want) {
		t.Error("it may not go")
	}
}

func TestWhatIsLeavingCountsAsMissingAndWhatHasComeIntoUseDoesNotLeave(t *testing.T) {
	f, _ := newTestFleet()
	x, y := wantOf("x"), wantOf("y")
	f.set("ns/a", []needed{x, y})
	f.setOurs(vmss.Key(), map[string]string{"x": "/x", "y": "/y"})
	f.saw(vmss.Key(), map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}, false)
	f.set("ns/a", []needed{y})
	if got := f.leave(vmss.Key(), []string{"x", "y"}); !slices.Equal(got, []string{"x"}) {
		t.Fatalf("%v leave", got)
	}
	f.set("ns/b", []needed{x})
	if s, _ := f.standing("ns/b", x.want); s != missing {
		t.Errorf("a pod that comes while its identity is being taken away is told %v", s)
	}
	f.unclear(vmss.Key())
	if s, _ := f.standing("ns/a", y.want); s != unknown {
		t.Errorf("when an update has ended unclear, it stands %v", s)
	}
	f.saw(vmss.Key(), map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}, false)
	if s, _ := f.standing("ns/b", x.want); s != attached {
		t.Errorf("after an update that did not happen it stands %v", s)
	}
}

func TestAnIdentityThatSomebodyDetachesWakesThosePodsThatHaveIt(t *testing.T) {
	f, h := newTestFleet()
	f.set("ns/a", []needed{wantOf("x")})
	f.set("ns/b", []needed{wantOf("y")})
	both := map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}
	f.saw(vmss.Key(), both, false)
	h.take()
	f.saw(vmss.Key(), map[string]azure.Identity{"y": {ID: "y"}}, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Errorf("woken: %v", got.pods)
	}
}

func TestARefusedIdentityIsTriedEverMoreRarelyAndToldToThoseWhoWait(t *testing.T) {
	f, h := newTestFleet()
	f.set("ns/a", []needed{wantOf("x")})
	f.saw(vmss.Key(), nil, false)
	f.standing("ns/a", wantOf("x").want)
	h.take()
	var last time.Duration
	for times := 1; times <= 12; times++ {
		until, n := f.refuse(vmss.Key(), "x", "no")
		pause := time.Until(until)
		if n != times || pause < last*3/2 && pause < asideMost || pause > asideMost*6/5+time.Second {
			t.Fatalf("after %d refusals the pause is %s, before it was %s", n, pause, last)
		}
		last = pause
	}
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Errorf("woken: %v", got.pods)
	}
	if _, message := f.standing("ns/a", wantOf("x").want); message != "no" || f.setAsideCount() != 1 {
		t.Errorf("the pod is told %q; set aside are %d", message, f.setAsideCount())
	}
	f.saw(vmss.Key(), map[string]azure.Identity{"x": {ID: "x"}}, false)
	if f.setAsideCount() != 0 {
		t.Error("it is attached, and still set aside")
	}
}
