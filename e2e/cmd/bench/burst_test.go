package main

import (
	"testing"
)

func TestSimultaneousRequestsOf250PodsNeedOneCallToIMDS(t *testing.T) {
	err := withEnvironment(t.Context(), 10, func(r *environment) error {
		for i := range 2 {
			calls, slowest, err := r.burst(t.Context())
			if err != nil {
				return err
			}
			t.Logf("burst %d: %d token requests to IMDS, last response after %s", i+1, calls, slowest)
			if calls != 1-i { // NMI serves the second burst from its cache
				t.Errorf("burst %d: %d token requests to IMDS, want %d", i+1, calls, 1-i)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
