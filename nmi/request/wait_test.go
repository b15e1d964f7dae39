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

// standard is a bench in standard mode, on a clock of its own: pod x is bound to identity x, pod both to x and y, and
// nothing is assigned.
type standard struct {
	*bench
	t *testing.T

	stop func() // tells NMI to end

	mu     sync.Mutex        // guards facts and what follows
	looks  int               // at the objects
	waits  map[string]int    // by outcome
	labels map[string]string // that pods have got since, by name
}

func inStandardMode(t *testing.T, test func(t *testing.T, s *standard)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &standard{bench: newBench(t), t: t, waits: map[string]int{}, labels: map[string]string{}}
		ending, stop := context.WithCancel(t.Context())
		s.stop = stop
		s.tokens.Rules = identity.Rules{Mode: identity.Standard}
		s.tokens.Cluster = s
		s.tokens.Wait = &WaitConfig{
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
		places, sources := s.tokens.Wait.Limiter.InUse()
		if n := s.tokens.Wait.Notifier.Subscribed(); n != 0 || places != 0 || sources != 0 {
			t.Errorf("nobody waits any more, and left are %d topics and %d places", n, places)
		}
	})
}

func (s *standard) Facts(*corev1.Pod) (identity.Facts, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.looks++
	return nmitest.CopyOf(s.facts), nil
}

func (s *standard) Latest(p *corev1.Pod) *corev1.Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	if label, changed := s.labels[p.Name]; changed {
		p = p.DeepCopy()
		p.Labels["aadpodidbinding"] = label
	}
	return p
}

// change changes the objects and tells the news of that.
func (s *standard) change(about cluster.Key, change func(*identity.Facts)) {
	s.mu.Lock()
	change(&s.facts)
	s.mu.Unlock()
	s.tokens.Wait.Notifier.Notify(about)
}

// assign makes the state of an identity's assignment to a pod what it is told.
func (s *standard) assign(pod, name string, state identity.State, message string) {
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

// answer is what a request got, and after what time.
type answer struct {
	status int
	body   map[string]string
	took   time.Duration
}

// begin sends a request that may be held.
func (s *standard) begin(source, query string) <-chan answer {
	done, start := make(chan answer, 1), time.Now()
	go func() {
		status, body := s.ask(source, nmitest.TokenPath+query)
		done <- answer{status, body, time.Since(start)}
	}()
	return done
}

func (s *standard) held(requests ...<-chan answer) {
	s.t.Helper()
	synctest.Wait()
	for _, r := range requests {
		select {
		case a := <-r:
			s.t.Fatalf("not held: %+v", a)
		default:
		}
	}
}

func (s *standard) expect(request <-chan answer, status int, reason identity.Reason, took time.Duration) map[string]string {
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

func (s *standard) waited(want map[string]int) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !maps.Equal(s.waits, want) {
		s.t.Errorf("waits ended as %v; want %v", s.waits, want)
	}
}

func TestARequestIsHeldUntilItsIdentityIsAssigned(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		r := s.begin("10.0.0.1", "")
		for _, state := range []identity.State{identity.StateLegacy, identity.StateCreated} {
			time.Sleep(time.Second)
			s.assign("x", "x", state, "")
			s.held(r)
		}
		time.Sleep(10 * time.Second)
		s.assign("both", "x", identity.StateAssigned, "") // another pod's
		s.held(r)
		s.assign("x", "x", identity.StateAssigned, "")
		if body := s.expect(r, 200, "", 12*time.Second); body["access_token"] != "token-of-"+nmitest.ClientX {
			t.Errorf("got %v", body)
		}
		s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
		s.waited(map[string]int{WaitAssigned: 1})
	})
}

func TestARequestThatWaitsInVainIsToComeAgain(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		body := s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
		if !strings.Contains(body["error_description"], "AzureIdentity ns/x") {
			t.Errorf("it is told %q", body["error_description"])
		}
		s.waited(map[string]int{WaitTimeout: 1})
		s.tokens.Wait.MaxWait = 0
		s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 0)
		s.waited(map[string]int{WaitTimeout: 1})
	})
}

func TestAWaitEndsAsSoonAsThereIsNothingToWaitFor(t *testing.T) {
	for _, c := range []struct {
		name   string
		about  cluster.Key
		change func(s *standard, f *identity.Facts)
		status int
		reason identity.Reason
	}{
		{"the binding goes", cluster.BindingsKey("x"), func(_ *standard, f *identity.Facts) { f.Bindings = f.Bindings[1:] }, 400, identity.NoMatchingBinding},
		{"a second binding comes", cluster.BindingsKey("x"), func(_ *standard, f *identity.Facts) {
			f.Bindings = append(f.Bindings, identity.Binding{Namespace: "ns", Name: "b3", AzureIdentity: "y", Selector: "x"})
		}, 400, identity.MultipleIdentities},
		{"the identity goes", cluster.IdentitiesKey(), func(_ *standard, f *identity.Facts) { f.Identities = nil }, 400, identity.IdentityMissing},
		{"the identity is spoiled", cluster.IdentitiesKey(), func(_ *standard, f *identity.Facts) { *f = nmitest.CopyOf(*f); f.Identities[0].ClientID = "me" }, 403, identity.IdentityInvalid},
		{"the pod is excepted", cluster.ExceptionsKey("ns"), func(_ *standard, f *identity.Facts) {
			f.Exceptions = []identity.Exception{{Namespace: "ns", PodLabels: map[string]string{"aadpodidbinding": "x"}}}
		}, 200, ""},
		{"the pod's label changes", cluster.PodKey("ns", "x"), func(s *standard, _ *identity.Facts) { s.labels["x"] = "nobody" }, 400, identity.NoMatchingBinding},
	} {
		t.Run(c.name, func(t *testing.T) {
			inStandardMode(t, func(t *testing.T, s *standard) {
				r := s.begin("10.0.0.1", "")
				time.Sleep(3 * time.Second)
				s.held(r)
				s.change(c.about, func(f *identity.Facts) { c.change(s, f) })
				s.expect(r, c.status, c.reason, 3*time.Second)
				s.waited(map[string]int{map[bool]string{true: WaitAssigned, false: WaitRefused}[c.status == 200]: 1})
			})
		})
	}
}

func TestNewsOfWhatThePodIsNowLabelledReachIt(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.change(cluster.PodKey("ns", "x"), func(f *identity.Facts) {
			s.labels["x"] = "other"
			f.Bindings = append(f.Bindings, identity.Binding{Namespace: "ns", Name: "b3", AzureIdentity: "y", Selector: "other"})
		})
		s.held(r)
		time.Sleep(time.Second)
		s.change(cluster.BindingsKey("other"), func(f *identity.Facts) { f.Bindings = nil })
		s.expect(r, 400, identity.NoMatchingBinding, 2*time.Second)
	})
}

func TestAnEditedIdentityIsWaitedForAnew(t *testing.T) {
	const other = "99999999-0000-0000-0000-000000000009"
	inStandardMode(t, func(t *testing.T, s *standard) {
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
		s.held(r)
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

func TestAnIdentityThatAzureRefusesIsNotWaitedForLong(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		s.assign("x", "x", identity.StateCreated, "grant MIC the role Managed Identity Operator")
		body := s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentFailed, maxFailedWait)
		if !strings.HasSuffix(body["error_description"], "grant MIC the role Managed Identity Operator") {
			t.Errorf("it is told %q", body["error_description"])
		}
		// Put right meanwhile.
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.assign("x", "x", identity.StateCreated, "")
		time.Sleep(10 * time.Second)
		s.held(r)
		s.assign("x", "x", identity.StateAssigned, "")
		s.expect(r, 200, "", 11*time.Second)
		// Refused while it waits.
		s.assign("x", "x", identity.StateCreated, "")
		r = s.begin("10.0.0.1", "")
		time.Sleep(10 * time.Second)
		s.assign("x", "x", identity.StateCreated, "no role")
		s.expect(r, 503, identity.AssignmentFailed, 10*time.Second+maxFailedWait)
		s.waited(map[string]int{WaitTimeout: 2, WaitAssigned: 1})
	})
}

func TestATokenInTheCacheIsOfNoUseOnceTheAssignmentHasGone(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		x, y := token.ManagedKey(nmitest.ClientX, "", "", "").Principal, token.ManagedKey(nmitest.ClientY, "", "", "").Principal
		for _, state := range []identity.State{identity.StateUnassigned, identity.StateCreated} {
			s.assign("x", "x", identity.StateAssigned, "")
			s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
			if !s.tokens.MayRenew(s.podOf("10.0.0.1"), x) || s.tokens.MayRenew(s.podOf("10.0.0.1"), y) {
				t.Error("its token, and no other, is worth a renewal")
			}
			s.assign("x", "x", state, "")
			if s.tokens.MayRenew(s.podOf("10.0.0.1"), x) {
				t.Errorf("%s, and its token is renewed", state)
			}
			s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
		}
	})
}

func TestAnAssignmentThatGoesDuringAFetchCounts(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		s.assign("x", "x", identity.StateAssigned, "")
		s.azure.During = func() {
			s.azure.During = nil
			s.assign("x", "x", identity.StateUnassigned, "")
		}
		s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
	})
}

func TestWhenNMIStopsWhoWaitsIsToComeAgain(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.held(r)
		s.stop()
		s.expect(r, 503, identity.AssignmentPending, time.Second)
		s.waited(map[string]int{WaitTimeout: 1})
	})
}

func TestWhileAWatchHearsNothingNobodyIsHeld(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		s.staleWatch = "azureassignedidentities"
		if a := <-s.begin("10.0.0.1", ""); a.status != 503 || a.body["reason"] != string(identity.NotReady) || a.took != 0 {
			t.Errorf("got %+v", a)
		}
		s.assign("x", "x", identity.StateAssigned, "")
		s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
	})
}

// The rest of the connections is for those who have nothing to wait for.
func TestOneSourceHasHalfOfItsRequestsHeldAtMost(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		var held []<-chan answer
		for range limit.MaxWaitsPerSource {
			held = append(held, s.begin("10.0.0.1", ""))
		}
		s.held(held...)
		s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 0)
		another := s.begin("10.0.0.2", "&client_id="+nmitest.ClientY)
		s.held(append(held, another)...)
		s.assign("x", "x", identity.StateAssigned, "")
		for _, r := range held {
			s.expect(r, 200, "", 0)
		}
		s.assign("both", "y", identity.StateAssigned, "")
		s.expect(another, 200, "", 0)
	})
	limiter := limit.New(limit.MaxWaits, limit.MaxWaitsPerSource)
	most := 0
	for i := range 200 {
		for range limit.MaxConnectionsPerSource {
			if limiter.Acquire(addressOf(i)) {
				most++
			}
		}
	}
	if most != limit.MaxWaits || most > limit.MaxConnections/2 {
		t.Errorf("%d requests wait at the same time", most)
	}
}

func TestWhoEditsIdentitiesAllTheTimeDoesNotKeepTheNodeBusy(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		r := s.begin("10.0.0.1", "")
		for range 10_000 {
			time.Sleep(time.Millisecond)
			s.change(cluster.IdentitiesKey(), func(*identity.Facts) {})
		}
		s.held(r)
		if most := int(10*time.Second/recheckInterval) + 3; s.looks > most {
			t.Errorf("%d looks", s.looks)
		}
		s.assign("x", "x", identity.StateAssigned, "")
		s.expect(r, 200, "", 10*time.Second)
	})
}

// No token is asked for of what may not be attached to the machine yet.
func TestARequestByObjectIDWaitsForTheIdentitiesThatMayBeMeant(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		s.assign("both", "x", identity.StateAssigned, "")
		s.expect(s.begin("10.0.0.2", "&object_id=object-of-"+nmitest.ClientX), 200, "", 0)
		y, nobody := s.begin("10.0.0.2", "&object_id=object-of-"+nmitest.ClientY), s.begin("10.0.0.2", "&object_id=nobody")
		time.Sleep(time.Second)
		s.held(y, nobody)
		for _, key := range s.azure.Asked {
			if key.ClientID == nmitest.ClientY {
				t.Error("a token was asked for that nobody may have yet")
			}
		}
		s.assign("both", "y", identity.StateAssigned, "")
		s.expect(y, 200, "", time.Second)
		s.expect(nobody, 400, identity.IdentityNotBound, time.Second)
	})
}

func addressOf(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) }
