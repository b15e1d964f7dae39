package server

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
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/limit"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// inStandardMode runs a test with a bench in standard mode and a fake clock. No identity is assigned.
func inStandardMode(t *testing.T, test func(t *testing.T, s *standardBench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &standardBench{bench: newBench(t), waits: map[string]int{}}
		s.requests.Rules = identity.Rules{Mode: identity.Standard}
		s.requests.Wait = &request.WaitConfig{
			MaxWait:       25 * time.Second,
			Notifier:      &cluster.Notifier{},
			Limiter:       limit.New(limit.MaxWaits, limit.MaxWaitsPerSource),
			Stopping:      t.Context().Done(),
			AssignedSince: func(*corev1.Pod, *identity.Identity) time.Time { return time.Time{} },
			Observe: func(outcome string, _ time.Duration) {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.waits[outcome]++
			},
		}
		test(t, s)
		synctest.Wait()
		inUse, sources := s.requests.Wait.Limiter.InUse()
		if n := s.requests.Wait.Notifier.SubscribedKeys(); n != 0 || inUse != 0 || sources != 0 {
			t.Errorf("no request waits, but %d keys are subscribed and %d waits of %d sources are counted", n, inUse, sources)
		}
	})
}

type standardBench struct {
	*bench
	mu    sync.Mutex
	waits map[string]int // by outcome
}

func (s *standardBench) mustHaveOutcomes(t *testing.T, want map[string]int) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !maps.Equal(s.waits, want) {
		t.Errorf("waits ended as %v; want %v", s.waits, want)
	}
}

// The timeouts of the server must not end a request that waits for an assignment.
func TestTheServerRespondsToARequestThatWaited(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.requests.Wait.MaxWait = request.MaxAssignmentWait
		l := newPipeListener("10.0.0.1:4242")
		server := newHTTPServer(s.Server, request.MaxAssignmentWait)
		var ended sync.WaitGroup
		ended.Go(func() { _ = server.Serve(l) })
		client := &http.Client{Transport: &http.Transport{DialContext: l.dial}}
		get := func(ctx context.Context) (int, map[string]string, error) {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://imds"+nmitest.TokenPath, nil)
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
		if status, body, err := get(t.Context()); err != nil || status != 503 || body["reason"] != "assignment_pending" || time.Since(start) != request.MaxAssignmentWait {
			t.Errorf("got %d %v, %v after %s", status, body, err, time.Since(start))
		}
		leaving, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, _, err := get(leaving); err == nil {
			t.Error("the server responded before the wait ended")
		}
		synctest.Wait()
		s.mustHaveOutcomes(t, map[string]int{request.WaitTimeout: 1, request.WaitGone: 1})
		client.CloseIdleConnections()
		_ = server.Close()
		ended.Wait()
	})
}

func TestARetriedRefusalIsOneEvent(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		s.requests.Wait.MaxWait = 0
		events := map[string]bool{}
		e, err := telemetry.NewEvents("node1", func(_ context.Context, event *corev1.Event) error {
			events[fmt.Sprint(event.InvolvedObject.Name, event.Message)] = true
			if !strings.HasPrefix(event.Message, "assignment_pending: AzureIdentity ns/x") {
				t.Errorf("the Event has the message %q", event.Message)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		s.onRefused = e.Refused
		for range 50 {
			if status, body := s.ask("10.0.0.1", nmitest.TokenPath); status != 503 || body["reason"] != "assignment_pending" || body["Retry-After"] != "5" {
				t.Errorf("got %d %v", status, body)
			}
		}
		writing, stop := context.WithCancel(t.Context())
		defer stop()
		go e.Run(writing)
		synctest.Wait()
		if len(events) != 1 {
			t.Errorf("the Events are %v; want one", events)
		}
	})
}

func TestARequestStopsWaitingWhenItsClientDisconnects(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standardBench) {
		ctx, disconnect := context.WithCancel(t.Context())
		done := make(chan *httptest.ResponseRecorder)
		go func() {
			r := httptest.NewRequest(http.MethodGet, nmitest.TokenPath, nil).WithContext(ctx)
			r.RemoteAddr = "10.0.0.1:1"
			r.Header.Set("Metadata", "true")
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			done <- w
		}()
		time.Sleep(time.Second)
		disconnect()
		start := time.Now()
		if w := <-done; w.Body.Len() != 0 || time.Since(start) != 0 {
			t.Errorf("response %s, %s after the client disconnected; want no response, at once", w.Body, time.Since(start))
		}
		s.mustHaveOutcomes(t, map[string]int{request.WaitGone: 1})
	})
}
