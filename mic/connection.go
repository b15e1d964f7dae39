package mic

import (
	"context"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// settle is how long a watch that goes on is still taken to be behind: what was missed is the first thing that the API
// server sends.
const settle = 5 * time.Second

// connection knows whether all watches hear what happens. Its zero value is ready for use.
type connection struct {
	mu     sync.Mutex
	deaf   map[string]bool // watches that hear nothing at the moment
	mended time.Time       // when the last of them heard again
}

// behind reports whether something may have happened that no watch has told yet.
func (c *connection) behind() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.deaf) > 0 || time.Since(c.mended) < settle
}

func (c *connection) note(name string, deaf bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case deaf && c.deaf == nil:
		c.deaf = map[string]bool{name: true}
	case deaf:
		c.deaf[name] = true
	case c.deaf[name]:
		delete(c.deaf, name)
		c.mended = time.Now()
	}
}

// heed takes note of when a watch is deaf: while it lists, and until it watches again. One that brings all objects first
// has listed when it marks the end of them.
func (c *connection) heed(name string, lw *cache.ListWatch) {
	list, open := lw.ListWithContextFunc, lw.WatchFuncWithContext
	lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		c.note(name, true)
		return list(ctx, o)
	}
	lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
		w, err := open(ctx, o)
		if err != nil {
			c.note(name, true)
			return w, err
		}
		if o.SendInitialEvents == nil || !*o.SendInitialEvents {
			c.note(name, false)
			return w, nil
		}
		c.note(name, true)
		return apiwatch.Filter(w, func(e apiwatch.Event) (apiwatch.Event, bool) {
			if o, err := meta.Accessor(e.Object); err == nil && e.Type == apiwatch.Bookmark && o.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true" {
				c.note(name, false)
			}
			return e, true
		}), nil
	}
}
