package mic

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// apiFaults are the faults of the API server; guarded by objectStore.mu.
type apiFaults struct {
	unavailable bool  // connections are refused
	failures    []int // HTTP status of the next requests; 0: the connection is lost after a while, without a response
	noWatchList bool  // reject watches with sendInitialEvents, as old servers do
	bookmarks   bool  // send bookmarks to watches that allow them
}

var errConnectionRefused = errors.New("dial tcp 10.0.0.1:443: connect: connection refused")

// connectionLostAfter is how long a client waits until HTTP/2 pings detect a dead connection.
const connectionLostAfter = 45 * time.Second

// injectedFault returns the error that the client gets instead of the server's response; nil if there is no fault.
func (s *apiServer) injectedFault(ctx context.Context, c *call) error {
	s.mu.Lock()
	away, status := s.faults.unavailable, -1
	if !away && len(s.faults.failures) > 0 {
		status, s.faults.failures = s.faults.failures[0], s.faults.failures[1:]
	}
	s.mu.Unlock()
	switch {
	case away:
		return errConnectionRefused
	case status == 0:
		if err := pause(ctx, connectionLostAfter); err != nil {
			return err
		}
		return errors.New("http2: client connection lost")
	case status == http.StatusTooManyRequests:
		return apierrors.NewTooManyRequests("too many requests, please try again later", 1)
	case status > 0:
		return apierrors.NewGenericServerResponse(status, c.verb, schema.GroupResource{}, c.name, "injected fault", 0, true)
	}
	return nil
}

// makeUnavailable refuses new connections and aborts open watches.
func (s *apiServer) makeUnavailable() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.unavailable = true
	s.abortWatches()
}

func (s *apiServer) makeAvailable() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.unavailable = false
}

// failNextRequests makes the next requests fail with these HTTP statuses. For status 0, the connection is lost.
func (s *apiServer) failNextRequests(statuses ...int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.failures = append(s.faults.failures, statuses...)
}

// delayWatches delays the events of a resource.
func (s *apiServer) delayWatches(resource string, d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.kinds {
		if k.resource == resource {
			k.watchDelay = d
		}
	}
}

// expireWatches aborts all watches and compacts the history: no watch can resume, and clients have to list again.
func (s *apiServer) expireWatches() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	for _, k := range s.kinds {
		k.compacted = s.version
	}
	s.abortWatches()
}

// abortWatches aborts the open watches; s.mu is held.
func (s *apiServer) abortWatches() {
	for _, k := range s.kinds {
		for w := range k.streams {
			w.abort(io.ErrUnexpectedEOF)
		}
	}
}

// clearFaults removes the temporary faults. noWatchList and bookmarks stay: they are properties of the server.
func (s *apiServer) clearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.unavailable, s.faults.failures = false, nil
	for _, k := range s.kinds {
		k.watchDelay = 0
	}
}
