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

// settle is how long a watch that goes on is still taken to be behind: what was missed is the first thing that the API
// server sends. One that begins anew brings all objects first, which takes longer.
const CatchUpTime, relistTime = 5 * time.Second, 30 * time.Second

// connection knows whether all watches hear what happens. Its zero value is ready for use.
type watchState struct {
	mu           sync.Mutex
	disconnected map[string]bool // watches that hear nothing at the moment
	caughtUpAt   time.Time       // what the others may have missed has come by then
}

// behind reports whether something may have happened that no watch has told yet.
func (c *watchState) Behind() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.disconnected) > 0 || time.Now().Before(c.caughtUpAt)
}

func (c *watchState) markDisconnected(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disconnected == nil {
		c.disconnected = map[string]bool{}
	}
	c.disconnected[name] = true
}

// mend notes that a watch hears again. One that was not deaf has only been renewed.
func (c *watchState) markConnected(name string, settle time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disconnected[name] {
		delete(c.disconnected, name)
		if until := time.Now().Add(settle); until.After(c.caughtUpAt) {
			c.caughtUpAt = until
		}
	}
}

// heed takes note of when a watch is deaf: while it lists, and until it watches again.
func (c *watchState) trackWatch(name string, lw *cache.ListWatch) {
	list, open := lw.ListWithContextFunc, lw.WatchFuncWithContext
	lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		c.markDisconnected(name)
		return list(ctx, o)
	}
	lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
		w, err := open(ctx, o)
		switch {
		case err != nil:
			c.markDisconnected(name)
		case o.SendInitialEvents != nil && *o.SendInitialEvents:
			c.markDisconnected(name) // which the watch before it may not have said
			c.markConnected(name, relistTime)
		default:
			c.markConnected(name, CatchUpTime)
		}
		return w, err
	}
}
