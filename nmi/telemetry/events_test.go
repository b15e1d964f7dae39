package telemetry

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/nmitest"
)

func withEvents(t *testing.T, test func(e *Events, written func() []*corev1.Event)) {
	synctest.Test(t, func(t *testing.T) {
		var all []*corev1.Event
		e, err := NewEvents("node1", func(_ context.Context, event *corev1.Event) error {
			all = append(all, event)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			e.Run(ctx)
			close(done)
		}()
		test(e, func() []*corev1.Event {
			synctest.Wait()
			return all
		})
		cancel()
		<-done
	})
}

func refusalOf(detail string) *metadata.Error {
	return metadata.Refusal(identity.Decision{Reason: identity.NoMatchingBinding, Detail: detail})
}

func TestARepeatedRefusalIsReportedOncePerInterval(t *testing.T) {
	withEvents(t, func(e *Events, written func() []*corev1.Event) {
		p := nmitest.Pod("app", "uid-1", "10.0.0.1")
		for range 1000 {
			e.Refused(p, refusalOf("no binding"))
		}
		got := written()
		if len(got) != 1 || got[0].Message != "no_matching_binding: no binding" || got[0].InvolvedObject.UID != "uid-1" || got[0].Namespace != "ns" || got[0].Type != "Warning" || got[0].Reason != "TokenRefused" {
			t.Fatalf("1000 equal refusals wrote the Events %+v; want one", got)
		}
		e.Refused(p, refusalOf("another reason"))
		e.Refused(nmitest.Pod("app", "uid-2", "10.0.0.1"), refusalOf("no binding"))
		if got = written(); len(got) != 3 {
			t.Errorf("after another refusal and a refusal of another pod: %d Events, want 3", len(got))
		}
		time.Sleep(eventInterval)
		e.Refused(p, refusalOf("no binding"))
		if got = written(); len(got) != 4 || got[3].Name != got[0].Name || got[3].Count != 1001 || !got[3].FirstTimestamp.Equal(&got[0].FirstTimestamp) {
			t.Errorf("the last Event after eventInterval is %+v; want an update of the first Event with count 1001", got[len(got)-1])
		}
	})
}

func TestManyDifferentRefusalsOfOnePodAreLimited(t *testing.T) {
	withEvents(t, func(e *Events, written func() []*corev1.Event) {
		p := nmitest.Pod(strings.Repeat("long", 60), "uid-1", "10.0.0.1")
		for i := range 10_000 {
			e.Refused(p, refusalOf(fmt.Sprint(strings.Repeat("€", 800), i)))
		}
		got := written()
		if len(got) != eventBurst {
			t.Errorf("10000 different refusals of one pod wrote %d Events at once, want eventBurst", len(got))
		}
		for _, event := range got {
			if len(event.Message) > 1024 || len(event.Name) > 253 {
				t.Fatalf("the API server would refuse a message of %d bytes or a name of %d", len(event.Message), len(event.Name))
			}
		}
		if e.refusals.Len() > maxRefusals {
			t.Errorf("%d refusals are remembered, more than maxRefusals", e.refusals.Len())
		}
	})
}
