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

// apiFaults is what is wrong with the API server; guarded by its mutex.
type apiFaults struct {
	unavailable bool                     // nobody answers
	failures    []int                    // HTTP status of the next requests; 0 is none: the connection is lost after a while
	watchDelay  map[string]time.Duration // how late watches of a resource are
	noWatchList bool                     // refuses to begin a watch with all objects, as old servers do
	bookmarks   bool
}

var errConnectionRefused = errors.New("dial tcp 10.0.0.1:443: connect: connection refused")

// connectionLostAfter is how long a client waits until HTTP/2 tells it that nobody is there any more.
const connectionLostAfter = 45 * time.Second

// injectedFault is the error that a call meets instead of the server.
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
		return apierrors.NewGenericServerResponse(status, c.verb, schema.GroupResource{}, c.name, "switched", 0, true)
	}
	return nil
}

// makeUnavailable lets nobody in, and breaks what is open.
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

// failNextRequests answers the next requests with these statuses.
func (s *apiServer) failNextRequests(statuses ...int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.failures = append(s.faults.failures, statuses...)
}

// delayWatches delays what watches of a resource tell.
func (s *apiServer) delayWatches(resource string, d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.faults.watchDelay == nil {
		s.faults.watchDelay = map[string]time.Duration{}
	}
	s.faults.watchDelay[resource] = d
}

// expireWatches cuts all watches, and none can go on where it was: clients have to list again.
func (s *apiServer) expireWatches() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	for _, k := range s.kinds {
		k.compacted = s.version
	}
	s.abortWatches()
}

// abortWatches breaks the open watches; s.mu is held.
func (s *apiServer) abortWatches() {
	for _, k := range s.kinds {
		for w := range k.streams {
			w.abort(io.ErrUnexpectedEOF)
		}
	}
}

// clearFaults ends all faults.
func (s *apiServer) clearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.unavailable, s.faults.failures, s.faults.watchDelay = false, nil, nil
}
