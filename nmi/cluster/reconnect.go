package cluster

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// A lost API server is looked for after probeFirst, then after half as long again each time, up to probeMost; each
// pause is drawn between that and half of it, so that the nodes of a large cluster do not knock together.
const (
	probeFirst, probeMost = 250 * time.Millisecond, 10 * time.Second
	probeTimeout          = 3 * time.Second
)

// connection keeps the watches of this node going when the API server is away.
//
// Left alone, each watch would wait longer and longer by itself, up to a minute, and find the server back long after
// it is; a pod's new identity would be refused for good meanwhile, as one that does not exist. Here one small question
// stands for all watches, and all go on as soon as it is answered.
type connection struct {
	probe  func(context.Context) error // nil error: the API server answers and is ready
	failed func()                      // is told of each failure of a watch; for metrics

	mu     sync.Mutex
	back   chan struct{}   // closed when the server is back; nil while it is not known to be away
	broken map[string]bool // watches that do not hear anything at the moment
}

func newConnection(probe func(context.Context) error, failed func()) *connection {
	return &connection{probe: probe, failed: failed, broken: map[string]bool{}}
}

// stale names a watch that hears nothing at the moment; what it knows may be old. "" if all do.
func (c *connection) stale() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name := range c.broken {
		return name
	}
	return ""
}

// staleCount is how many watches hear nothing at the moment.
func (c *connection) staleCount() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.broken)
}

// mend makes a source of objects wait for the API server instead of failing while that is away. Those with a name are
// watched for as long as this process lives, and count as stale while they hear nothing.
func (c *connection) mend(name string, lw *cache.ListWatch) *cache.ListWatch {
	list, open := lw.ListWithContextFunc, lw.WatchFuncWithContext
	mended := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (objects runtime.Object, err error) {
			err = c.persist(ctx, name, func() error {
				objects, err = list(ctx, o)
				return err
			})
			return objects, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (w apiwatch.Interface, err error) {
			err = c.persist(ctx, name, func() error {
				w, err = open(ctx, o)
				return err
			})
			if err == nil && c.isBroken(name) {
				w = c.caughtUp(name, o, w)
			}
			return w, err
		},
	}
	return mended
}

// settle is how long a watch that goes on after an outage is still taken to be behind: what was missed is the first
// thing that the API server sends, unless it has forgotten that and says so.
const settle = time.Second

// caughtUp ends the state of being broken once the watch has brought what was missed: it either goes on where it was,
// or begins with all objects and marks the end of those, or fails because it is too old to go on.
func (c *connection) caughtUp(name string, o metav1.ListOptions, w apiwatch.Interface) apiwatch.Interface {
	mended := func() { c.note(name, false) }
	var timer *time.Timer
	if o.SendInitialEvents == nil || !*o.SendInitialEvents {
		timer = time.AfterFunc(settle, mended)
	}
	return newTap(w, func(e apiwatch.Event) {
		switch {
		case e.Type == apiwatch.Error && timer != nil:
			timer.Stop()
		case e.Type == apiwatch.Bookmark && timer == nil:
			if o, err := meta.Accessor(e.Object); err == nil && o.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true" {
				timer = time.AfterFunc(settle, mended)
			}
		}
	})
}

// tap passes on all that a watch brings. It ends with Stop also when nobody takes the event that it holds, with which
// apimachinery's filter would stay for good.
type tap struct {
	apiwatch.Interface
	events  chan apiwatch.Event
	stopped chan struct{}
	stop    func()
}

func newTap(w apiwatch.Interface, see func(apiwatch.Event)) *tap {
	t := &tap{Interface: w, events: make(chan apiwatch.Event), stopped: make(chan struct{})}
	t.stop = sync.OnceFunc(func() { close(t.stopped) })
	go func() {
		defer close(t.events)
		for e := range w.ResultChan() {
			see(e)
			select {
			case t.events <- e:
			case <-t.stopped:
				return
			}
		}
	}()
	return t
}

func (t *tap) ResultChan() <-chan apiwatch.Event { return t.events }

func (t *tap) Stop() {
	t.stop()
	t.Interface.Stop()
}

func (c *connection) isBroken(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken[name]
}

func (c *connection) note(name string, broken bool) {
	if name == "" {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if broken {
		c.broken[name] = true
	} else {
		delete(c.broken, name)
	}
}

// persist does it until it succeeds, fails for a reason that waiting does not help against, or ctx ends.
func (c *connection) persist(ctx context.Context, name string, do func() error) error {
	for {
		err := do()
		if err == nil || ctx.Err() != nil || !Away(err) {
			return err
		}
		c.failed()
		c.note(name, true)
		select {
		case <-c.returned():
		case <-ctx.Done():
			return err
		}
	}
}

// Away tells a server that cannot answer now from one that says no. Whatever is not an answer of the server is an
// error of the way there.
func Away(err error) bool {
	if _, answered := err.(apierrors.APIStatus); !answered {
		return true
	}
	return apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err) || apierrors.IsServerTimeout(err) ||
		apierrors.IsTimeout(err) || apierrors.IsTooManyRequests(err)
}

// returned gives the channel that is closed when the server is back, and sees to it that somebody looks.
func (c *connection) returned() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.back == nil {
		c.back = make(chan struct{})
		go c.look()
	}
	return c.back
}

// look asks until the server answers. It ends with that: as long as a watch waits, somebody has to.
func (c *connection) look() {
	for pause := probeFirst; ; pause = min(pause*3/2, probeMost) {
		time.Sleep(pause/2 + time.Duration(rand.Int64N(int64(pause/2))))
		ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
		err := c.probe(ctx)
		cancel()
		if err == nil {
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.back)
	c.back = nil
}
