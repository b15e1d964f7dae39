package nmi

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/telemetry"
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
		s.tokens.rules = identity.Rules{Mode: identity.Standard}
		s.tokens.facts = func(*corev1.Pod) (identity.Facts, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.looks++
			return copyOf(s.facts), nil
		}
		s.tokens.latest = func(p *corev1.Pod) *corev1.Pod {
			s.mu.Lock()
			defer s.mu.Unlock()
			if label, changed := s.labels[p.Name]; changed {
				p = p.DeepCopy()
				p.Labels["aadpodidbinding"] = label
			}
			return p
		}
		s.tokens.waiting = &waiting{
			most:          25 * time.Second,
			news:          &news{},
			places:        newPlaces(maxWaiting, maxWaitingPerSource),
			ending:        ending.Done(),
			assignedSince: func(*corev1.Pod, *identity.Identity) time.Time { return time.Time{} },
			observe: func(outcome string, _ time.Duration) {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.waits[outcome]++
			},
		}
		test(t, s)
		synctest.Wait()
		if w := s.tokens.waiting; len(w.news.readers) != 0 || w.places.taken != 0 || len(w.places.from) != 0 {
			t.Errorf("nobody waits any more, and left are %v and %d places", w.news.readers, w.places.taken)
		}
	})
}

// change changes the objects and tells the news of that.
func (s *standard) change(about topic, change func(*identity.Facts)) {
	s.mu.Lock()
	change(&s.facts)
	s.mu.Unlock()
	s.tokens.waiting.news.tell(about)
}

// assign makes the state of an identity's assignment to a pod what it is told.
func (s *standard) assign(pod, name string, state identity.State, message string) {
	uid := map[string]string{"x": "1", "both": "2"}[pod]
	s.change(topic{ofPod, "ns/" + pod}, func(f *identity.Facts) {
		var others []identity.Assignment
		for _, a := range f.Assignments {
			if a.PodName != pod || a.IdentityName != name {
				others = append(others, a)
			}
		}
		f.Assignments = append(others, identity.Assignment{IdentityNamespace: "ns", IdentityName: name, PodNamespace: "ns", PodName: pod, PodUID: uid, ResourceID: resourceID(name), State: state, Message: message})
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
		status, body := s.ask(source, getPath+query)
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
		if body := s.expect(r, 200, "", 12*time.Second); body["access_token"] != "token-of-"+clientX {
			t.Errorf("got %v", body)
		}
		s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
		s.waited(map[string]int{waitAssigned: 1})
	})
}

func TestARequestThatWaitsInVainIsToComeAgain(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		body := s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
		if !strings.Contains(body["error_description"], "AzureIdentity ns/x") {
			t.Errorf("it is told %q", body["error_description"])
		}
		s.waited(map[string]int{waitTimeout: 1})
		s.tokens.waiting.most = 0
		s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 0)
		s.waited(map[string]int{waitTimeout: 1})
	})
}

func TestAWaitEndsAsSoonAsThereIsNothingToWaitFor(t *testing.T) {
	for _, c := range []struct {
		name   string
		about  topic
		change func(s *standard, f *identity.Facts)
		status int
		reason identity.Reason
	}{
		{"the binding goes", topic{ofBindings, "x"}, func(_ *standard, f *identity.Facts) { f.Bindings = f.Bindings[1:] }, 400, identity.NoMatchingBinding},
		{"a second binding comes", topic{ofBindings, "x"}, func(_ *standard, f *identity.Facts) {
			f.Bindings = append(f.Bindings, identity.Binding{Namespace: "ns", Name: "b3", AzureIdentity: "y", Selector: "x"})
		}, 400, identity.MultipleIdentities},
		{"the identity goes", topic{ofIdentities, ""}, func(_ *standard, f *identity.Facts) { f.Identities = nil }, 400, identity.IdentityMissing},
		{"the identity is spoiled", topic{ofIdentities, ""}, func(_ *standard, f *identity.Facts) { *f = copyOf(*f); f.Identities[0].ClientID = "me" }, 403, identity.IdentityInvalid},
		{"the pod is excepted", topic{ofExceptions, "ns"}, func(_ *standard, f *identity.Facts) {
			f.Exceptions = []identity.Exception{{Namespace: "ns", PodLabels: map[string]string{"aadpodidbinding": "x"}}}
		}, 200, ""},
		{"the pod's label changes", topic{ofPod, "ns/x"}, func(s *standard, _ *identity.Facts) { s.labels["x"] = "nobody" }, 400, identity.NoMatchingBinding},
	} {
		t.Run(c.name, func(t *testing.T) {
			inStandardMode(t, func(t *testing.T, s *standard) {
				r := s.begin("10.0.0.1", "")
				time.Sleep(3 * time.Second)
				s.held(r)
				s.change(c.about, func(f *identity.Facts) { c.change(s, f) })
				s.expect(r, c.status, c.reason, 3*time.Second)
				s.waited(map[string]int{map[bool]string{true: waitAssigned, false: waitRefused}[c.status == 200]: 1})
			})
		})
	}
}

func TestNewsOfWhatThePodIsNowLabelledReachIt(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.change(topic{ofPod, "ns/x"}, func(f *identity.Facts) {
			s.labels["x"] = "other"
			f.Bindings = append(f.Bindings, identity.Binding{Namespace: "ns", Name: "b3", AzureIdentity: "y", Selector: "other"})
		})
		s.held(r)
		time.Sleep(time.Second)
		s.change(topic{ofBindings, "other"}, func(f *identity.Facts) { f.Bindings = nil })
		s.expect(r, 400, identity.NoMatchingBinding, 2*time.Second)
	})
}

func TestAnEditedIdentityIsWaitedForAnew(t *testing.T) {
	const other = "99999999-0000-0000-0000-000000000009"
	inStandardMode(t, func(t *testing.T, s *standard) {
		s.assign("x", "x", identity.StateAssigned, "")
		s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
		var resource string
		s.change(topic{ofIdentities, ""}, func(f *identity.Facts) {
			*f = copyOf(*f)
			resource = f.Identities[0].ResourceID + "2"
			f.Identities[0].ClientID, f.Identities[0].ResourceID = other, resource
		})
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.held(r)
		s.change(topic{ofPod, "ns/x"}, func(f *identity.Facts) {
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
		body := s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentFailed, failedWait)
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
		s.expect(r, 503, identity.AssignmentFailed, 10*time.Second+failedWait)
		s.waited(map[string]int{waitTimeout: 2, waitAssigned: 1})
	})
}

func TestATokenInTheCacheIsOfNoUseOnceTheAssignmentHasGone(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		x, y := token.ManagedKey(clientX, "", "", "").Principal, token.ManagedKey(clientY, "", "", "").Principal
		for _, state := range []identity.State{identity.StateUnassigned, identity.StateCreated} {
			s.assign("x", "x", identity.StateAssigned, "")
			s.expect(s.begin("10.0.0.1", ""), 200, "", 0)
			if !s.tokens.allowed(s.podOf("10.0.0.1"), x) || s.tokens.allowed(s.podOf("10.0.0.1"), y) {
				t.Error("its token, and no other, is worth a renewal")
			}
			s.assign("x", "x", state, "")
			if s.tokens.allowed(s.podOf("10.0.0.1"), x) {
				t.Errorf("%s, and its token is renewed", state)
			}
			s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
		}
	})
}

func TestAnAssignmentThatGoesDuringAFetchCounts(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		s.assign("x", "x", identity.StateAssigned, "")
		s.azure.during = func() {
			s.azure.during = nil
			s.assign("x", "x", identity.StateUnassigned, "")
		}
		s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 25*time.Second)
	})
}

func TestAClientThatLeavesWaitsNoLonger(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		ctx, leave := context.WithCancel(t.Context())
		done := make(chan *httptest.ResponseRecorder)
		go func() {
			r := httptest.NewRequest(http.MethodGet, getPath, nil).WithContext(ctx)
			r.RemoteAddr = "10.0.0.1:1"
			r.Header.Set("Metadata", "true")
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			done <- w
		}()
		time.Sleep(time.Second)
		leave()
		start := time.Now()
		if w := <-done; w.Body.Len() != 0 || time.Since(start) != 0 {
			t.Errorf("answered %s after %s", w.Body, time.Since(start))
		}
		s.waited(map[string]int{waitGone: 1})
	})
}

func TestWhenNMIStopsWhoWaitsIsToComeAgain(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		r := s.begin("10.0.0.1", "")
		time.Sleep(time.Second)
		s.held(r)
		s.stop()
		s.expect(r, 503, identity.AssignmentPending, time.Second)
		s.waited(map[string]int{waitTimeout: 1})
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
		for range maxWaitingPerSource {
			held = append(held, s.begin("10.0.0.1", ""))
		}
		s.held(held...)
		s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 0)
		another := s.begin("10.0.0.2", "&client_id="+clientY)
		s.held(append(held, another)...)
		s.assign("x", "x", identity.StateAssigned, "")
		for _, r := range held {
			s.expect(r, 200, "", 0)
		}
		s.assign("both", "y", identity.StateAssigned, "")
		s.expect(another, 200, "", 0)
	})
	places := newPlaces(maxWaiting, maxWaitingPerSource)
	most := 0
	for i := range 200 {
		for range maxConnectionsPerSource {
			if places.take(addressOf(i)) {
				most++
			}
		}
	}
	if most != maxWaiting || most > maxConnections/2 {
		t.Errorf("%d requests wait at the same time", most)
	}
}

func TestWhoEditsIdentitiesAllTheTimeDoesNotKeepTheNodeBusy(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		r := s.begin("10.0.0.1", "")
		for range 10_000 {
			time.Sleep(time.Millisecond)
			s.change(topic{ofIdentities, ""}, func(*identity.Facts) {})
		}
		s.held(r)
		if most := int(10*time.Second/lookEvery) + 3; s.looks > most {
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
		s.expect(s.begin("10.0.0.2", "&object_id=object-of-"+clientX), 200, "", 0)
		y, nobody := s.begin("10.0.0.2", "&object_id=object-of-"+clientY), s.begin("10.0.0.2", "&object_id=nobody")
		time.Sleep(time.Second)
		s.held(y, nobody)
		for _, key := range s.azure.asked {
			if key.ClientID == clientY {
				t.Error("a token was asked for that nobody may have yet")
			}
		}
		s.assign("both", "y", identity.StateAssigned, "")
		s.expect(y, 200, "", time.Second)
		s.expect(nobody, 400, identity.IdentityNotBound, time.Second)
	})
}

// The whole server around it: what bounds a request must not bound one that is held.
func TestAHeldRequestIsAnsweredByTheServer(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		s.tokens.waiting.most = maxAssignmentWait
		l := newPipeListener("10.0.0.1:4242")
		server := newHTTPServer(s.server, maxAssignmentWait)
		var ended sync.WaitGroup
		ended.Go(func() { _ = server.Serve(l) })
		client := &http.Client{Transport: &http.Transport{DialContext: l.dial}}
		get := func(ctx context.Context) (int, map[string]string, error) {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://imds"+getPath, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Metadata", "true")
			resp, err := client.Do(r)
			if err != nil {
				return 0, nil, err
			}
			defer resp.Body.Close()
			var body map[string]string
			return resp.StatusCode, body, json.NewDecoder(resp.Body).Decode(&body)
		}
		start := time.Now()
		if status, body, err := get(t.Context()); err != nil || status != 503 || body["reason"] != "assignment_pending" || time.Since(start) != maxAssignmentWait {
			t.Errorf("got %d %v, %v after %s", status, body, err, time.Since(start))
		}
		leaving, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, _, err := get(leaving); err == nil {
			t.Error("answered before its time")
		}
		synctest.Wait()
		s.waited(map[string]int{waitTimeout: 1, waitGone: 1})
		client.CloseIdleConnections()
		_ = server.Close()
		ended.Wait()
	})
}

func TestOneCauseIsOneEventHoweverOftenAPodComesAgain(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		s.tokens.waiting.most = 0
		told := map[string]bool{}
		e, err := telemetry.NewEvents("node1", func(_ context.Context, event *corev1.Event) error {
			told[fmt.Sprint(event.InvolvedObject.Name, event.Message)] = true
			if !strings.HasPrefix(event.Message, "assignment_pending: AzureIdentity ns/x") {
				t.Errorf("told %q", event.Message)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		s.refused = e.Refused
		for range 50 {
			s.expect(s.begin("10.0.0.1", ""), 503, identity.AssignmentPending, 0)
		}
		writing, stop := context.WithCancel(t.Context())
		defer stop()
		go e.Run(writing)
		synctest.Wait()
		if len(told) != 1 {
			t.Errorf("told %v", told)
		}
	})
}
