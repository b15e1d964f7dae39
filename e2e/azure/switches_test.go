package azure

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestAnInvalidSwitchIsRefusedAndNothingChanges(t *testing.T) {
	s := start(t)
	for _, c := range []struct{ key, value, says string }{
		{"imds.nonsense", "1", "entra.latency"},
		{"entra.limits", "true", "the switches are"},
		{"imds.latency", "fast", "a duration"},
		{"imds.throttle", "-2", "-1 (all)"},
		{"imds.status", "200", "400 to 599"},
		{"imds.hang", "yes", "true or false"},
		{"reset", "some", "all"},
	} {
		err := s.Set(t.Context(), map[string]string{"imds.drop": "true", c.key: c.value})
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("switch %s=%s: got error %v, want one that lists what is valid", c.key, c.value, err)
		}
	}
	all, err := s.Switches(t.Context())
	s.must(err)
	if all["imds.drop"] != "false" || all["imds.token-lifetime"] != "24h0m0s" || all["entra.token-lifetime"] != "1h0m0s" {
		t.Errorf("got switches %v, want the defaults", all)
	}
}

func TestResetRestoresTheDefaults(t *testing.T) {
	s := start(t)
	before, err := s.Switches(t.Context())
	s.must(err)
	s.set("imds.status=503", "entra.hang=true", "imds.retry-after=7", "imds.cache=false")
	s.set("reset=all", "imds.throttle=4")
	after, err := s.Switches(t.Context())
	s.must(err)
	for key, value := range after {
		if want := before[key]; value != want && key != "imds.throttle" {
			t.Errorf("switch %s=%s after the reset, want %s", key, value, want)
		}
	}
	if after["imds.throttle"] != "4" {
		t.Error("imds.throttle, which was set together with the reset, is not 4")
	}
}

func TestThrottlingEndsAfterItsCountAndAppliesOnlyToTokenRequests(t *testing.T) {
	s := start(t)
	s.add(red)
	s.set("imds.throttle=2", "imds.retry-after=3")
	if a := s.get(nodeA, "/metadata/versions"); a.status != 200 {
		t.Errorf("GET /metadata/versions while token requests are throttled: got status %d, want 200", a.status)
	}
	for range 2 {
		a := s.get(nodeA, tokenQuery)
		if a.status != 429 || a.header.Get("Retry-After") != "3" || !strings.HasPrefix(a.body, `{"error":"too_many_requests"`) {
			t.Errorf("throttled request: got status %d, headers %v, body %s; want 429 with Retry-After 3",
				a.status, a.header, a.body)
		}
	}
	s.get(nodeA, tokenQuery).token(t)
	s.set("imds.throttle=-1", "imds.retry-after=0")
	for range 3 {
		if a := s.get(nodeA, tokenQuery); a.status != 429 || a.header.Get("Retry-After") != "" {
			t.Errorf("with throttle=-1: got status %d, headers %v; want 429 without Retry-After", a.status, a.header)
		}
	}
}

func TestAStatusEndsAfterItsCount(t *testing.T) {
	s := start(t)
	s.add(red)
	s.set("imds.status=410", "imds.status-count=2")
	for i, want := range []int{410, 410, 200} {
		if a := s.get(nodeA, tokenQuery); a.status != want {
			t.Errorf("request %d (counted from 0): got status %d, want 410, 410, then 200", i, a.status)
		}
	}
	s.set("imds.status=500", "imds.status-count=0", "imds.error-body=text")
	if a := s.get(nodeA, tokenQuery); a.status != 500 || !strings.HasPrefix(a.header.Get("Content-Type"), "text/plain") {
		t.Errorf("with error-body=text: got status %d, headers %v; want 500 and text/plain", a.status, a.header)
	}
	s.set("imds.faults-on=token")
	if a := s.get(nodeA, "/metadata/versions"); a.status != 200 {
		t.Errorf("GET /metadata/versions with faults-on=token: got status %d, want 200", a.status)
	}
}

func TestADroppedRequestGetsNoResponse(t *testing.T) {
	s := start(t)
	s.set("imds.drop=true")
	if a, err := s.try(nodeA, "GET", tokenQuery, "Metadata: true"); err == nil {
		t.Errorf("got status %d, want no response", a.status)
	}
	if e := s.lastEntry(); e.Status != 0 || e.Error != "dropped" {
		t.Errorf("logged %+v, want status 0 and the error dropped", e)
	}
}

func TestAHungRequestEndsWhenTheClientDisconnects(t *testing.T) {
	s := start(t)
	s.set("imds.hang=true")
	ctx, leave := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+s.at.IMDS+tokenQuery, nil)
	s.must(err)
	ended := make(chan error, 1)
	go func() {
		_, err := http.DefaultTransport.RoundTrip(req)
		ended <- err
	}()
	s.waitUntil("the request hangs", func() bool { return s.stats().IMDS.Token.InFlight == 1 })
	leave()
	if err := <-ended; err == nil {
		t.Error("the request that hangs got a response")
	}
	s.waitUntil("the request is logged", func() bool { return s.stats().IMDS.ByStatus[0] == 1 })
	if got := s.stats().IMDS.All.Requests; got != 1 {
		t.Errorf("%d requests counted, want 1", got)
	}
}

func TestLatencyDelaysEachResponse(t *testing.T) {
	s := start(t)
	s.set("imds.latency=40ms")
	began := time.Now()
	s.get(nodeA, "/metadata/versions")
	if took := time.Since(began); took < 40*time.Millisecond {
		t.Errorf("the response took %s, want at least 40ms", took)
	}
}

func TestTheLimitsOfIMDSApplyPerNode(t *testing.T) {
	s := start(t)
	s.add(red)
	s.set("imds.limits=true")
	statuses := func(node, target string, n int) map[int]int {
		out := map[int]int{}
		for range n {
			out[s.get(node, target).status]++
		}
		return out
	}
	if got := statuses(nodeA, tokenQuery, 25); got[200] != 20 || got[429] != 5 {
		t.Errorf("25 token requests of node a by status: %v, want 20 with 200 and 5 with 429", got)
	}
	if got := statuses(nodeB, tokenQuery, 3); got[200] != 3 {
		t.Errorf("3 token requests of node b by status: %v, want 3 with 200", got)
	}
	if got := statuses(nodeA, "/metadata/versions", 7); got[200] != 5 || got[429] != 2 {
		t.Errorf("7 other requests of node a by status: %v, want 5 with 200 and 2 with 429", got)
	}
	s.clock.advance(time.Second)
	if got := statuses(nodeA, tokenQuery, 1); got[200] != 1 {
		t.Errorf("a token request of node a a second later, by status: %v, want 200", got)
	}
	if st := s.stats().IMDS; st.TokenByNode["a"].MaxPerSecond != 25 || st.TokenByNode["b"].MaxPerSecond != 3 {
		t.Errorf("MaxPerSecond by node: %+v, want 25 for a and 3 for b", st.TokenByNode)
	}
}

func TestAtMostFiveTokenRequestsRunConcurrently(t *testing.T) {
	s := start(t)
	s.add(red)
	s.set("imds.limits=true", "imds.hang=true")
	var running sync.WaitGroup
	ctx, leave := context.WithCancel(t.Context())
	defer func() {
		leave()
		running.Wait()
	}()
	for range 5 {
		conn := s.dialFrom(nodeA)
		running.Add(1)
		go func() {
			defer running.Done()
			defer conn.Close()
			_, _ = conn.Write([]byte("GET " + tokenQuery + " HTTP/1.1\r\nHost: x\r\nMetadata: true\r\n\r\n"))
			<-ctx.Done()
		}()
	}
	s.waitUntil("five requests hang", func() bool { return s.stats().IMDS.Token.InFlight == 5 })
	s.set("imds.hang=false")
	if a := s.get(nodeA, tokenQuery); a.status != 429 {
		t.Errorf("sixth concurrent token request of node a: got status %d, want 429", a.status)
	}
	s.get(nodeB, tokenQuery).token(t)
	if got := s.stats().IMDS.TokenByNode["a"].MaxConcurrency; got != 6 {
		t.Errorf("MaxConcurrency of node a is %d, want 6", got)
	}
}
