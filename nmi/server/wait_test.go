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

// inStandardMode is a bench in standard mode, on a clock of its own: nothing is assigned, and waits are counted by outcome.
func inStandardMode(t *testing.T, test func(t *testing.T, s *standard)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &standard{bench: newBench(t), waits: map[string]int{}}
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
		places, sources := s.requests.Wait.Limiter.InUse()
		if n := s.requests.Wait.Notifier.Subscribed(); n != 0 || places != 0 || sources != 0 {
			t.Errorf("nobody waits any more, and left are %d topics and %d places", n, places)
		}
	})
}

type standard struct {
	*bench
	mu    sync.Mutex
	waits map[string]int // by outcome
}

func (s *standard) waited(t *testing.T, want map[string]int) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !maps.Equal(s.waits, want) {
		t.Errorf("waits ended as %v; want %v", s.waits, want)
	}
}

// The whole server around it: what bounds a request must not bound one that is held.
func TestAHeldRequestIsAnsweredByTheServer(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
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
			t.Error("answered before its time")
		}
		synctest.Wait()
		s.waited(t, map[string]int{request.WaitTimeout: 1, request.WaitGone: 1})
		client.CloseIdleConnections()
		_ = server.Close()
		ended.Wait()
	})
}

func TestOneCauseIsOneEventHoweverOftenAPodComesAgain(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		s.requests.Wait.MaxWait = 0
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
		if len(told) != 1 {
			t.Errorf("told %v", told)
		}
	})
}

func TestAClientThatLeavesWaitsNoLonger(t *testing.T) {
	inStandardMode(t, func(t *testing.T, s *standard) {
		ctx, leave := context.WithCancel(t.Context())
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
		leave()
		start := time.Now()
		if w := <-done; w.Body.Len() != 0 || time.Since(start) != 0 {
			t.Errorf("answered %s after %s", w.Body, time.Since(start))
		}
		s.waited(t, map[string]int{request.WaitGone: 1})
	})
}
