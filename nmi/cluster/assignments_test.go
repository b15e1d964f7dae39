package cluster

import (
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/nmitest"
)

func TestWhatIsKeptOfAnAssignmentIsWhatIsRead(t *testing.T) {
	i := &v1.AzureIdentity{ObjectMeta: metav1.ObjectMeta{Namespace: "b", Name: "x"}, Spec: v1.AzureIdentitySpec{ClientID: nmitest.ClientX, ResourceID: nmitest.ResourceID("x")}}
	o := &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p-x-1", Annotations: map[string]string{"a": "b"}, Labels: map[string]string{v1.NodeNameLabel: "node1"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "p", UID: "1"}}},
		Spec:   v1.AzureAssignedIdentitySpec{Pod: "p", PodNamespace: "a", NodeName: "node1", AzureIdentityRef: i.Copy()},
		Status: v1.AzureAssignedIdentityStatus{Status: v1.AssignmentAssigned},
	}
	trimmed, err := trim(o)
	if err != nil {
		t.Fatal(err)
	}
	again, _ := trim(trimmed)
	got := trimmed.(*Kept[assignment]).Value
	if again != trimmed || got.Assignment != identity.FromAzureAssignedIdentity(o) || time.Since(got.received) > time.Minute {
		t.Errorf("kept: %+v", got)
	}
	if keys, err := podOfAssignment(trimmed); err != nil || !slices.Equal(keys, []string{"a/p"}) {
		t.Errorf("found by %q, %v", keys, err)
	}
}

func TestATombstoneIsNewsToo(t *testing.T) {
	var w Watch
	told, stop := w.Notifier.Subscribe(PodKey("ns", "p"))
	defer stop()
	handler := w.notifyOnChange(func(o any) Key { return PodKey("ns", o.(*corev1.Pod).Name) })
	handler.OnDelete(cache.DeletedFinalStateUnknown{Key: "ns/p"}) // of which nothing is known
	handler.OnDelete(cache.DeletedFinalStateUnknown{Key: "ns/p", Obj: nmitest.Pod("p", "1")})
	select {
	case <-told:
	default:
		t.Error("nobody was told")
	}
	handler.OnUpdate(nmitest.Pod("p", "1"), nmitest.Pod("p", "1"))
	select {
	case <-told:
		t.Error("what has not changed was told")
	default:
	}
}
