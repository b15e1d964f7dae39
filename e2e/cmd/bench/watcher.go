package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"k8s.io/client-go/rest"
)

// watcher watches AzureAssignedIdentities like NMI, and records when the assignment of each pod is Assigned for the
// first time.
type watcher struct {
	version string // resourceVersion of the last event; needs no mu, because only the goroutine of the watch uses it

	mu       sync.Mutex
	created  map[string]time.Time // by pod: when the API server acknowledged its creation
	assigned map[string]time.Time // by pod: when its assignment was Assigned for the first time
	live     map[string]struct{}  // assignments that exist
	err      error
}

// watchEvent contains the fields of a watch event that are used here.
type watchEvent struct {
	Type   string `json:"type"`
	Object struct {
		Metadata struct {
			Namespace       string `json:"namespace"`
			Name            string `json:"name"`
			ResourceVersion string `json:"resourceVersion"`
		} `json:"metadata"`
		Spec struct {
			Pod          string `json:"pod"`
			PodNamespace string `json:"podNamespace"`
		} `json:"spec"`
		Status  state  `json:"status"`
		Message string `json:"message"` // of an error
	} `json:"object"`
}

// state is status.status of an assignment. In an event of type ERROR, status is a string, which UnmarshalJSON ignores.
type state struct{ Status string }

func (s *state) UnmarshalJSON(text []byte) error {
	if !bytes.HasPrefix(text, []byte("{")) {
		return nil
	}
	var o struct{ Status string }
	err := json.Unmarshal(text, &o)
	s.Status = o.Status
	return err
}

// newWatcher starts a watch. No assignment may exist yet, because the watch would report it as new.
func newWatcher(ctx context.Context, client rest.Interface) (*watcher, error) {
	w := &watcher{created: map[string]time.Time{}, assigned: map[string]time.Time{}, live: map[string]struct{}{}}
	watch := func() (io.ReadCloser, error) {
		return client.Get().AbsPath("/apis/aadpodidentity.k8s.io/v1/azureassignedidentities").SetHeader("Accept", "application/json").
			Param("watch", "true").Param("resourceVersion", w.version).Stream(ctx)
	}
	stream, err := watch()
	if err != nil {
		return nil, fmt.Errorf("watching assignments: %w", err)
	}
	go func() {
		for err == nil {
			// The API server ends watches when the CRD has changed, even if the API server itself changed it.
			if err = w.readAll(stream); err == nil {
				stream.Close()
				stream, err = watch()
			}
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.err = fmt.Errorf("watching assignments: %w", err)
	}()
	return w, nil
}

// readAll records events until the stream ends.
func (w *watcher) readAll(stream io.Reader) error {
	events := json.NewDecoder(stream)
	for {
		var e watchEvent
		err := events.Decode(&e)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case e.Type == "ERROR":
			return fmt.Errorf("the API server ended the watch: %s", e.Object.Message)
		}
		w.record(e, time.Now())
	}
}

func (w *watcher) record(e watchEvent, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.version = e.Object.Metadata.ResourceVersion
	key := e.Object.Metadata.Namespace + "/" + e.Object.Metadata.Name
	if e.Type == "DELETED" {
		delete(w.live, key)
		return
	}
	w.live[key] = struct{}{}
	pod := e.Object.Spec.PodNamespace + "/" + e.Object.Spec.Pod
	if _, before := w.assigned[pod]; !before && e.Object.Status.Status == "Assigned" {
		w.assigned[pod] = now
	}
}

// made records that a pod (namespace/name) was created now.
func (w *watcher) made(pod string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.created[pod] = time.Now()
}

// took returns how long each of the pods waited until it was Assigned, sorted, and when the last one was Assigned. It
// leaves out pods that still wait.
func (w *watcher) took(pods []string) (waits []time.Duration, last time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, pod := range pods {
		at, ok := w.assigned[pod]
		if !ok {
			continue
		}
		// The Assigned event may arrive before the API server's response to the creation of the pod.
		waits = append(waits, max(0, at.Sub(w.created[pod])))
		if at.After(last) {
			last = at
		}
	}
	slices.Sort(waits)
	return waits, last
}

// pending returns how many of the pods have never been Assigned, and how many assignments exist. It returns an error if
// the watch has ended.
func (w *watcher) pending(pods []string) (waiting, live int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, pod := range pods {
		if _, ok := w.assigned[pod]; !ok {
			waiting++
		}
	}
	return waiting, len(w.live), w.err
}
