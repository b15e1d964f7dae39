package telemetry

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/text"
	"github.com/podidentity/podidentity/metadata"
)

const (
	// eventReason is the field reason of each Event.
	eventReason = "TokenRefused"

	// eventInterval is the minimum time between two reports of the same refusal of a pod. The second report updates the
	// Event of the first. The field count of the Event is the number of refusals that NMI has counted.
	eventInterval = 5 * time.Minute
	// The Events that a node may write per second, and the burst. They are limited because the API server stores the
	// Events of the whole cluster.
	eventRate, eventBurst = 1, 20
	// maxRefusals bounds how many refusals NMI remembers. It remembers refusals in order to recognize repeated ones.
	maxRefusals = 512
	// eventQueueSize bounds the number of Events that wait to be written. If the queue is full, the refusal is only
	// counted, and the next Event for the same refusal contains that count.
	eventQueueSize = 64

	eventTimeout    = 5 * time.Second
	maxMessageBytes = 1000 // the API server accepts 1024
)

// Events reports refusals as Events of the refused pods, so that `kubectl describe pod` shows them.
//
// It does not use client-go's recorder: the recorder needs the code for patches and schemas, which would take memory on
// each node.
type Events struct {
	write func(context.Context, *corev1.Event) error // see cluster.Client.WriteEvent
	node  string
	queue chan *corev1.Event

	mu       sync.Mutex // guards the fields below
	limiter  *rate.Limiter
	refusals *simplelru.LRU[refusalKey, *refusalCount]
}

type refusalKey struct {
	podUID  string
	reason  identity.Reason
	message string
}

type refusalCount struct {
	eventName string
	first     time.Time
	reported  time.Time // when the last Event was queued
	count     int32
}

// NewEvents returns Events for the pods of a node. Run writes them with write.
func NewEvents(node string, write func(context.Context, *corev1.Event) error) (*Events, error) {
	refusals, err := simplelru.NewLRU[refusalKey, *refusalCount](maxRefusals, nil)
	return &Events{write: write, node: node, queue: make(chan *corev1.Event, eventQueueSize), limiter: rate.NewLimiter(eventRate, eventBurst), refusals: refusals}, err
}

// Refused counts the refusal. It then queues an Event, except in three cases: it queued an Event for the same refusal
// less than eventInterval ago, the rate limit is reached, or the queue is full. It does not block.
func (e *Events) Refused(pod *corev1.Pod, refusal *metadata.Error) {
	message := refusal.Detail
	if message == "" {
		message = refusal.Description
	}
	key := refusalKey{string(pod.UID), refusal.Reason, message}
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	known, ok := e.refusals.Get(key)
	if !ok {
		known = &refusalCount{eventName: fmt.Sprintf("%.230s.%x", pod.Name, now.UnixNano()), first: now}
		e.refusals.Add(key, known)
	}
	known.count++
	if now.Sub(known.reported) < eventInterval || !e.limiter.AllowN(now, 1) {
		return
	}
	select {
	case e.queue <- e.event(pod, known, refusal.Reason, message, now):
		known.reported = now
	default:
	}
}

func (e *Events) event(pod *corev1.Pod, known *refusalCount, reason identity.Reason, message string, now time.Time) *corev1.Event {
	return &corev1.Event{
		ObjectMeta:          metav1.ObjectMeta{Namespace: pod.Namespace, Name: known.eventName},
		InvolvedObject:      corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		Type:                corev1.EventTypeWarning,
		Reason:              eventReason,
		Message:             text.Truncate(string(reason)+": "+message, maxMessageBytes),
		Source:              corev1.EventSource{Component: "podidentity-nmi", Host: e.node},
		FirstTimestamp:      metav1.NewTime(known.first),
		LastTimestamp:       metav1.NewTime(now),
		Count:               known.count,
		ReportingController: "podidentity.io/nmi",
		ReportingInstance:   e.node,
	}
}

// Run writes the queued Events until ctx ends. It drops an Event that it cannot write, because NMI also logs each
// refusal at level warn or info.
func (e *Events) Run(ctx context.Context) {
	for {
		select {
		case event := <-e.queue:
			writing, cancel := context.WithTimeout(ctx, eventTimeout)
			_ = e.write(writing, event) // the metric of failed API requests counts the error
			cancel()
		case <-ctx.Done():
			return
		}
	}
}
