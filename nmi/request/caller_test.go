package request

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/links"
	"github.com/podidentity/podidentity/nmi/nmitest"
)

func TestTheCgroupComesBeforeTheAddress(t *testing.T) {
	address := netip.MustParseAddr
	for _, c := range []struct {
		name         string
		caller       Caller
		verification PodVerification
		pod          string // "" if refused
		verified     Verification
		reason       identity.Reason
		moved        bool
	}{
		{"both agree", Caller{Address: address("10.0.0.1"), PodUID: "1"}, VerifyAuto, "x", VerifiedByCgroup, "", false},
		{"the address of another pod", Caller{Address: address("10.0.0.2"), PodUID: "1"}, VerifyAuto, "x", VerifiedByCgroup, "", true},
		{"an address of nobody", Caller{Address: address("10.0.0.99"), PodUID: "1"}, VerifyAuto, "x", VerifiedByCgroup, "", true},
		{"an address of two pods", Caller{Address: address("10.0.0.6"), PodUID: "1"}, VerifyRequired, "x", VerifiedByCgroup, "", true},
		{"an unknown UID, the address of a pod", Caller{Address: address("10.0.0.1"), PodUID: "99"}, VerifyAuto, "", VerifiedByCgroup, identity.PodUnknown, false},
		{"no cgroup", Caller{Address: address("10.0.0.1")}, VerifyAuto, "x", VerifiedByAddress, "", false},
		{"no cgroup, required", Caller{Address: address("10.0.0.1")}, VerifyRequired, "", "", identity.PodUnverified, false},
		{"off", Caller{Address: address("10.0.0.1"), PodUID: "2"}, VerifyOff, "x", "", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			moved := false
			b.processor.PodVerification = c.verification
			b.processor.OnMoved = func(caller Caller, pod *corev1.Pod) {
				moved = true
				if caller != c.caller || pod.Name != c.pod {
					t.Errorf("reported %+v as %s", caller, pod.Name)
				}
			}
			r := httptest.NewRequest(http.MethodGet, nmitest.TokenPath, nil)
			r.Header.Set("Metadata", "true")
			req, refusal := metadata.Parse(r, metadata.Rules{})
			if refusal != nil {
				t.Fatal(refusal)
			}
			rec := &Record{}
			tokens, refusal := b.processor.ForCaller(t.Context(), rec, c.caller, req)
			if rec.Verified != c.verified || moved != c.moved {
				t.Errorf("verified by %q, moved %t; want %q, %t", rec.Verified, moved, c.verified, c.moved)
			}
			switch {
			case c.pod == "" && (refusal == nil || refusal.Reason != c.reason):
				t.Errorf("got %v, %v; want a refusal because of %s", tokens, refusal, c.reason)
			case c.pod != "" && (refusal != nil || rec.Pod.Name != c.pod):
				t.Errorf("got %v for %v; want pod %s", refusal, rec.Pod, c.pod)
			}
		})
	}
}

// confirmer confirms the addresses of pods by name, and records the claims.
type confirmer struct {
	refuse func(links.Claim) links.Cause
	claims []links.Claim
}

func (c *confirmer) Confirm(claim links.Claim) *links.Unconfirmed {
	c.claims = append(c.claims, claim)
	if cause := c.refuse(claim); cause != "" {
		return &links.Unconfirmed{Cause: cause}
	}
	return nil
}

func TestAnAddressIsConfirmedBeforeAndAfterTheTokenIsFetched(t *testing.T) {
	moved := false // while the token is fetched
	for _, c := range []struct {
		name         string
		caller       Caller
		verification PodVerification
		cause        func(links.Claim) links.Cause
		refused      bool
		claims       int
	}{
		{"confirmed", Caller{Address: netip.MustParseAddr("10.0.0.1"), Interface: 7}, VerifyAuto, func(links.Claim) links.Cause { return "" }, false, 2},
		{"not confirmed", Caller{Address: netip.MustParseAddr("10.0.0.1"), Interface: 7}, VerifyAuto, func(links.Claim) links.Cause { return links.PodTooOld }, true, -1},
		{"moved meanwhile", Caller{Address: netip.MustParseAddr("10.0.0.1"), Interface: 7}, VerifyAuto, func(links.Claim) links.Cause {
			return map[bool]links.Cause{true: links.NoLink}[moved]
		}, true, 2},
		{"off", Caller{Address: netip.MustParseAddr("10.0.0.1")}, VerifyOff, func(links.Claim) links.Cause { return links.PodTooOld }, false, 0},
		{"by cgroup", Caller{Address: netip.MustParseAddr("10.0.0.1"), PodUID: "1"}, VerifyAuto, func(links.Claim) links.Cause { return links.PodTooOld }, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			moved = false
			b.azure.During = func() { moved = true }
			confirmer := &confirmer{refuse: c.cause}
			b.processor.PodVerification, b.processor.Confirmer = c.verification, confirmer
			r := httptest.NewRequest(http.MethodGet, nmitest.TokenPath, nil)
			r.Header.Set("Metadata", "true")
			req, refusal := metadata.Parse(r, metadata.Rules{})
			if refusal != nil {
				t.Fatal(refusal)
			}
			tokens, refusal := b.processor.ForCaller(t.Context(), &Record{}, c.caller, req)
			switch {
			case c.refused && (tokens != nil || refusal == nil || refusal.Reason != identity.PodUnconfirmed || refusal.Status != http.StatusServiceUnavailable):
				t.Errorf("got %v, %v; want a refusal", tokens, refusal)
			case !c.refused && refusal != nil:
				t.Error(refusal)
			case c.claims >= 0 && len(confirmer.claims) != c.claims:
				t.Errorf("%d confirmations, want %d", len(confirmer.claims), c.claims)
			}
			for _, claim := range confirmer.claims {
				if claim.UID != "1" || claim.Address != c.caller.Address || claim.Interface != 7 {
					t.Errorf("claimed %+v", claim)
				}
			}
		})
	}
}
