package cluster

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// assignmentObject is an AzureAssignedIdentity of the pod ns/web.
func assignmentObject(name, version string, state v1.AssignmentState) *v1.AzureAssignedIdentity {
	return &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, ResourceVersion: version},
		Spec:       v1.AzureAssignedIdentitySpec{Pod: "web", PodNamespace: "ns"},
		Status:     v1.AzureAssignedIdentityStatus{Status: state},
	}
}

func TestOwnWritesCountUntilTheWatchDeliversThemOrANewerVersion(t *testing.T) {
	c, err := New(&rest.RESTClient{}, &rest.RESTClient{}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	store := func(o *v1.AzureAssignedIdentity) {
		t.Helper()
		a := trimAssignment(o)
		if err := c.assignments.GetIndexer().Update(a); err != nil {
			t.Fatal(err)
		}
		c.own.observe(a, false)
	}
	expect := func(when string, states ...v1.AssignmentState) {
		t.Helper()
		got := c.AssignmentsOf("ns/web")
		if len(got) != len(states) {
			t.Fatalf("%s there are %d assignments, want %d", when, len(got), len(states))
		}
		for i, s := range states {
			if got[i].State != s {
				t.Errorf("%s assignment %d is %q, want %q", when, i, got[i].State, s)
			}
		}
	}
	c.recordWrite(assignmentObject("a", "10", ""))
	expect("after an own creation", "")
	c.recordWrite(assignmentObject("a", "12", v1.AssignmentAssigned))
	expect("after an own update", v1.AssignmentAssigned)
	store(assignmentObject("a", "10", ""))
	expect("when the watch delivers the creation", v1.AssignmentAssigned)
	store(assignmentObject("a", "12", v1.AssignmentAssigned))
	store(assignmentObject("a", "9", v1.AssignmentCreated)) // a watch never goes back to an older version; here it shows that the ownWrite was dropped
	expect("when the watch has delivered the update", v1.AssignmentCreated)
	store(assignmentObject("a", "20", v1.AssignmentUnassigned))
	c.recordWrite(assignmentObject("a", "15", v1.AssignmentAssigned))
	expect("after a write that is older than what the watch delivered", v1.AssignmentUnassigned)
	c.recordWrite(assignmentObject("b", "30", v1.AssignmentAssigned))
	deleted := trimAssignment(assignmentObject("b", "31", v1.AssignmentAssigned))
	c.own.observe(deleted, true)
	expect("after the deletion of another", v1.AssignmentUnassigned)
	if len(c.own.byPod) != 0 {
		t.Errorf("the watch has delivered all writes, but ownWrites still has %v", c.own.byPod)
	}
}
