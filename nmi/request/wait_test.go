package request

import (
	"context"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/limit"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/token"
)

// standardBench is a bench in standard mode with a fake clock. Pod "x" is bound to identity x, and pod "both" to the
// identities x and y. At first no identity is assigned.
type standardBench struct {
	*bench
	t *testing.T

	stop func() // stops NMI

	mu     sync.Mutex        // guards facts and the fields below
	checks int               // how often requests read the facts
	waits  map[string]int    // by outcome
	labels map[string]string // of pods whose label changed, by name
}

func inStandardMode(t *testing.T, test func(t *testing.T, s *standardBench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &standardBench{bench: newBench(t), t: t, waits: map[string]int{}, labels: map[string]string{}}
		ending, stop := context.WithCancel(t.Context())
		s.stop = stop
		s.processor.Rules = identity.Rules{Mode: identity.Standard}
		s.processor.Cluster = s
		s.processor.Wait = &WaitConfig{
			MaxWait:       25 * time.Second,
			Notifier:      &cluster.Notifier{},
			Limiter:       limit.New(limit.MaxWaits, limit.MaxWaitsPerSource),
			Stopping:      ending.Done(),
			AssignedSince: func(*corev1.Pod, *identity.Identity) time.Time { return time.Time{} },
			Observe: func(outcome string, _ time.Duration) {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.waits[outcome]++
			},
		}
		test(t, s)
		synctest.Wait()
		inUse, sources := s.processor.Wait.Limiter.InUse()
		if n := s.processor.Wait.Notifier.SubscribedKeys(); n != 0 || inUse != 0 || sources != 0 {
			t.Errorf("no request waits, but %d keys are subscribed and %d waits of %d sources are counted", n, inUse, sources)
		}
	})
}

func (s *standardBench) Facts(*corev1.Pod) (identity.Facts, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.checks++
	return nmitest.CopyOf(s.facts), nil
}

func (s *standardBench) Latest(p *corev1.Pod) *corev1.Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	if label, changed := s.labels[p.Name]; changed {
		p = p.DeepCopy()
		p.Labels["aadpodidbinding"] = label
	}
	return p
}

// change changes the facts and notifies the subscribers of a key.
func (s *standardBench) change(about cluster.Key, change func(*identity.Facts)) {
	s.mu.Lock()
	change(&s.facts)
	s.mu.Unlock()
	s.processor.Wait.Notifier.Notify(about)
}

// assign sets the state of the assignment of an identity to a pod.
func (s *standardBench) assign(pod, name string, state identity.State, message string) {
	uid := map[string]string{"x": "1", "both": "2"}[pod]
	s.change(cluster.PodKey("ns", pod), func(f *identity.Facts) {
		var others []identity.Assignment
		for _, a := range f.Assignments {
			if a.PodName != pod || a.IdentityName != name {
				others = append(others, a)
			}
		}
		f.Assignments = append(others, identity.Assignment{IdentityNamespace: "ns", IdentityName: name, PodNamespace: "ns", PodName: pod, PodUID: uid, ResourceID: nmitest.ResourceID(name), State: state, Message: message})
	})
}

// response is the response to a request, with the time it took.
type response struct {
	status int
	body   map[string]string
	took   time.Duration
}

// begin sends a request in the background.
func (s *standardBench) begin(source, query string) <-chan response {
	done, start := make(chan response, 1), time.Now()
	go func() {
		status, body := s.ask(source, nmitest.TokenPath+query)
		done <- response{status, body, time.Since(start)}
	}()
	return done
}

func (s *standardBench) mustWait(requests ...<-chan response) {
	s.t.Helper()
	synctest.Wait()
	for _, r := range requests {
		select {
		case a := <-r:
			s.t.Fatalf("the request should still wait, but got the response %+v", a)
		default:
		}
	}
}

func (s *standardBench) expect(request <-chan response, status int, reason identity.Reason, took time.Duration) map[string]string {
	s.t.Helper()
	a := <-request
	if a.status != status || a.body["reason"] != string(reason) || a.took != took {
		s.t.Errorf("got %d %v after %s; want %d %s after %s", a.status, a.body, a.took, status, reason, took)
	}
	if retry := a.body["Retry-After"]; (status == 503) != (retry == "5") {
		s.t.Errorf("status %d with Retry-After %q", status, retry)
	}
	return a.body
}

func (s *standardBench) mustHaveOutcomes(want map[string]int) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !maps.Equal(s.waits, want) {
		s.t.Errorf("waits ended as %v; want %v", s.waits, want)
	}
}

func TestARequestWaitsUntilItsIdentityIsAssigned(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		r := s.begin("10.0.0.1", "")
		for _, state := range []identity.State{identity.StateLegacy, identity.StateCreated} {
			time.Sleep(time.Second)
			s.assign("x", "x", state, "")
			s.mustWait(r)
		}
		time.Sleep(10 * time.Second)
		s.assign("both", "x", identity.StateAssigned, "") // the assignment of another pod
		s.mustWait(r)
		s.assign("x", "x", identity.StateAssigned, "")
		if body := s.expect(r, 200, "", 12*time.Second); body["access_token"] != "token-of-"+nmitest.ClientX {
			t.Errorf("got %v", body)
		}
		s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
		s.mustHaveOutcomes(map[string]int{WaitAssigned: 1})
	})
}

func TestARequestWhoseIdentityIsNotAssignedInTimeMustRetry(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		body := s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
		if !strings.Contains(body["error_description"], "AzureIdentity ns/x") {
			t.Errorf("error_description is %q", body["error_description"])
		}
		s.mustHaveOutcomes(map[string]int{WaitTimeout: 1})
		s.processor.Wait.MaxWait = 0
		s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 0)
		s.mustHaveOutcomes(map[string]int{WaitTimeout: 1})
	})
}

func TestAWaitEndsWhenTheRequestIsNoLongerPending(t *testing.T) {
	for _, c := range []struct {
		name   string
		about  cluster.Key
		change func(s *standardBench, f *identity.Facts)
		status int
		reason identity.Reason
	}{
		{"the binding is deleted", cluster.BindingsKey("x"), func(_ *standardBench, f *identity.Facts) { f.Bindings = f.Bindings[1:] }, 400, identity.NoMatchingBinding},
		{"a second binding is created", cluster.BindingsKey("x"), func(_ *standardBench, f *identity.Facts) {
			f.Bindings = append(f.Bindings, identity.Binding{Namespace: "ns", Name: "b3", AzureIdentity: "y", Selector: "x"})
		}, 400, identity.MultipleIdentities},
		{"the identity is deleted", cluster.IdentitiesKey(), func(_ *standardBench, f *identity.Facts) { f.Identities = nil }, 400, identity.IdentityMissing},
		{"the identity becomes invalid", cluster.IdentitiesKey(), func(_ *standardBench, f *identity.Facts) { *f = nmitest.CopyOf(*f); f.Identities[0].ClientID = "me" }, 403, identity.IdentityInvalid},
		{"the pod is excepted", cluster.ExceptionsKey("ns"), func(_ *standardBench, f *identity.Facts) {
			f.Exceptions = []identity.Exception{{Namespace: "ns", PodLabels: map[string]string{"aadpodidbinding": "x"}}}
		}, 200, ""},
		{"the pod's label changes", cluster.PodKey("ns", "x"), func(s *standardBench, _ *identity.Facts) { s.labels["x"] = "nobody" }, 400, identity.NoMatchingBinding},
	} {
		t.Run(c.name, func(t *testing.T) {
			inStandardMode(t, func(t *testing.T, s *standardBench) {
				r := s.begin("10.0.0.1", "")
				time.Sleep(3 * time.Second)
				s.mustWait(r)
				s.change(c.about, func(f *identity.Facts) { c.change(s, f) })
				s.expect(r, c.status, c.reason, 3*time.Second)
				s.mustHaveOutcomes(map[string]int{map[bool]string{true: WaitAssigned, false: WaitRefused}[c.status == 200]: 1})
			})
		})
	}
}

func TestAWaitingRequestFollowsTheLabelOfItsPod(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.change(cluster.PodKey("ns", "x"), func(f *identity.Facts) {
			s.labels["x"] = "other"
			f.Bindings = append(f.Bindings, identity.Binding{Namespace: "ns", Name: "b3", AzureIdentity: "y", Selector: "other"})
		})
		s.mustWait(r)
		time.Sleep(time.Second)
		s.change(cluster.BindingsKey("other"), func(f *identity.Facts) { f.Bindings = nil })
		s.expect(r, 400, identity.NoMatchingBinding, 2*time.Second)
	})
}

func TestARequestWaitsForTheAssignmentOfAChangedIdentity(t *testing.T) {
	const other = "99999999-0000-0000-0000-000000000009"
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.assign("x", "x", identity.StateAssigned, "")
		s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
		var resource string
		s.change(cluster.IdentitiesKey(), func(f *identity.Facts) {
			*f = nmitest.CopyOf(*f)
			resource = f.Identities[0].ResourceID + "2"
			f.Identities[0].ClientID, f.Identities[0].ResourceID = other, resource
		})
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.mustWait(r)
		s.change(cluster.PodKey("ns", "x"), func(f *identity.Facts) {
			again := f.Assignments[0]
			again.ResourceID = strings.ToUpper(resource)
			f.Assignments = append(f.Assignments, again)
		})
		if body := s.expect(r, 200, "", time.Second); body["access_token"] != "token-of-"+other {
			t.Errorf("got %v", body)
		}
	})
}

func TestARequestWaitsOnlyBrieflyForAnIdentityThatAzureRefuses(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.assign("x", "x", identity.StateCreated, "grant MIC the role Managed Identity Operator")
		body := s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentFailed, maxFailedWait)
		if !strings.HasSuffix(body["error_description"], "grant MIC the role Managed Identity Operator") {
			t.Errorf("error_description is %q", body["error_description"])
		}
		// The refusal of Azure ends during the wait.
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.assign("x", "x", identity.StateCreated, "")
		time.Sleep(10 * time.Second)
		s.mustWait(r)
		s.assign("x", "x", identity.StateAssigned, "")
		s.expect(r, 200, "", 11*time.Second)
		// Azure refuses the identity during the wait.
		s.assign("x", "x", identity.StateCreated, "")
		r = s.begin("10.0.0.1", "")
		time.Sleep(10 * time.Second)
		s.assign("x", "x", identity.StateCreated, "no role")
		s.expect(r, 503, identity.AssignmentFailed, 10*time.Second+maxFailedWait)
		s.mustHaveOutcomes(map[string]int{WaitTimeout: 2, WaitAssigned: 1})
	})
}

func TestACachedTokenIsNotReturnedAfterTheAssignmentEnds(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		x, y := token.ManagedKey(nmitest.ClientX, "", "", "").Principal, token.ManagedKey(nmitest.ClientY, "", "", "").Principal
		for _, state := range []identity.State{identity.StateUnassigned, identity.StateCreated} {
			s.assign("x", "x", identity.StateAssigned, "")
			s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
			if !s.processor.MayRenew(s.podOf("10.0.0.1"), x) || s.processor.MayRenew(s.podOf("10.0.0.1"), y) {
				t.Error("MayRenew returns false for the pod's own identity, or true for another")
			}
			s.assign("x", "x", state, "")
			if s.processor.MayRenew(s.podOf("10.0.0.1"), x) {
				t.Errorf("the assignment is %s, but the token may be renewed", state)
			}
			s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
		}
	})
}

func TestAnAssignmentThatEndsDuringAFetchIsNoticed(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.assign("x", "x", identity.StateAssigned, "")
		s.azure.During = func() {
			s.azure.During = nil
			s.assign("x", "x", identity.StateUnassigned, "")
		}
		s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
	})
}

func TestWhenNMIStopsWaitingClientsMustRetry(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.mustWait(r)
		s.stop()
		s.expect(r, 503, identity.AssignmentPending, time.Second)
		s.mustHaveOutcomes(map[string]int{WaitTimeout: 1})
	})
}

func TestNoRequestWaitsWhileAWatchIsDisconnected(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.staleWatch = "azureassignedidentities"
		if a := <-s.begin("10.0.0.1", ""); a.status != 503 || a.body["reason"] != string(identity.NotReady) || a.took != 0 {
			t.Errorf("got %+v", a)
		}
		s.assign("x", "x", identity.StateAssigned, "")
		s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
	})
}

// Half of limit.MaxConnectionsPerSource stays free for requests that need not wait.
func TestAtMostHalfOfTheRequestsOfASourceWait(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		var waiting []<-chan response
		for range limit.MaxWaitsPerSource {
			waiting = append(waiting, s.begin("10.0.0.1", ""))
		}
		s.mustWait(waiting...)
		s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 0)
		another := s.begin("10.0.0.2", "&client_id="+nmitest.ClientY)
		s.mustWait(append(waiting, another)...)
		s.assign("x", "x", identity.StateAssigned, "")
		for _, r := range waiting {
			s.expect(r, 200, "", 0)
		}
		s.assign("both", "y", identity.StateAssigned, "")
		s.expect(another, 200, "", 0)
	})
	limiter := limit.New(limit.MaxWaits, limit.MaxWaitsPerSource)
	admitted := 0
	for i := range 200 {
		for range limit.MaxConnectionsPerSource {
			if limiter.Acquire(limit.Source{Address: addressOf(i)}) {
				admitted++
			}
		}
	}
	if admitted != limit.MaxWaits || admitted > limit.MaxConnections/2 {
		t.Errorf("the limiter admits %d waiting requests; want MaxWaits, and at most half of MaxConnections", admitted)
	}
}

func TestContinuousChangesOfIdentitiesDoNotLoadTheNode(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		r := s.begin("10.0.0.1", "")
		for range 10_000 {
			time.Sleep(time.Millisecond)
			s.change(cluster.IdentitiesKey(), func(*identity.Facts) {})
		}
		s.mustWait(r)
		if maxChecks := int(10*time.Second/recheckInterval) + 3; s.checks > maxChecks {
			t.Errorf("the waiting request was checked %d times, more than recheckInterval allows", s.checks)
		}
		s.assign("x", "x", identity.StateAssigned, "")
		s.expect(r, 200, "", 10*time.Second)
	})
}

// No token is requested of an identity that may not be attached yet.
func TestARequestByObjectIDWaitsForTheIdentitiesThatMayHaveIt(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.assign("both", "x", identity.StateAssigned, "")
		s.expect(s.begin("10.0.0.2", "&object_id=object-of-"+nmitest.ClientX), 200, "", 0)
		y, nobody := s.begin("10.0.0.2", "&object_id=object-of-"+nmitest.ClientY), s.begin("10.0.0.2", "&object_id=nobody")
		time.Sleep(time.Second)
		s.mustWait(y, nobody)
		for _, key := range s.azure.Requests {
			if key.ClientID == nmitest.ClientY {
				t.Error("a token of an unassigned identity was requested")
			}
		}
		s.assign("both", "y", identity.StateAssigned, "")
		s.expect(y, 200, "", time.Second)
		s.expect(nobody, 400, identity.IdentityNotBound, time.Second)
	})
}

func addressOf(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) }
