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
			t.Logf("burst %d: %d calls to IMDS, the last answer after %s", i+1, calls, slowest)
			if calls != 1-i { // the second is served from the cache
				t.Errorf("burst %d needed %d calls", i+1, calls)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
