package azure

import (
	"testing"
	"time"
)

func TestTheLogDistinguishesPodsAndNodesAndCountsTheirConnections(t *testing.T) {
	s := start(t)
	s.add(red)
	s.get(nodeA, tokenQuery)
	if e := s.lastEntry(); e.Kind != KindRequest || e.Node != "a" || e.Source != nodeA || e.FromPod || e.Status != 200 ||
		e.ClientID != red.ClientID || e.Resource != "https://vault.azure.net" || e.Headers["Metadata"] != "true" {
		t.Errorf("the node's request is logged as %+v, want status 200, node a, and its own address", e)
	}
	if st := s.stats().IMDS; st.RequestsFromPods != 0 || st.ConnectionsFromPods != 0 || st.Connections != 1 {
		t.Errorf("counts before the pod's request %+v, want 1 connection, and none from a pod", st)
	}
	s.send(podB, "GET", tokenQuery, "X-Forwarded-For:", "User-Agent: attack")
	e := s.lastEntry()
	if _, present := e.Headers["X-Forwarded-For"]; e.Node != "b" || e.Source != podB || !e.FromPod || e.Headers["User-Agent"] != "attack" || !present {
		t.Errorf("the pod's request is logged as %+v, want node b, from a pod, and both headers", e)
	}
	st := s.stats().IMDS
	if st.RequestsFromPods != 1 || st.ConnectionsFromPods != 1 || st.Sources[podB] != (Source{"b", true, 1, 1}) {
		t.Errorf("counts after the pod's request %+v, want 1 connection and 1 request from the pod of node b", st)
	}
}

func TestAConnectionWithoutARequestIsLogged(t *testing.T) {
	s := start(t)
	for _, source := range []string{podA, unknownSource, nodeA} {
		conn := s.dialFrom(source)
		defer conn.Close()
	}
	s.waitUntil("three connections", func() bool { return s.stats().IMDS.Connections == 3 })
	entries, err := s.Log(t.Context(), 0)
	s.must(err)
	if len(entries) != 2 || entries[0].Kind != KindConnection || entries[1].Kind != KindConnection {
		t.Errorf("logged %+v, want 2 connections: of the pod and of the unknown source", entries)
	}
	if st := s.stats().IMDS; st.ConnectionsFromPods != 1 || st.All.Requests != 0 {
		t.Errorf("counts %+v, want 1 connection from a pod, and no request", st)
	}
}

func TestResettingTheLogKeepsSequenceNumbers(t *testing.T) {
	s := start(t)
	s.get(nodeA, tokenQuery)
	s.get(nodeA, tokenQuery)
	last := s.lastEntry().Seq
	s.must(s.ResetLog(t.Context()))
	if st := s.stats(); st.IMDS.All.Requests != 0 || st.IMDS.Connections != 0 || len(st.IMDS.Sources) != 0 {
		t.Errorf("counts after the reset %+v, want none for IMDS", st)
	}
	s.get(nodeA, tokenQuery)
	entries, err := s.Log(t.Context(), last)
	s.must(err)
	if len(entries) != 1 || entries[0].Seq != last+1 {
		t.Errorf("log entries since sequence number %d: %+v, want one, with the next number", last, entries)
	}
}

func TestTheLogKeepsTheNewestEntriesAndCountsTheDropped(t *testing.T) {
	l := requestLog{capacity: 3}
	for range 5 {
		l.add(Entry{})
	}
	for since, want := range map[int][]int{0: {3, 4, 5}, 3: {4, 5}, 5: {}, 9: {}} {
		got := l.since(since)
		if len(got) != len(want) {
			t.Errorf("since %d: got entries %+v, want as many as in the table", since, got)
			continue
		}
		for i := range want {
			if got[i].Seq != want[i] {
				t.Errorf("since %d: entry %d has the sequence number %d, want that of the table", since, i, got[i].Seq)
			}
		}
	}
	if l.dropped != 2 {
		t.Errorf("%d entries counted as dropped, want 2", l.dropped)
	}
}

func TestTheMaximumPerSecondIsOfAnySecond(t *testing.T) {
	var m meter
	base := time.Now()
	for _, ms := range []int{0, 600, 700, 1500, 1599, 1601, 5000} {
		m.begin(base.Add(time.Duration(ms) * time.Millisecond))
	}
	if m.MaxPerSecond != 4 { // the arrivals at 600, 700, 1500 and 1599 ms
		t.Errorf("MaxPerSecond is %d, want 4", m.MaxPerSecond)
	}
	if m.MaxConcurrency != 7 {
		t.Errorf("MaxConcurrency is %d, want 7", m.MaxConcurrency)
	}
}
