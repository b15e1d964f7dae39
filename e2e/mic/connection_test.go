package mic

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// connection carries all requests of one controller process, to the API server and to ARM, and their responses.
// Disconnecting it stands for killing the process: requests that have reached a server take effect, no other request
// reaches a server, and no response reaches the process.
type connection struct {
	name       string
	ctx        context.Context
	disconnect context.CancelFunc
	// maxLatency limits the latency of a request, and that of its response. Each latency depends only on the seed, the
	// request and how often it was sent before.
	maxLatency time.Duration
	seed       uint64

	trace func(request, string) // called with the outcome of each request that reaches the server; may be nil

	mu            sync.Mutex
	requestCounts map[string]uint64
	watches       map[*http.Response]context.CancelFunc // open watches
	before        func(request) error                   // called before a request takes effect; may block
	after         func(request) error                   // called after a request has taken effect, before its response
}

// request describes an HTTP request for hooks and traces.
type request struct {
	ctx         context.Context
	target      string // toAPI, toARM or toDiscovery
	description string // such as "create azureassignedidentities ns/name", "PATCH /subscriptions/…"
	isWrite     bool
}

const (
	toAPI = "api"
	toARM = "arm"
	// toDiscovery is for requests to the API server that name no resource, such as discovery. They have no latency:
	// controller-runtime sends them with a mutex locked, and the fake clock does not advance while a goroutine waits
	// for a mutex.
	toDiscovery = "discovery"
)

var errProcessKilled = errors.New("connection reset: the process was killed")

func newConnection(name string, seed uint64) *connection {
	ctx, cancel := context.WithCancel(context.Background())
	return &connection{name: name, ctx: ctx, disconnect: cancel, maxLatency: 20 * time.Millisecond, seed: seed, requestCounts: map[string]uint64{}, watches: map[*http.Response]context.CancelFunc{}}
}

// hook sets the functions that are called for each request from now on; nil for none. If before returns an error, the
// request has no effect. The client gets the error of before or after instead of the response.
func (l *connection) hook(before, after func(request) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.before, l.after = before, after
}

func (l *connection) hooks() (before, after func(request) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.before, l.after
}

// roundTrip delivers one request and returns its response.
func (l *connection) roundTrip(r request, effect func(context.Context) (*http.Response, error)) (*http.Response, error) {
	ctx, cancel := context.WithCancel(r.ctx)
	unhook := context.AfterFunc(l.ctx, cancel)
	done := func() { unhook(); cancel() }
	r.ctx = ctx
	var there, back time.Duration
	if r.target != toDiscovery {
		there, back = l.latencies(r)
	}
	response, err := l.send(r, there, back, effect)
	if err != nil {
		done()
		if l.ctx.Err() != nil {
			err = errProcessKilled
		}
		return nil, err
	}
	response.Body = &closeNotifier{response.Body, func() { l.removeWatch(response); done() }}
	if strings.HasPrefix(r.description, "watch ") {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.watches[response] = cancel
	}
	return response, nil
}

func (l *connection) removeWatch(response *http.Response) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.watches, response)
}

// breakWatches aborts the open watches.
func (l *connection) breakWatches() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, cancel := range l.watches {
		cancel()
	}
}

func (l *connection) send(r request, there, back time.Duration, effect func(context.Context) (*http.Response, error)) (*http.Response, error) {
	if err := pause(r.ctx, there); err != nil {
		return nil, err
	}
	before, _ := l.hooks()
	if before != nil {
		if err := before(r); err != nil {
			return errorResponse(err)
		}
	}
	if err := r.ctx.Err(); err != nil {
		return nil, err
	}
	response, err := effect(r.ctx)
	if l.trace != nil {
		l.trace(r, outcomeText(response, err))
	}
	if err != nil {
		return nil, err
	}
	_, after := l.hooks()
	if after != nil {
		err = after(r)
	}
	if err == nil {
		err = pause(r.ctx, back)
	}
	if err != nil {
		_ = response.Body.Close()
		return errorResponse(err)
	}
	return response, nil
}

func outcomeText(r *http.Response, err error) string {
	if err != nil {
		return err.Error()
	}
	return r.Status
}

// errorResponse returns the response of an API server that rejects a request with err, if err is an API status. Any
// other err stands for a broken connection, and errorResponse returns err itself.
func errorResponse(err error) (*http.Response, error) {
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		return statusResponse(err), nil
	}
	return nil, err
}

// latencies returns the latency of this request and that of its response.
func (l *connection) latencies(r request) (there, back time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requestCounts[r.description]++
	h := fnv.New64a()
	fmt.Fprint(h, l.seed, r.target, r.description, l.requestCounts[r.description])
	n := h.Sum64()
	return time.Duration(n % uint64(l.maxLatency)), time.Duration((n >> 32) % uint64(l.maxLatency))
}

func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// closeNotifier is a response body that releases the request's resources when it is closed.
type closeNotifier struct {
	io.ReadCloser
	done func()
}

func (c *closeNotifier) Close() error {
	defer c.done()
	return c.ReadCloser.Close()
}

// apiHandler handles one call to an API server. Its response can be a Status that reports an error.
type apiHandler func(context.Context, *http.Request, *call) (*http.Response, error)

// apiTransport is the transport to an API server. s parses the requests; handle may be the handler of another server.
func (l *connection) apiTransport(s *apiServer, handle apiHandler) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		c, err := s.parse(r)
		if err != nil {
			return nil, err
		}
		target := toAPI
		if c.kind == nil {
			target = toDiscovery
		}
		return l.roundTrip(request{r.Context(), target, c.String(), c.isWrite()}, func(ctx context.Context) (*http.Response, error) {
			return handle(ctx, r, c)
		})
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
