package cluster

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/internal/kube"
)

// The first probe of an unavailable API server follows after initialProbeBackoff. Each further wait is one and a half
// times as long as the previous one, up to maxProbeBackoff. Each wait is shortened at random by up to a half, so that
// the nodes of a large cluster do not reconnect at the same moment.
const (
	initialProbeBackoff, maxProbeBackoff = 250 * time.Millisecond, 10 * time.Second
	probeTimeout                         = 3 * time.Second
)

// catchUpTime is the time that a reconnected watch gets to receive the events that it missed. The API server sends
// these events first, or an error event if it has discarded them. Until the time has passed, the watch counts as stale,
// see connectAfterCatchUp.
const catchUpTime = time.Second

// reconnector reconnects the watches of this node together after the API server was unavailable, and records which of
// them are stale: disconnected, or not caught up yet.
//
// Without the reconnector, each watch would back off for up to a minute, and would reconnect long after the API server
// is available again. The reconnector sends one small probe for all watches. As soon as a probe succeeds, all watches
// reconnect.
//
// While a watch is stale, an object that NMI does not have may exist: the watch may not have received it yet. Package
// request therefore responds with an error that clients retry. Clients do not retry a refusal.
type reconnector struct {
	probe     func(context.Context) error // returns nil if the API server is ready
	onFailure func()                      // is called if the API server is unavailable for a list or a watch

	mu           sync.Mutex
	available    chan struct{}   // is closed when the server is available again; nil unless a probe runs
	disconnected map[string]bool // the names of the stale watches
}

func newReconnector(probe func(context.Context) error, onFailure func()) *reconnector {
	return &reconnector{probe: probe, onFailure: onFailure, disconnected: map[string]bool{}}
}

// staleWatch returns the name of a stale watch, or "" if there is none.
func (r *reconnector) staleWatch() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name := range r.disconnected {
		return name
	}
	return ""
}

func (r *reconnector) staleWatches() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.disconnected)
}

// wrap returns a ListWatch that waits while the API server is unavailable, instead of returning an error. If name is
// not "", the ListWatch counts as stale from the moment at which it finds the API server unavailable until it has
// reconnected and caught up. Such a ListWatch must be in use until the process ends: without a new connection it would
// count as stale for ever.
func (r *reconnector) wrap(name string, lw *cache.ListWatch) *cache.ListWatch {
	list, watch := lw.ListWithContextFunc, lw.WatchFuncWithContext
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (objects runtime.Object, err error) {
			err = r.retryWhileUnavailable(ctx, name, func() error {
				objects, err = list(ctx, o)
				return err
			})
			return objects, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (w apiwatch.Interface, err error) {
			err = r.retryWhileUnavailable(ctx, name, func() error {
				w, err = watch(ctx, o)
				return err
			})
			if err == nil && r.isDisconnected(name) {
				w = r.connectAfterCatchUp(name, o, w)
			}
			return w, err
		},
	}
}

// connectAfterCatchUp marks a watch as connected when the watch has had time to receive the events that it missed. For
// a watch that sends all objects first, this is catchUpTime after the bookmark that follows the last of these objects.
// For any other watch, it is catchUpTime after the call. If an error event arrives earlier, for example because the API
// server has discarded the missed events, the watch stays disconnected.
func (r *reconnector) connectAfterCatchUp(name string, o metav1.ListOptions, w apiwatch.Interface) apiwatch.Interface {
	connect := func() { r.setDisconnected(name, false) }
	var timer *time.Timer
	if o.SendInitialEvents == nil || !*o.SendInitialEvents {
		timer = time.AfterFunc(catchUpTime, connect)
	}
	return newObservedWatch(w, func(e apiwatch.Event) {
		switch {
		case e.Type == apiwatch.Error && timer != nil:
			timer.Stop()
		case e.Type == apiwatch.Bookmark && timer == nil:
			if o, err := meta.Accessor(e.Object); err == nil && o.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true" {
				timer = time.AfterFunc(catchUpTime, connect)
			}
		}
	})
}

// observedWatch calls a function for each event of a watch and passes the event on. Its goroutine ends after Stop, even
// if nobody receives the event that the goroutine is about to send. In that case the goroutine of apimachinery's
// watch.Filter would never end, so watch.Filter is not used here.
type observedWatch struct {
	apiwatch.Interface
	events  chan apiwatch.Event
	stopped chan struct{}
	stop    func()
}

func newObservedWatch(w apiwatch.Interface, observe func(apiwatch.Event)) *observedWatch {
	o := &observedWatch{Interface: w, events: make(chan apiwatch.Event), stopped: make(chan struct{})}
	o.stop = sync.OnceFunc(func() { close(o.stopped) })
	go func() {
		defer close(o.events)
		for e := range w.ResultChan() {
			observe(e)
			select {
			case o.events <- e:
			case <-o.stopped:
				return
			}
		}
	}()
	return o
}

// ResultChan implements watch.Interface.
func (o *observedWatch) ResultChan() <-chan apiwatch.Event { return o.events }

// Stop implements watch.Interface.
func (o *observedWatch) Stop() {
	o.stop()
	o.Interface.Stop()
}

func (r *reconnector) isDisconnected(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.disconnected[name]
}

func (r *reconnector) setDisconnected(name string, disconnected bool) {
	if name == "" {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if disconnected {
		r.disconnected[name] = true
	} else {
		delete(r.disconnected, name)
	}
}

// retryWhileUnavailable calls send until send succeeds, the API server refuses the request, or ctx ends. Before each
// retry it waits until a probe succeeds.
func (r *reconnector) retryWhileUnavailable(ctx context.Context, name string, send func() error) error {
	for {
		err := send()
		if err == nil || ctx.Err() != nil || !kube.IsUnavailable(err) {
			return err
		}
		r.onFailure()
		r.setDisconnected(name, true)
		select {
		case <-r.serverAvailable(): //nolint:contextcheck // others wait for the API server, too
		case <-ctx.Done():
			return err
		}
	}
}

// serverAvailable returns a channel that is closed when the API server is available again. It starts the probes unless
// they already run.
func (r *reconnector) serverAvailable() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.available == nil {
		r.available = make(chan struct{})
		go r.probeUntilAvailable()
	}
	return r.available
}

// probeUntilAvailable sends probes until one succeeds, even if no watch waits any more. It takes no context, because
// watches with different contexts wait for its result.
func (r *reconnector) probeUntilAvailable() {
	for backoff := initialProbeBackoff; ; backoff = min(backoff*3/2, maxProbeBackoff) {
		time.Sleep(backoff/2 + time.Duration(rand.Int64N(int64(backoff/2))))
		ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
		err := r.probe(ctx)
		cancel()
		if err == nil {
			break
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.available)
	r.available = nil
}
