package mic

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
const settle, settleAll = 5 * time.Second, 30 * time.Second

// connection knows whether all watches hear what happens. Its zero value is ready for use.
type connection struct {
	mu    sync.Mutex
	deaf  map[string]bool // watches that hear nothing at the moment
	until time.Time       // what the others may have missed has come by then
}

// behind reports whether something may have happened that no watch has told yet.
func (c *connection) behind() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.deaf) > 0 || time.Now().Before(c.until)
}

func (c *connection) deafen(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.deaf == nil {
		c.deaf = map[string]bool{}
	}
	c.deaf[name] = true
}

// mend notes that a watch hears again. One that was not deaf has only been renewed.
func (c *connection) mend(name string, settle time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.deaf[name] {
		delete(c.deaf, name)
		if until := time.Now().Add(settle); until.After(c.until) {
			c.until = until
		}
	}
}

// heed takes note of when a watch is deaf: while it lists, and until it watches again.
func (c *connection) heed(name string, lw *cache.ListWatch) {
	list, open := lw.ListWithContextFunc, lw.WatchFuncWithContext
	lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		c.deafen(name)
		return list(ctx, o)
	}
	lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
		w, err := open(ctx, o)
		switch {
		case err != nil:
			c.deafen(name)
		case o.SendInitialEvents != nil && *o.SendInitialEvents:
			c.deafen(name) // which the watch before it may not have said
			c.mend(name, settleAll)
		default:
			c.mend(name, settle)
		}
		return w, err
	}
}
