package request

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/limit"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/token"
)

// lateSource refuses all identities until knowsAt.
type lateSource struct {
	*nmitest.TokenSource
	knowsAt  time.Time
	refusals []time.Duration // when it refused, since start
	start    time.Time
	code     string
}

func (a *lateSource) Fetch(ctx context.Context, call token.Call) (token.Token, error) {
	if time.Now().Before(a.knowsAt) {
		a.Mu.Lock()
		defer a.Mu.Unlock()
		a.refusals = append(a.refusals, time.Since(a.start))
		return token.Token{}, &token.Error{Class: token.Denied, Status: 400, Code: a.code, Description: "Identity not found"}
	}
	return a.TokenSource.Fetch(ctx, call)
}

// late replaces the token source by one that first refuses all identities, and issues tokens once the time after has
// passed. It also makes AssignedSince say that each identity was assigned at one time: age before the call of late.
func (s *standardBench) late(after, age time.Duration) *lateSource {
	a := &lateSource{TokenSource: s.azure, start: time.Now(), knowsAt: time.Now().Add(after), code: "invalid_request"}
	c, err := token.NewCache(a, 100, func(string, token.Principal) bool { return true }, s.metrics)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	s.processor.Cache = c
	since := time.Now().Add(-age)
	s.processor.Wait.AssignedSince = func(*corev1.Pod, *identity.Identity) time.Time { return since }
	return a
}

func TestIMDSIsAskedAgainForAnIdentityThatItDoesNotKnowYet(t *testing.T) {
	for after, took := range map[time.Duration]time.Duration{500 * time.Millisecond: time.Second, 2 * time.Second: 3 * time.Second, 10 * time.Second: 12 * time.Second, 24 * time.Second: 25 * time.Second} {
		t.Run(after.String(), func(t *testing.T) {
			inStandardMode(t, func(t *testing.T, s *standardBench) {
				s.assign("x", "x", identity.StateAssigned, "")
				s.late(after, 0)
				s.expect(s.begin("10.0.0.1", ""), 200, "", took)
				s.mustHaveOutcomes(map[string]int{WaitAssigned: 1})
			})
		})
	}
}

func TestAnIdentityThatIMDSNeverKnowsIsRefusedAfterAMinute(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.assign("x", "x", identity.StateAssigned, "")
		s.late(time.Hour, 0)
		body := s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
		if !strings.Contains(body["detail"], "Identity not found") {
			t.Errorf("response %v", body)
		}
		s.mustHaveOutcomes(map[string]int{WaitTimeout: 1})
		time.Sleep(10 * time.Second)
		s.expect(s.begin("10.0.0.1", ""), 400, identity.UpstreamRefused, 25*time.Second) // until propagationTime ends
		s.expect(s.begin("10.0.0.1", ""), 400, identity.UpstreamRefused, 0)
	})
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.assign("x", "x", identity.StateAssigned, "")
		s.late(time.Hour, propagationTime)
		s.expect(s.begin("10.0.0.1", ""), 400, identity.UpstreamRefused, 0)
		s.mustHaveOutcomes(map[string]int{})
	})
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.assign("x", "x", identity.StateAssigned, "")
		s.late(time.Hour, 0).code = "invalid_resource"
		s.expect(s.begin("10.0.0.1", ""), 400, identity.UpstreamRefused, 0)
	})
}

func TestAWaitForIMDSEndsWhenTheBindingIsDeleted(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.assign("x", "x", identity.StateAssigned, "")
		s.late(time.Hour, 0)
		r := s.begin("10.0.0.1", "")
		time.Sleep(4 * time.Second)
		s.change(cluster.BindingsKey("x"), func(f *identity.Facts) { f.Bindings = nil })
		s.expect(r, 400, identity.NoMatchingBinding, 4*time.Second)
		s.mustHaveOutcomes(map[string]int{WaitRefused: 1})
	})
}

// A hundred requests that wait for the same token, with continuous notifications, cause as many requests to IMDS as one
// waiting request.
func TestRequestsThatWaitForIMDSShareTheirRequests(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.processor.Wait.Limiter = limit.New(2000, 2000)
		s.assign("x", "x", identity.StateAssigned, "")
		a := s.late(20*time.Second, 0)
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 50 * time.Millisecond)
				status, body := s.ask("10.0.0.1", nmitest.TokenPath)
				if status != 200 {
					t.Errorf("got %d %v, want 200", status, body)
				}
			})
		}
		for range 40 {
			time.Sleep(500 * time.Millisecond)
			s.change(cluster.PodKey("ns", "x"), func(*identity.Facts) {})
		}
		wg.Wait()
		for i := 1; i < len(a.refusals); i++ {
			if a.refusals[i]-a.refusals[i-1] < time.Second {
				t.Errorf("IMDS was asked at %s and again at %s, less than a second later", a.refusals[i-1], a.refusals[i])
			}
		}
		if len(a.refusals) < 8 {
			t.Errorf("IMDS was asked at %v, want at least 8 times", a.refusals)
		}
	})
}
