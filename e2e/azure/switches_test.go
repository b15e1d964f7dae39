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
			t.Errorf("%s=%s: %v", c.key, c.value, err)
		}
	}
	all, err := s.Switches(t.Context())
	s.must(err)
	if all["imds.drop"] != "false" || all["imds.token-lifetime"] != "24h0m0s" || all["entra.token-lifetime"] != "1h0m0s" {
		t.Errorf("switches: %v", all)
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
			t.Errorf("%s=%s, was %s", key, value, want)
		}
	}
	if after["imds.throttle"] != "4" {
		t.Error("the switch beside the reset was lost")
	}
}

func TestThrottlingEndsAfterItsCountAndAppliesOnlyToTokenRequests(t *testing.T) {
	s := start(t)
	s.add(red)
	s.set("imds.throttle=2", "imds.retry-after=3")
	if a := s.get(nodeA, "/metadata/versions"); a.status != 200 {
		t.Errorf("versions: %d", a.status)
	}
	for range 2 {
		a := s.get(nodeA, tokenQuery)
		if a.status != 429 || a.header.Get("Retry-After") != "3" || !strings.HasPrefix(a.body, `{"error":"too_many_requests"`) {
			t.Errorf("throttled: %d %v %s", a.status, a.header, a.body)
		}
	}
	s.get(nodeA, tokenQuery).token(t)
	s.set("imds.throttle=-1", "imds.retry-after=0")
	for range 3 {
		if a := s.get(nodeA, tokenQuery); a.status != 429 || a.header.Get("Retry-After") != "" {
			t.Errorf("throttled permanently: %d %v", a.status, a.header)
		}
	}
}

func TestAStatusEndsAfterItsCount(t *testing.T) {
	s := start(t)
	s.add(red)
	s.set("imds.status=410", "imds.status-count=2")
	for i, want := range []int{410, 410, 200} {
		if a := s.get(nodeA, tokenQuery); a.status != want {
			t.Errorf("request %d: %d", i, a.status)
		}
	}
	s.set("imds.status=500", "imds.status-count=0", "imds.error-body=text")
	if a := s.get(nodeA, tokenQuery); a.status != 500 || !strings.HasPrefix(a.header.Get("Content-Type"), "text/plain") {
		t.Errorf("plain: %d %v", a.status, a.header)
	}
	s.set("imds.faults-on=token")
	if a := s.get(nodeA, "/metadata/versions"); a.status != 200 {
		t.Errorf("versions: %d", a.status)
	}
}

func TestADroppedRequestGetsNoResponse(t *testing.T) {
	s := start(t)
	s.set("imds.drop=true")
	if a, err := s.try(nodeA, "GET", tokenQuery, "Metadata: true"); err == nil {
		t.Errorf("answered %d", a.status)
	}
	if e := s.lastEntry(); e.Status != 0 || e.Error != "dropped" {
		t.Errorf("logged %+v", e)
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
		t.Error("answered")
	}
	s.waitUntil("the request is logged", func() bool { return s.stats().IMDS.ByStatus[0] == 1 })
	if got := s.stats().IMDS.All.Requests; got != 1 {
		t.Errorf("%d requests", got)
	}
}

func TestLatencyDelaysEachResponse(t *testing.T) {
	s := start(t)
	s.set("imds.latency=40ms")
	began := time.Now()
	s.get(nodeA, "/metadata/versions")
	if took := time.Since(began); took < 40*time.Millisecond {
		t.Errorf("took %s", took)
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
		t.Errorf("token requests: %v", got)
	}
	if got := statuses(nodeB, tokenQuery, 3); got[200] != 3 {
		t.Errorf("the other node: %v", got)
	}
	if got := statuses(nodeA, "/metadata/versions", 7); got[200] != 5 || got[429] != 2 {
		t.Errorf("other requests: %v", got)
	}
	s.clock.advance(time.Second)
	if got := statuses(nodeA, tokenQuery, 1); got[200] != 1 {
		t.Errorf("a second later: %v", got)
	}
	if st := s.stats().IMDS; st.TokenByNode["a"].MaxPerSecond != 25 || st.TokenByNode["b"].MaxPerSecond != 3 {
		t.Errorf("measured %+v", st.TokenByNode)
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
		t.Errorf("the sixth: %d", a.status)
	}
	s.get(nodeB, tokenQuery).token(t)
	if got := s.stats().IMDS.TokenByNode["a"].MaxConcurrency; got != 6 {
		t.Errorf("measured %d at once", got)
	}
}
