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

func TestATrimmedAssignmentHasOnlyTheFieldsThatNMIReads(t *testing.T) {
	i := &v1.AzureIdentity{ObjectMeta: metav1.ObjectMeta{Namespace: "b", Name: "x"}, Spec: v1.AzureIdentitySpec{ClientID: nmitest.ClientX, ResourceID: nmitest.ResourceID("x")}}
	o := &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p-x-1", Annotations: map[string]string{"a": "b"}, Labels: map[string]string{v1.NodeNameLabel: "node1"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "p", UID: "1"}}},
		Spec:   v1.AzureAssignedIdentitySpec{Pod: "p", PodNamespace: "a", NodeName: "node1", AzureIdentityRef: i.Copy()},
		Status: v1.AzureAssignedIdentityStatus{Status: v1.AssignmentAssigned},
	}
	result, err := trim(o)
	if err != nil {
		t.Fatal(err)
	}
	again, _ := trim(result)
	got := result.(*trimmed[assignment]).value
	if again != result || got.Assignment != identity.FromAzureAssignedIdentity(o) || time.Since(got.received) > time.Minute {
		t.Errorf("the trimmed assignment is %+v", got)
	}
	if keys, err := podOfAssignment(result); err != nil || !slices.Equal(keys, []string{"a/p"}) {
		t.Errorf("the assignment has the values %q, %v in the index byPod; want a/p", keys, err)
	}
}

func TestSubscribersAreNotifiedOfATombstone(t *testing.T) {
	var n Notifier
	changed, stop := n.Subscribe(PodKey("ns", "p"))
	defer stop()
	handler := notifyOnChange(&n, func(p *corev1.Pod) Key { return PodKey("ns", p.Name) })
	handler.OnDelete(cache.DeletedFinalStateUnknown{Key: "ns/p"}) // without a last known state
	handler.OnDelete(cache.DeletedFinalStateUnknown{Key: "ns/p", Obj: nmitest.Pod("p", "1")})
	select {
	case <-changed:
	default:
		t.Error("the subscriber was not notified of the deletion in the tombstone")
	}
	handler.OnUpdate(nmitest.Pod("p", "1"), nmitest.Pod("p", "1"))
	select {
	case <-changed:
		t.Error("the subscriber was notified of a pod that did not change")
	default:
	}
}
