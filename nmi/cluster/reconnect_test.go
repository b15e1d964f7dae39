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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/nmi/nmitest"
)

func TestAfterAnOutageOneProbeReconnectsAllWatchesWithinSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		backAt := time.Now().Add(10 * time.Minute)
		probes := 0
		var failures atomic.Int32
		refused := errors.New("connection refused")
		r := newReconnector(func(context.Context) error {
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
				w, err := r.wrap("pods", lw).WatchWithContext(t.Context(), metav1.ListOptions{})
				if err != nil {
					t.Error(err)
				}
				done <- time.Since(backAt)
				time.Sleep(time.Minute)
				w.Stop()
			}()
		}
		synctest.Wait()
		if r.staleWatch() != "pods" {
			t.Error("the API server is unavailable, and no watch is reported as stale")
		}
		for range watches {
			if late := <-done; late > maxProbeBackoff {
				t.Errorf("a watch reconnected %s after the API server was available again", late)
			}
		}
		if r.staleWatch() == "" {
			t.Error("no watch is reported as stale, but the missed events cannot have arrived yet")
		}
		time.Sleep(catchUpTime + time.Millisecond)
		synctest.Wait()
		if r.staleWatch() != "" {
			t.Errorf("%s is still reported as stale", r.staleWatch())
		}
		if least := int(10 * time.Minute / maxProbeBackoff); probes < least || probes > 3*least || failures.Load() != watches {
			t.Errorf("an outage of ten minutes caused %d probes and %d reported failures; want one failure for each watch", probes, failures.Load())
		}
		time.Sleep(2 * time.Minute) // until the watches have stopped
	})
}

func TestAnExpiredWatchIsStaleUntilAllObjectsHaveArrivedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReconnector(nil, nil)
		r.setDisconnected("pods", true)
		open := func(o metav1.ListOptions) (*apiwatch.FakeWatcher, apiwatch.Interface) {
			fake := apiwatch.NewFake()
			w, err := r.wrap("pods", &cache.ListWatch{
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
		if r.staleWatch() == "" {
			t.Fatal("the watch has received nothing and is not reported as stale")
		}
		all := true
		fake, w = open(metav1.ListOptions{SendInitialEvents: &all})
		fake.Add(nmitest.Pod("app", "1", "10.0.0.1"))
		time.Sleep(10 * catchUpTime)
		if r.staleWatch() == "" {
			t.Fatal("more objects may follow, and the watch is not reported as stale")
		}
		fake.Action(apiwatch.Bookmark, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}})
		time.Sleep(catchUpTime + time.Millisecond)
		synctest.Wait()
		if r.staleWatch() != "" {
			t.Error("all objects have arrived, and the watch is still reported as stale")
		}
		w.Stop()
	})
}

// synctest fails the test if a goroutine of the stopped watch remains.
func TestAStoppedWatchLeavesNoGoroutineThatHoldsAnEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, fake := newReconnector(nil, nil), apiwatch.NewFakeWithOptions(apiwatch.FakeOptions{ChannelSize: 1})
		r.setDisconnected("pods", true)
		w := r.connectAfterCatchUp("pods", metav1.ListOptions{}, fake)
		fake.Add(nmitest.Pod("app", "1", "10.0.0.1"))
		synctest.Wait() // the watch holds the event
		w.Stop()
		w.Stop()
		synctest.Wait()
		if _, more := <-w.ResultChan(); more {
			t.Error("the watch sent an event after Stop")
		}
	})
}
