package main

import (
	"testing"
)

// maxSecretCalls is the greatest number of requests with which NMI starts to watch a Secret. Normally this is one
// request: a watch that begins with the current state. If the API server rejects this watch, NMI then sends a list
// request and an ordinary watch request: three in all.
const maxSecretCalls = 3

func TestFirstTokenOfAnIdentityNeedsOnlyTheNecessaryCalls(t *testing.T) {
	want := map[string]calls{
		managed:     {imds: 1},
		secret:      {documents: 1, tokens: 1},
		certificate: {documents: 1, tokens: 1},
		federated:   {documents: 1, tokens: 1, assertions: 1},
	}
	const n = 3
	err := withEnvironment(t.Context(), 10, func(r *environment) error {
		all, err := r.cold(t.Context(), n)
		if err != nil {
			return err
		}
		for _, source := range sources {
			if len(all[source]) != n {
				t.Errorf("%s: %d first tokens, want %d", source, len(all[source]), n)
			}
			for _, f := range all[source] {
				t.Logf("%s: %s, %+v", source, f.took, f.cost)
				got := f.cost
				if source == secret || source == certificate {
					if got.secrets < 1 || got.secrets > maxSecretCalls {
						t.Errorf("%s: %d requests for Secrets, want 1 to %d", source, got.secrets, maxSecretCalls)
					}
					got.secrets = 0
				}
				if got != want[source] {
					t.Errorf("%s: %+v calls, want %+v", source, got, want[source])
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
