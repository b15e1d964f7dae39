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
		t.Fatalf("the first demand requeued %v", got)
	}
	if s, _ := tr.Status("ns/a", demandFor("x").Key); s != Unknown {
		t.Fatalf("before Azure reported, the status is %v", s)
	}
	tr.Machine(vmss.Key()).Observe(nil, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Fatalf("the first report of Azure requeued %v", got)
	}
	if s, _ := tr.Status("ns/a", demandFor("x").Key); s != Missing {
		t.Fatalf("the status is %v", s)
	}
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Fatalf("the attachment requeued %v", got)
	}
	if s, _ := tr.Status("ns/a", demandFor("x").Key); s != Attached {
		t.Fatalf("the status is %v", s)
	}
	tr.SetDemands("ns/b", []Demand{demandFor("x")})
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if got := h.take(); len(got.pods)+len(got.machines) != 0 {
		t.Errorf("a second pod of an attached identity, and an unchanged state, requeued %v", got)
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
		t.Error("another pod uses the identity, and the assignment may not be released")
	}
	tr.SetDemands("ns/b", nil)
	if tr.MayRelease("ns/b", w.Key) {
		t.Error("the last assignment may be released before its identity is detached")
	}
	h.take()
	tr.Machine(vmss.Key()).Observe(nil, false)
	tr.Machine(vmss.Key()).SetLedger(nil)
	if got := h.take(); !slices.Contains(got.pods, "ns/b") {
		t.Errorf("the detachment requeued %v", got)
	}
	if !tr.MayRelease("ns/b", w.Key) || !tr.Absent(w.Key) {
		t.Error("the identity was detached, and its assignment may not be released")
	}
}

func TestAnIdentityThatMICDidNotAttachDoesNotDelayTheRelease(t *testing.T) {
	tr, _ := newTestTracker()
	w := demandFor("x")
	tr.SetDemands("ns/a", []Demand{w})
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if tr.SetDemands("ns/a", nil); tr.MayRelease("ns/a", w.Key) {
		t.Error("the assignment may be released before the ledger is read")
	}
	tr.Machine(vmss.Key()).SetLedger(nil)
	if !tr.MayRelease("ns/a", w.Key) {
		t.Error("the assignment may not be released, although MIC did not attach its identity")
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
		t.Fatalf("%v are being detached", got)
	}
	tr.SetDemands("ns/b", []Demand{x})
	if s, _ := tr.Status("ns/b", x.Key); s != Missing {
		t.Errorf("for a new pod of an identity being detached the status is %v", s)
	}
	tr.Machine(vmss.Key()).MarkUnknown()
	if s, _ := tr.Status("ns/a", y.Key); s != Unknown {
		t.Errorf("after an update with an unknown result the status is %v", s)
	}
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}, "y": {ID: "y"}}, false)
	if s, _ := tr.Status("ns/b", x.Key); s != Attached {
		t.Errorf("after an update that did not happen the status is %v", s)
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
		t.Errorf("requeued: %v", got.pods)
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
			t.Fatalf("after %d refusals the pause is %s, before it was %s", n, pause, last)
		}
		last = pause
	}
	if got := h.take(); !slices.Equal(got.pods, []string{"ns/a"}) {
		t.Errorf("requeued: %v", got.pods)
	}
	if _, message := tr.Status("ns/a", demandFor("x").Key); message != "no" || tr.SetAsideCount() != 1 {
		t.Errorf("the problem of the pod is %q; %d identities are set aside", message, tr.SetAsideCount())
	}
	tr.Machine(vmss.Key()).Observe(map[string]azure.Identity{"x": {ID: "x"}}, false)
	if tr.SetAsideCount() != 0 {
		t.Error("the identity is attached, and still set aside")
	}
}
