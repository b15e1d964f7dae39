package usage

import (
	"slices"
	"testing"
	"time"

	"github.com/podidentity/podidentity/mic/azure"
)

// requeued records the pods and machines that a Tracker requeued.
type requeued struct {
	pods     []string
	machines []string
}

func (h *requeued) take() requeued {
	got := *h
	*h = requeued{}
	slices.Sort(got.pods)
	return got
}

var vmss = azure.Resource{Kind: azure.ScaleSet, SubscriptionID: "s", ResourceGroup: "g", Name: "nodes"}

func newTestTracker() (*Tracker, *requeued) {
	h := &requeued{}
	return New(Requeue{
		Pod:     func(pod string) { h.pods = append(h.pods, pod) },
		Machine: func(key string, _ time.Duration) { h.machines = append(h.machines, key) },
	}), h
}

func demandFor(id string) Demand { return Demand{Key{vmss.Key(), id}, vmss, "/" + id} }

func TestAPodIsRequeuedWhenItsIdentityIsAttachedAndTheMachineOnlyForMissingOnes(t *testing.T) {
	tr, h := newTestTracker()
	tr.SetDemands("ns/a", []Demand{demandFor("x")})
	if got := h.take(); len(got.machines) != 1 {
		t.Fatalf("the first demand requeued %v, want one machine", got)
	}
	if s, _ := tr.Status("ns/a", demandFor("x").Key); s != Unknown {
		t.Fatalf("before Azure reported the state of the machine, the status is %v, want Unknown", s)
	}
	tr.Machine(vmss.Key()).Observe(nil, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Fatalf("the first report of Azure requeued %v, want pod ns/a", got)
	}
	if s, _ := tr.Status("ns/a", demandFor("x").Key); s != Missing {
		t.Fatalf("the status of an identity that is not attached is %v, want Missing", s)
	}
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Fatalf("the attachment requeued %v, want pod ns/a", got)
	}
	if s, _ := tr.Status("ns/a", demandFor("x").Key); s != Attached {
		t.Fatalf("the status of an attached identity is %v, want Attached", s)
	}
	tr.SetDemands("ns/b", []Demand{demandFor("x")})
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if got := h.take(); len(got.pods)+len(got.machines) != 0 {
		t.Errorf("a second pod that needs an attached identity, or an unchanged state, requeued %v, want nothing", got)
	}
}

func TestTheLastAssignmentOfAnIdentityStaysUntilMICHasDetachedIt(t *testing.T) {
	tr, h := newTestTracker()
	w := demandFor("x")
	tr.SetDemands("ns/a", []Demand{w})
	tr.Machine(vmss.Key()).SetLedger(map[string]string{"x": "/x"})
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	tr.SetDemands("ns/b", []Demand{w})
	tr.SetDemands("ns/a", nil)
	if !tr.MayRelease("ns/a", w.Key) {
		t.Error("MayRelease returns false, although another pod uses the identity")
	}
	tr.SetDemands("ns/b", nil)
	if tr.MayRelease("ns/b", w.Key) {
		t.Error("MayRelease returns true for the last assignment of an identity that is still attached")
	}
	h.take()
	tr.Machine(vmss.Key()).Observe(nil, false)
	tr.Machine(vmss.Key()).SetLedger(nil)
	if got := h.take(); !slices.Contains(got.pods, "ns/b") {
		t.Errorf("the detachment requeued %v, want pod ns/b", got)
	}
	if !tr.MayRelease("ns/b", w.Key) || !tr.Absent(w.Key) {
		t.Error("after the detachment MayRelease or Absent returns false")
	}
}

func TestAnIdentityThatMICDidNotAttachDoesNotDelayTheRelease(t *testing.T) {
	tr, _ := newTestTracker()
	w := demandFor("x")
	tr.SetDemands("ns/a", []Demand{w})
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if tr.SetDemands("ns/a", nil); tr.MayRelease("ns/a", w.Key) {
		t.Error("MayRelease returns true before the ledger is read")
	}
	tr.Machine(vmss.Key()).SetLedger(nil)
	if !tr.MayRelease("ns/a", w.Key) {
		t.Error("MayRelease returns false, although MIC did not attach the identity")
	}
}

func TestAnIdentityBeingDetachedIsMissingAndOneInUseIsNotDetached(t *testing.T) {
	tr, _ := newTestTracker()
	x, y := demandFor("x"), demandFor("y")
	tr.SetDemands("ns/a", []Demand{x, y})
	tr.Machine(vmss.Key()).SetLedger(map[string]string{"x": "/x", "y": "/y"})
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}, false)
	tr.SetDemands("ns/a", []Demand{y})
	if got := tr.Machine(vmss.Key()).StartDetaching([]string{"x", "y"}); !slices.Equal(got, []string{"x"}) {
		t.Fatalf("StartDetaching returned %v, want only x, which no pod needs", got)
	}
	tr.SetDemands("ns/b", []Demand{x})
	if s, _ := tr.Status("ns/b", x.Key); s != Missing {
		t.Errorf("while the identity is being detached, the status for a new pod is %v, want Missing", s)
	}
	tr.Machine(vmss.Key()).MarkUnknown()
	if s, _ := tr.Status("ns/a", y.Key); s != Unknown {
		t.Errorf("after an update with an unknown result the status is %v, want Unknown", s)
	}
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}, false)
	if s, _ := tr.Status("ns/b", x.Key); s != Attached {
		t.Errorf("after an update that detached nothing the status is %v, want Attached", s)
	}
}

func TestADetachmentBySomebodyElseRequeuesThePodsOfTheIdentity(t *testing.T) {
	tr, h := newTestTracker()
	tr.SetDemands("ns/a", []Demand{demandFor("x")})
	tr.SetDemands("ns/b", []Demand{demandFor("y")})
	both := map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}
	tr.Machine(vmss.Key()).Observe(both, false)
	h.take()
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"y": {ID: "y"}}, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Errorf("the detachment of identity x requeued %v, want pod ns/a", got.pods)
	}
}

func TestARefusedIdentityIsRetriedWithGrowingDelaysAndReportedToItsPods(t *testing.T) {
	tr, h := newTestTracker()
	tr.SetDemands("ns/a", []Demand{demandFor("x")})
	tr.Machine(vmss.Key()).Observe(nil, false)
	tr.Status("ns/a", demandFor("x").Key)
	h.take()
	var last time.Duration
	for times := 1; times <= 12; times++ {
		until, n := tr.Machine(vmss.Key()).SetAside("x", "no")
		pause := time.Until(until)
		if n != times || pause < last*3/2 && pause < refusalBackoff.Max || pause > refusalBackoff.Max*6/5+time.Second {
			t.Fatalf("SetAside counted %d refusals and set a delay of %s; the delay before was %s", n, pause, last)
		}
		last = pause
	}
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Errorf("the refusals requeued %v, want pod ns/a", got.pods)
	}
	if _, message := tr.Status("ns/a", demandFor("x").Key); message != "no" || tr.SetAsideCount() != 1 {
		t.Errorf("the problem of the pod is %q, want \"no\"; %d identities are set aside, want 1", message, tr.SetAsideCount())
	}
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if tr.SetAsideCount() != 0 {
		t.Error("the identity is still set aside, although it is attached")
	}
}
