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

// A lost API server is looked for after initialProbeBackoff, then after half as long again each time, up to maxProbeBackoff; each
// pause is drawn between that and half of it, so that the nodes of a large cluster do not knock together.
const (
	initialProbeBackoff, maxProbeBackoff = 250 * time.Millisecond, 10 * time.Second
	probeTimeout                         = 3 * time.Second
)

// reconnector keeps the watches of this node going when the API server is away.
//
// Left alone, each watch would wait longer and longer by itself, up to a minute, and find the server back long after
// it is; a pod's new identity would be refused for good meanwhile, as one that does not exist. Here one small question
// stands for all watches, and all go on as soon as it is answered.
type reconnector struct {
	probe     func(context.Context) error // nil error: the API server answers and is ready
	onFailure func()                      // is told of each failure of a watch; for metrics

	mu           sync.Mutex
	available    chan struct{}   // closed when the server is back; nil while it is not known to be away
	disconnected map[string]bool // watches that do not hear anything at the moment
}

func newReconnector(probe func(context.Context) error, onFailure func()) *reconnector {
	return &reconnector{probe: probe, onFailure: onFailure, disconnected: map[string]bool{}}
}

// staleWatch names a watch that hears nothing at the moment; what it knows may be old. "" if all do.
func (c *reconnector) staleWatch() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name := range c.disconnected {
		return name
	}
	return ""
}

// staleWatches is how many watches hear nothing at the moment.
func (c *reconnector) staleWatches() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.disconnected)
}

// wrap makes a source of objects wait for the API server instead of failing while that is away. Those with a name are
// watched for as long as this process lives, and count as stale while they hear nothing.
func (c *reconnector) wrap(name string, lw *cache.ListWatch) *cache.ListWatch {
	list, open := lw.ListWithContextFunc, lw.WatchFuncWithContext
	connected := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (objects runtime.Object, err error) {
			err = c.retryWhileUnavailable(ctx, name, func() error {
				objects, err = list(ctx, o)
				return err
			})
			return objects, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (w apiwatch.Interface, err error) {
			err = c.retryWhileUnavailable(ctx, name, func() error {
				w, err = open(ctx, o)
				return err
			})
			if err == nil && c.isDisconnected(name) {
				w = c.connectedOnceCaughtUp(name, o, w)
			}
			return w, err
		},
	}
	return connected
}

// catchUpTime is how long a watch that goes on after an outage is still taken to be behind: what was missed is the first
// thing that the API server sends, unless it has forgotten that and says so.
const catchUpTime = time.Second

// connectedOnceCaughtUp ends the state of being disconnected once the watch has brought what was missed: it either goes on where it was,
// or begins with all objects and marks the end of those, or fails because it is too old to go on.
func (c *reconnector) connectedOnceCaughtUp(name string, o metav1.ListOptions, w apiwatch.Interface) apiwatch.Interface {
	connected := func() { c.setDisconnected(name, false) }
	var timer *time.Timer
	if o.SendInitialEvents == nil || !*o.SendInitialEvents {
		timer = time.AfterFunc(catchUpTime, connected)
	}
	return newObservedWatch(w, func(e apiwatch.Event) {
		switch {
		case e.Type == apiwatch.Error && timer != nil:
			timer.Stop()
		case e.Type == apiwatch.Bookmark && timer == nil:
			if o, err := meta.Accessor(e.Object); err == nil && o.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true" {
				timer = time.AfterFunc(catchUpTime, connected)
			}
		}
	})
}

// observedWatch passes on all that a watch brings. It ends with Stop also when nobody takes the event that it holds, with which
// apimachinery's filter would stay for good.
type observedWatch struct {
	apiwatch.Interface
	events  chan apiwatch.Event
	stopped chan struct{}
	stop    func()
}

func newObservedWatch(w apiwatch.Interface, observe func(apiwatch.Event)) *observedWatch {
	t := &observedWatch{Interface: w, events: make(chan apiwatch.Event), stopped: make(chan struct{})}
	t.stop = sync.OnceFunc(func() { close(t.stopped) })
	go func() {
		defer close(t.events)
		for e := range w.ResultChan() {
			observe(e)
			select {
			case t.events <- e:
			case <-t.stopped:
				return
			}
		}
	}()
	return t
}

func (t *observedWatch) ResultChan() <-chan apiwatch.Event { return t.events }

func (t *observedWatch) Stop() {
	t.stop()
	t.Interface.Stop()
}

func (c *reconnector) isDisconnected(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.disconnected[name]
}

func (c *reconnector) setDisconnected(name string, disconnected bool) {
	if name == "" {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if disconnected {
		c.disconnected[name] = true
	} else {
		delete(c.disconnected, name)
	}
}

// retryWhileUnavailable does it until it succeeds, fails for a reason that waiting does not help against, or ctx ends.
func (c *reconnector) retryWhileUnavailable(ctx context.Context, name string, do func() error) error {
	for {
		err := do()
		if err == nil || ctx.Err() != nil || !ServerUnavailable(err) {
			return err
		}
		c.onFailure()
		c.setDisconnected(name, true)
		select {
		case <-c.serverAvailable():
		case <-ctx.Done():
			return err
		}
	}
}

// Away tells a server that cannot answer now from one that says no. Whatever is not an answer of the server is an
// error of the way there.
func ServerUnavailable(err error) bool {
	if _, answered := err.(apierrors.APIStatus); !answered {
		return true
	}
	return apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err) || apierrors.IsServerTimeout(err) ||
		apierrors.IsTimeout(err) || apierrors.IsTooManyRequests(err)
}

// serverAvailable gives the channel that is closed when the server is back, and sees to it that somebody looks.
func (c *reconnector) serverAvailable() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.available == nil {
		c.available = make(chan struct{})
		go c.probeUntilAvailable()
	}
	return c.available
}

// probeUntilAvailable asks until the server answers. It ends with that: as long as a watch waits, somebody has to.
func (c *reconnector) probeUntilAvailable() {
	for pause := initialProbeBackoff; ; pause = min(pause*3/2, maxProbeBackoff) {
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
	close(c.available)
	c.available = nil
}
