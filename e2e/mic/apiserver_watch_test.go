package mic

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// wantsMetadataOnly reports whether the client asks for objects without spec and status.
func (c *call) wantsMetadataOnly() bool {
	return strings.Contains(c.header.Get("Accept"), "as=PartialObjectMetadata")
}

// encode returns the object in the form that the client asks for.
func (c *call) encode(o *object) []byte {
	if !c.wantsMetadataOnly() {
		return o.raw
	}
	raw, err := json.Marshal(map[string]any{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": o.Object["metadata"]})
	if err != nil {
		panic(err) // cannot happen: o was decoded from JSON
	}
	return raw
}

func (c *call) objectResponse(status int, o *object) (*http.Response, error) {
	return textResponse(status, "application/json", c.encode(o)), nil
}

func (s *apiServer) list(c *call) (*http.Response, error) {
	selected, err := s.selectObjects(c)
	if err != nil {
		return nil, err
	}
	kind, apiVersion := c.kind.Kind+"List", c.kind.GroupVersion().String()
	if c.wantsMetadataOnly() {
		kind, apiVersion = "PartialObjectMetadataList", "meta.k8s.io/v1"
	}
	var b bytes.Buffer
	b.WriteString(`{"kind":"` + kind + `","apiVersion":"` + apiVersion + `","metadata":{"resourceVersion":"` + strconv.FormatInt(s.version, 10) + `"},"items":[`)
	for i, o := range selected {
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(c.encode(o))
	}
	b.WriteString(`]}`)
	return textResponse(http.StatusOK, "application/json", b.Bytes()), nil
}

// selectObjects returns the objects that the call selects, sorted by namespace and name.
func (s *apiServer) selectObjects(c *call) ([]*object, error) {
	match, err := c.selector()
	if err != nil {
		return nil, err
	}
	var found []*object
	for _, o := range c.kind.objects {
		if match(o) {
			found = append(found, o)
		}
	}
	slices.SortFunc(found, func(a, b *object) int {
		return cmp.Or(strings.Compare(a.key.namespace, b.key.namespace), strings.Compare(a.key.name, b.key.name))
	})
	return found, nil
}

// watchStream is the response body of a watch. A goroutine that waits in Read is durably blocked in the sense of
// testing/synctest, so that the fake clock can advance.
type watchStream struct {
	server    *apiServer
	call      *call
	matches   func(*object) bool
	ctx       context.Context
	timeout   *time.Timer
	bookmarks *time.Timer

	mu      sync.Mutex
	frames  []frame
	unread  []byte // the rest of a frame that was partly read
	lastDue time.Time
	wake    chan struct{}
	err     error // returned once all frames are read
}

// frame is one event and the time when the client can read it.
type frame struct {
	due  time.Time
	data []byte
}

const (
	bookmarkInterval        = time.Minute
	maxWatchDuration        = 30 * time.Minute
	initialEventsAnnotation = "k8s.io/initial-events-end"
)

func (s *apiServer) watch(ctx context.Context, c *call) (*http.Response, error) {
	match, err := c.selector()
	if err != nil {
		return nil, err
	}
	w := &watchStream{server: s, call: c, matches: match, ctx: ctx, wake: make(chan struct{}, 1)}
	initial := c.query.Get("sendInitialEvents") == "true"
	if initial && s.faults.noWatchList {
		return nil, apierrors.NewInvalid(metav1.SchemeGroupVersion.WithKind("ListOptions").GroupKind(), "", field.ErrorList{field.Forbidden(field.NewPath("sendInitialEvents"), "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled")})
	}
	since, err := strconv.ParseInt(c.query.Get("resourceVersion"), 10, 64)
	switch fresh := err != nil || since == 0; {
	case initial || fresh:
		all, err := s.selectObjects(c)
		if err != nil {
			return nil, err
		}
		for _, o := range all {
			w.send("ADDED", c.encode(o), 0)
		}
		if initial {
			w.send("BOOKMARK", w.bookmark(s.version, true), 0)
		}
	case since < c.kind.compacted:
		w.send("ERROR", expiredStatus(since), 0)
		w.closeAfterFrames(io.EOF)
	default:
		for _, one := range c.kind.history {
			if one.version > since {
				w.sendChange(one, 0)
			}
		}
	}
	w.register()
	r := textResponse(http.StatusOK, "application/json", nil)
	r.ContentLength, r.Body = -1, w
	return r, nil
}

// register subscribes the stream to changes, unless the stream has already ended. It ends the stream after the timeout
// that the client requests, and at the latest after maxWatchDuration. The server's mu is held.
func (w *watchStream) register() {
	if w.err != nil {
		return
	}
	w.call.kind.streams[w] = struct{}{}
	lasts := maxWatchDuration
	if seconds, err := strconv.Atoi(w.call.query.Get("timeoutSeconds")); err == nil && seconds > 0 {
		lasts = min(lasts, time.Duration(seconds)*time.Second)
	}
	w.timeout = time.AfterFunc(lasts, func() { w.closeAfterFrames(io.EOF) })
	if w.server.faults.bookmarks && w.call.query.Get("allowWatchBookmarks") == "true" {
		w.bookmarks = time.AfterFunc(bookmarkInterval, w.sendBookmark)
	}
}

func (w *watchStream) sendBookmark() {
	w.server.mu.Lock()
	defer w.server.mu.Unlock()
	if _, ok := w.call.kind.streams[w]; ok {
		w.send("BOOKMARK", w.bookmark(w.server.version, false), w.call.kind.watchDelay)
		w.bookmarks.Reset(bookmarkInterval)
	}
}

func (w *watchStream) bookmark(version int64, initial bool) []byte {
	meta := metav1.ObjectMeta{ResourceVersion: strconv.FormatInt(version, 10)}
	if initial {
		meta.Annotations = map[string]string{initialEventsAnnotation: "true"}
	}
	kind, apiVersion := w.call.kind.Kind, w.call.kind.GroupVersion().String()
	if w.call.wantsMetadataOnly() {
		kind, apiVersion = "PartialObjectMetadata", "meta.k8s.io/v1"
	}
	return mustMarshal(metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{Kind: kind, APIVersion: apiVersion}, ObjectMeta: meta})
}

func expiredStatus(version int64) []byte {
	status := apierrors.NewResourceExpired("too old resource version: " + strconv.FormatInt(version, 10)).Status()
	status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	return mustMarshal(status)
}

func mustMarshal(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

// sendChange sends the event for a change. A client that selects objects sees an object as added or deleted when the
// change makes the object match or no longer match. sendChange sends nothing if the object matches neither before nor
// after the change.
func (w *watchStream) sendChange(c change, lag time.Duration) {
	before := c.before != nil && w.matches(c.before)
	now := !c.deleted && w.matches(c.after)
	switch {
	case before && now:
		w.send("MODIFIED", w.call.encode(c.after), lag)
	case now:
		w.send("ADDED", w.call.encode(c.after), lag)
	case before:
		w.send("DELETED", w.call.encode(c.after), lag)
	}
}

func (w *watchStream) send(kind string, raw []byte, lag time.Duration) {
	data := make([]byte, 0, len(raw)+40)
	data = append(data, `{"type":"`+kind+`","object":`...)
	data = append(append(data, raw...), '}', '\n')
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return
	}
	if at := time.Now().Add(lag); at.After(w.lastDue) {
		w.lastDue = at
	}
	w.frames = append(w.frames, frame{w.lastDue, data})
	w.notify()
}

// notify wakes the reader; w.mu is held.
func (w *watchStream) notify() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// closeAfterFrames ends the stream once the reader has read all frames.
func (w *watchStream) closeAfterFrames(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.notify()
}

// abort ends the stream at once, with err.
func (w *watchStream) abort(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.frames, w.unread, w.err = nil, nil, err
	w.notify()
}

func (w *watchStream) Read(p []byte) (int, error) {
	for {
		n, wait, err := w.next(p)
		if n > 0 || err != nil {
			return n, err
		}
		var due <-chan time.Time
		if wait > 0 {
			due = time.After(wait)
		}
		select {
		case <-w.wake:
		case <-due:
		case <-w.ctx.Done():
			return 0, w.ctx.Err()
		}
	}
}

// next reads from the frames that are due. If none is, it returns the time until the next frame is due, or 0 if there
// is no frame.
func (w *watchStream) next(p []byte) (n int, wait time.Duration, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.unread) == 0 && len(w.frames) > 0 {
		if wait := time.Until(w.frames[0].due); wait > 0 {
			return 0, wait, nil
		}
		w.unread, w.frames = w.frames[0].data, w.frames[1:]
	}
	if len(w.unread) == 0 {
		return 0, 0, w.err
	}
	n = copy(p, w.unread)
	w.unread = w.unread[n:]
	return n, 0, nil
}

func (w *watchStream) Close() error {
	w.server.mu.Lock()
	defer w.server.mu.Unlock()
	delete(w.call.kind.streams, w)
	if w.timeout != nil {
		w.timeout.Stop()
	}
	if w.bookmarks != nil {
		w.bookmarks.Stop()
	}
	w.abort(io.ErrClosedPipe)
	return nil
}
