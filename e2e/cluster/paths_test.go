package cluster

import (
	"strings"
	"testing"
)

func TestInstanceIsEmptyOrANumberWithoutLeadingZeros(t *testing.T) {
	for value, valid := range map[string]bool{"": true, "1": true, "10": true, "999": true,
		"0": false, "01": false, "007": false, "1000": false, "-1": false, "x": false, "../x": false, " 1": false} {
		if err := checkInstance(value); (err == nil) != valid {
			t.Errorf("PODIDENTITY_CLUSTER=%q: error %v, want valid: %v", value, err, valid)
		}
	}
}

func TestOpenRefusesAnInvalidInstance(t *testing.T) {
	old := instance
	defer func() { instance = old }()
	instance = "../x"
	if _, err := Open(); err == nil || !strings.Contains(err.Error(), "PODIDENTITY_CLUSTER") {
		t.Errorf("Open: error %v, want one that names PODIDENTITY_CLUSTER", err)
	}
}

func TestUpCommandNamesTheInstance(t *testing.T) {
	for value, want := range map[string]string{"": "bin/cluster up", "2": "PODIDENTITY_CLUSTER=2 bin/cluster up"} {
		if got := upCommand(value); got != want {
			t.Errorf("instance %q: got %q, want %q", value, got, want)
		}
	}
}
