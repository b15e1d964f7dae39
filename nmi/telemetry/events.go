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
	// eventReason is what `kubectl describe pod` shows in its column of reasons.
	eventReason = "TokenRefused"

	// The same refusal of the same pod is told again after eventInterval, with the number of times it has happened.
	eventInterval = 5 * time.Minute
	// A node writes so many events a second, and so many at once: the API server keeps them for everybody.
	eventRate, eventBurst = 1, 20
	// maxReported bounds what is remembered to tell one refusal from another.
	maxReported = 512
	// eventQueueSize bounds what waits to be written. What does not fit is told with the next of its kind.
	eventQueueSize = 64

	eventTimeout = 5 * time.Second
	maxEventText = 1000 // the API server takes 1024 bytes
)

// Events tells the refusals of pods as Events of the cluster, so that `kubectl describe pod` shows why.
//
// It is written by hand because client-go's recorder brings the machinery of patches and schemas with it, whose memory
// would be paid on every node.
type Events struct {
	write func(context.Context, *corev1.Event) error // creates it, or replaces the one of its name
	node  string
	queue chan *corev1.Event

	mu       sync.Mutex // guards all below
	limiter  *rate.Limiter
	reported *simplelru.LRU[refusalKey, *refusalCount]
}

type refusalKey struct {
	pod    string // UID
	reason identity.Reason
	text   string
}

type refusalCount struct {
	name  string // of the Event
	first time.Time
	last  time.Time // when it was told last
	count int32
}

func NewEvents(node string, write func(context.Context, *corev1.Event) error) (*Events, error) {
	reported, err := simplelru.NewLRU[refusalKey, *refusalCount](maxReported, nil)
	return &Events{write: write, node: node, queue: make(chan *corev1.Event, eventQueueSize), limiter: rate.NewLimiter(eventRate, eventBurst), reported: reported}, err
}

// Refused notes that a pod was refused a token. It does not wait.
func (e *Events) Refused(pod *corev1.Pod, refusal *metadata.Error) {
	text := refusal.Detail
	if text == "" {
		text = refusal.Description
	}
	key := refusalKey{string(pod.UID), refusal.Reason, text}
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	known, ok := e.reported.Get(key)
	if !ok {
		known = &refusalCount{name: fmt.Sprintf("%.230s.%x", pod.Name, now.UnixNano()), first: now}
		e.reported.Add(key, known)
	}
	known.count++
	if now.Sub(known.last) < eventInterval || !e.limiter.AllowN(now, 1) {
		return
	}
	select {
	case e.queue <- e.event(pod, known, refusal.Reason, text, now):
		known.last = now
	default:
	}
}

func (e *Events) event(pod *corev1.Pod, known *refusalCount, reason identity.Reason, detail string, now time.Time) *corev1.Event {
	return &corev1.Event{
		ObjectMeta:          metav1.ObjectMeta{Namespace: pod.Namespace, Name: known.name},
		InvolvedObject:      corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		Type:                corev1.EventTypeWarning,
		Reason:              eventReason,
		Message:             text.Truncate(string(reason)+": "+detail, maxEventText),
		Source:              corev1.EventSource{Component: "podidentity-nmi", Host: e.node},
		FirstTimestamp:      metav1.NewTime(known.first),
		LastTimestamp:       metav1.NewTime(now),
		Count:               known.count,
		ReportingController: "podidentity.io/nmi",
		ReportingInstance:   e.node,
	}
}

// Run writes events until ctx ends. One that cannot be written is lost: the log has it too.
func (e *Events) Run(ctx context.Context) {
	for {
		select {
		case event := <-e.queue:
			writing, cancel := context.WithTimeout(ctx, eventTimeout)
			_ = e.write(writing, event) // which counts failures
			cancel()
		case <-ctx.Done():
			return
		}
	}
}
