package ledger

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/podidentity/podidentity/mic/azure"
)

func TestAnUpdateIsRecordedBeforeItIsSentAndEndedByWhatTheMachineHas(t *testing.T) {
	before := Entries{Machine: machineID, Attached: map[string]string{"/a": "/A", "/c": "/C"}}
	now := time.Now()
	during := before.Begin(now, []string{"/B", "/D"}, []string{"/A"})
	want := Entries{Machine: machineID, Attached: map[string]string{"/a": "/A", "/b": "/B", "/c": "/C", "/d": "/D"},
		Update: &Update{Started: now.Round(0), Add: []string{"/B", "/D"}, Remove: []string{"/A"}}}
	if diff := cmp.Diff(want, during); diff != "" {
		t.Errorf("during the update (-want +got):\n%s", diff)
	}
	has := func(ids ...string) map[string]azure.Identity {
		m := map[string]azure.Identity{}
		for _, id := range ids {
			m[azure.Fold(id)] = azure.Identity{ID: id}
		}
		return m
	}
	for name, c := range map[string]struct {
		machine map[string]azure.Identity
		want    map[string]string
	}{
		"all of it happened":               {has("/B", "/C", "/D"), map[string]string{"/b": "/B", "/c": "/C", "/d": "/D"}},
		"a part of it happened":            {has("/A", "/B", "/C"), map[string]string{"/a": "/A", "/b": "/B", "/c": "/C"}},
		"nothing happened":                 {has("/A", "/C"), map[string]string{"/a": "/A", "/c": "/C"}},
		"somebody else detached something": {has("/B"), map[string]string{"/b": "/B", "/c": "/C"}}, // /C was not in the update
	} {
		if diff := cmp.Diff(Entries{Machine: machineID, Attached: c.want}, during.End(c.machine)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if len(before.Attached) != 2 || during.Update == nil {
		t.Error("Begin changed the entries before it, or End changed the entries during the update")
	}
}

func TestEntriesAreTheSameOnlyWithoutAnUpdate(t *testing.T) {
	e := Entries{Machine: machineID, Attached: map[string]string{"/a": "/A"}}
	for name, c := range map[string]struct {
		other Entries
		want  bool
	}{
		"a clone":                    {e.Clone(), true},
		"more":                       {e.With(map[string]string{"/b": "/B"}), false},
		"fewer":                      {e.Without([]string{"/a"}), false},
		"fewer of what is not there": {e.Without([]string{"/x"}), true},
		"an update in progress":      {e.Begin(time.Now(), nil, nil), false},
	} {
		if got := e.Same(c.other); got != c.want {
			t.Errorf("%s: Same returned %t", name, got)
		}
	}
}

func TestAnAppliedUpdateChangesACopyOfTheState(t *testing.T) {
	state := azure.State{Identities: map[string]azure.Identity{"/a": {ID: "/A"}, "/b": {ID: "/B"}}}
	got := (&Update{Add: []string{"/C"}, Remove: []string{"/A"}}).Applied(state)
	want := map[string]azure.Identity{"/b": {ID: "/B"}, "/c": {ID: "/C"}}
	if diff := cmp.Diff(want, got.Identities); diff != "" || len(state.Identities) != 2 {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := (&Update{Add: []string{"/C"}}).Applied(azure.State{}); len(got.Identities) != 1 {
		t.Errorf("for a machine without identities Applied returns %v, want one identity", got.Identities)
	}
}
