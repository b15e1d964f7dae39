package cluster

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/nmi/nmitest"
)

func TestAfterAnOutageAllWatchesGoOnWithinSecondsAndOneQuestionServesThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		backAt := time.Now().Add(10 * time.Minute)
		probes := 0
		var failures atomic.Int32
		refused := errors.New("connection refused")
		c := newReconnector(func(context.Context) error {
			probes++
			if time.Now().Before(backAt) {
				return refused
			}
			return nil
		}, func() { failures.Add(1) })
		lw := &cache.ListWatch{
			ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) { return nil, refused },
			WatchFuncWithContext: func(context.Context, metav1.ListOptions) (apiwatch.Interface, error) {
				if time.Now().Before(backAt) {
					return nil, refused
				}
				return apiwatch.NewFake(), nil
			},
		}
		const watches = 4
		done := make(chan time.Duration, watches)
		for range watches {
			go func() {
				w, err := c.wrap("pods", lw).WatchWithContext(t.Context(), metav1.ListOptions{})
				if err != nil {
					t.Error(err)
				}
				done <- time.Since(backAt)
				time.Sleep(time.Minute)
				w.Stop()
			}()
		}
		synctest.Wait()
		if c.staleWatch() != "pods" {
			t.Error("nothing is known to be stale")
		}
		for range watches {
			if late := <-done; late > maxProbeBackoff {
				t.Errorf("a watch went on %s after the server was back", late)
			}
		}
		if c.staleWatch() == "" {
			t.Error("what was missed cannot have come yet")
		}
		time.Sleep(catchUpTime + time.Millisecond)
		synctest.Wait()
		if c.staleWatch() != "" {
			t.Errorf("%s is still called stale", c.staleWatch())
		}
		if least := int(10 * time.Minute / maxProbeBackoff); probes < least || probes > 3*least || failures.Load() != watches {
			t.Errorf("%d probes, %d failures", probes, failures.Load())
		}
		time.Sleep(2 * time.Minute) // until the watches have ended
	})
}

func TestAWatchThatIsTooOldToGoOnStaysStaleUntilAllObjectsHaveComeAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newReconnector(nil, nil)
		c.setDisconnected("pods", true)
		open := func(o metav1.ListOptions) (*apiwatch.FakeWatcher, apiwatch.Interface) {
			fake := apiwatch.NewFake()
			w, err := c.wrap("pods", &cache.ListWatch{
				ListWithContextFunc:  func(context.Context, metav1.ListOptions) (runtime.Object, error) { return nil, nil },
				WatchFuncWithContext: func(context.Context, metav1.ListOptions) (apiwatch.Interface, error) { return fake, nil },
			}).WatchWithContext(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				for range w.ResultChan() {
				}
			}()
			return fake, w
		}
		fake, w := open(metav1.ListOptions{ResourceVersion: "7"})
		fake.Error(&metav1.Status{Code: http.StatusGone})
		w.Stop()
		time.Sleep(10 * catchUpTime)
		if c.staleWatch() == "" {
			t.Fatal("the watch has brought nothing and is not called stale")
		}
		all := true
		fake, w = open(metav1.ListOptions{SendInitialEvents: &all})
		fake.Add(nmitest.Pod("app", "1", "10.0.0.1"))
		time.Sleep(10 * catchUpTime)
		if c.staleWatch() == "" {
			t.Fatal("there may be more objects to come")
		}
		fake.Action(apiwatch.Bookmark, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}})
		time.Sleep(catchUpTime + time.Millisecond)
		synctest.Wait()
		if c.staleWatch() != "" {
			t.Error("all objects have come, and it is still called stale")
		}
		w.Stop()
	})
}

// Nothing is left of a watch that ends with an event that nobody took; the test would not end otherwise.
func TestAWatchThatEndsInTheMiddleOfAnEventEndsWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, fake := newReconnector(nil, nil), apiwatch.NewFakeWithOptions(apiwatch.FakeOptions{ChannelSize: 1})
		c.setDisconnected("pods", true)
		w := c.connectedOnceCaughtUp("pods", metav1.ListOptions{}, fake)
		fake.Add(nmitest.Pod("app", "1", "10.0.0.1"))
		synctest.Wait() // it holds the event
		w.Stop()
		w.Stop()
		synctest.Wait()
		if _, more := <-w.ResultChan(); more {
			t.Error("it brought something after its end")
		}
	})
}

func TestOnlyAServerThatCannotAnswerIsWaitedFor(t *testing.T) {
	resource := schema.GroupResource{Resource: "pods"}
	for _, c := range []struct {
		err  error
		away bool
	}{
		{errors.New("dial tcp: connection refused"), true},
		{context.DeadlineExceeded, true},
		{apierrors.NewServiceUnavailable("starting"), true},
		{apierrors.NewTooManyRequests("slow down", 1), true},
		{apierrors.NewInternalError(errors.New("etcd")), true},
		{apierrors.NewGenericServerResponse(http.StatusGatewayTimeout, "get", resource, "", "", 0, true), true},
		{apierrors.NewForbidden(resource, "x", nil), false},
		{apierrors.NewResourceExpired("too old"), false},
		{apierrors.NewNotFound(resource, "x"), false},
	} {
		if got := ServerUnavailable(c.err); got != c.away {
			t.Errorf("%v: %t", c.err, got)
		}
	}
}
