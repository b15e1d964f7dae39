package cluster

import (
	"context"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// CatchUpTime is how long a watch counts as behind after it was connected again: the API server first sends the events
// that the watch missed. For a watch to which the API server first sends all objects, this time is relistTime, because
// these objects take longer.
const CatchUpTime, relistTime = 5 * time.Second, 30 * time.Second

// watchState tracks whether all watches receive events. Its zero value is ready for use.
type watchState struct {
	mu           sync.Mutex
	disconnected map[string]bool // by resource; watches that receive no events now
	caughtUpAt   time.Time       // from this time on the connected watches do not count as behind
}

// Behind reports whether a watch is disconnected, or was connected so recently that it may still have to deliver events
// that it missed.
func (s *watchState) Behind() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.disconnected) > 0 || time.Now().Before(s.caughtUpAt)
}

func (s *watchState) markDisconnected(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.disconnected == nil {
		s.disconnected = map[string]bool{}
	}
	s.disconnected[name] = true
}

// markConnected records that a watch receives events again. A watch that was not disconnected was only renewed and has
// missed nothing.
func (s *watchState) markConnected(name string, catchUp time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.disconnected[name] {
		delete(s.disconnected, name)
		if until := time.Now().Add(catchUp); until.After(s.caughtUpAt) {
			s.caughtUpAt = until
		}
	}
}

// trackWatch makes a ListWatch record the state of its watch: disconnected when it lists objects or cannot open a
// watch, connected when it has opened a watch.
func (s *watchState) trackWatch(name string, lw *cache.ListWatch) {
	list, open := lw.ListWithContextFunc, lw.WatchFuncWithContext
	lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		s.markDisconnected(name)
		return list(ctx, o)
	}
	lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
		w, err := open(ctx, o)
		switch {
		case err != nil:
			s.markDisconnected(name)
		case o.SendInitialEvents != nil && *o.SendInitialEvents:
			s.markDisconnected(name) // if the previous watch ended without an error, the resource is not marked yet
			s.markConnected(name, relistTime)
		default:
			s.markConnected(name, CatchUpTime)
		}
		return w, err
	}
}
