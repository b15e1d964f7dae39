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
	away             bool                     // nobody answers
	failures         []int                    // HTTP status of the next requests; 0 is none: the connection is lost after a while
	lag              map[string]time.Duration // how late watches of a resource are
	withoutWatchList bool                     // refuses to begin a watch with all objects, as old servers do
	bookmarks        bool
}

var errRefused = errors.New("dial tcp 10.0.0.1:443: connect: connection refused")

// lostAfter is how long a client waits until HTTP/2 tells it that nobody is there any more.
const lostAfter = 45 * time.Second

// disturb is the error that a call meets instead of the server.
func (s *apiServer) disturb(ctx context.Context, c *call) error {
	s.mu.Lock()
	away, status := s.faults.away, -1
	if !away && len(s.faults.failures) > 0 {
		status, s.faults.failures = s.faults.failures[0], s.faults.failures[1:]
	}
	s.mu.Unlock()
	switch {
	case away:
		return errRefused
	case status == 0:
		if err := pause(ctx, lostAfter); err != nil {
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

// goAway lets nobody in, and breaks what is open.
func (s *apiServer) goAway() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.away = true
	s.cutAll()
}

func (s *apiServer) comeBack() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.away = false
}

// failNext answers the next requests with these statuses.
func (s *apiServer) failNext(statuses ...int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.failures = append(s.faults.failures, statuses...)
}

// lagBehind delays what watches of a resource tell.
func (s *apiServer) lagBehind(resource string, d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.faults.lag == nil {
		s.faults.lag = map[string]time.Duration{}
	}
	s.faults.lag[resource] = d
}

// forget cuts all watches, and none can go on where it was: clients have to list again.
func (s *apiServer) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	for _, k := range s.kinds {
		k.compacted = s.version
	}
	s.cutAll()
}

// cutAll breaks the open watches; s.mu is held.
func (s *apiServer) cutAll() {
	for _, k := range s.kinds {
		for w := range k.streams {
			w.cut(io.ErrUnexpectedEOF)
		}
	}
}

// recover ends all faults.
func (s *apiServer) recover() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults.away, s.faults.failures, s.faults.lag = false, nil, nil
}
