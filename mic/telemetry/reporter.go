package telemetry

import (
	"errors"
	"slices"
	"strings"

	lru "github.com/hashicorp/golang-lru/v2"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/azure"
)

// Reasons of Events, as `kubectl describe` shows them.
const (
	ReasonInvalid = "IdentityInvalid"
	ReasonMissing = "IdentityMissing"
	ReasonFailed  = "AssignmentFailed"
)

// reportedMax bounds how many reports are remembered. A report that was forgotten may be repeated.
const reportedMax = 16384

// Problem is a reason why a pod does not get an identity that is bound to it. Somebody may have to correct it.
type Problem struct {
	Reason, Text string
	Binding      *corev1.ObjectReference // nil if only the pod has the problem
}

// Reporter writes problems into Events and the log, once for each change.
type Reporter struct {
	log         *zap.Logger
	broadcaster record.EventBroadcaster
	recorder    record.EventRecorder
	reported    *lru.Cache[string, string]
}

// NewReporter returns a Reporter. It starts to write Events at once; Shutdown ends that.
func NewReporter(client typedcorev1.EventsGetter, log *zap.Logger) (*Reporter, error) {
	reported, err := lru.New[string, string](reportedMax)
	if err != nil {
		return nil, err
	}
	r := &Reporter{log: log, reported: reported, broadcaster: record.NewBroadcaster()} // the broadcaster aggregates equal Events and bounds their rate
	r.broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: client.Events("")})
	r.recorder = r.broadcaster.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: "podidentity-mic"})
	return r, nil
}

// Shutdown stops writing Events.
func (r *Reporter) Shutdown() { r.broadcaster.Shutdown() }

// PodProblems reports each new problem of a pod by an Event on the pod and a log line. If the problem has a binding,
// PodProblems also writes an Event on the binding, unless the last Event on it with this reason had the same text.
func (r *Reporter) PodProblems(pod *corev1.ObjectReference, problems []Problem) {
	texts := make([]string, len(problems))
	for i, p := range problems {
		texts[i] = p.Reason + ": " + p.Text
	}
	key := "pod/" + string(pod.UID)
	before, _ := r.reported.Get(key)
	if !r.changed(key, strings.Join(texts, "\n")) {
		return
	}
	for i, p := range problems {
		if slices.Contains(strings.Split(before, "\n"), texts[i]) {
			continue
		}
		r.recorder.Event(pod, corev1.EventTypeWarning, p.Reason, p.Text)
		fields := []zap.Field{zap.String(KeyPod, kube.Key(pod.Namespace, pod.Name)), zap.String(KeyReason, p.Reason), zap.String(KeyDetail, p.Text)}
		if p.Binding != nil {
			fields = append(fields, zap.String(KeyBinding, kube.Key(p.Binding.Namespace, p.Binding.Name)))
			r.bindingEvent(p.Binding, p.Reason, p.Text)
		}
		r.log.Warn("a pod does not get an identity that is bound to it", fields...)
	}
}

// changed remembers a text under a key, and reports whether the text differs from the last one under that key. If text
// is empty, changed only removes the last text and returns false.
func (r *Reporter) changed(key, text string) bool {
	if text == "" {
		r.reported.Remove(key)
		return false
	}
	if before, ok := r.reported.Get(key); ok && before == text {
		return false
	}
	r.reported.Add(key, text)
	return true
}

func bindingKey(b *corev1.ObjectReference, reason string) string {
	return "binding/" + string(b.UID) + "/" + reason
}

func (r *Reporter) bindingEvent(b *corev1.ObjectReference, reason, text string) {
	if r.changed(bindingKey(b, reason), text) {
		r.recorder.Event(b, corev1.EventTypeWarning, reason, text)
	}
}

// BindingProblem reports that a binding cannot work. An empty reason means that the binding has no problem any more.
func (r *Reporter) BindingProblem(b *corev1.ObjectReference, reason, text string) {
	for _, other := range []string{ReasonInvalid, ReasonMissing} {
		if other != reason {
			r.changed(bindingKey(b, other), "")
		}
	}
	if reason == "" {
		return
	}
	if before, _ := r.reported.Peek(bindingKey(b, reason)); before != text {
		r.log.Warn("a binding cannot work", zap.String(KeyBinding, kube.Key(b.Namespace, b.Name)), zap.String(KeyReason, reason), zap.String(KeyDetail, text))
	}
	r.bindingEvent(b, reason, text)
}

// MachineResult logs the result of the reconcile of a machine if it differs from the last one. A nil error means
// success.
func (r *Reporter) MachineResult(machine string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
		// The text of the same failure differs each time, because it contains the correlation ID.
		var e *azure.Error
		if errors.As(err, &e) {
			text = string(e.Class) + " " + e.Code
		}
	}
	key := "machine/" + machine
	if err == nil && r.reported.Contains(key) {
		r.log.Info("reconciling a machine succeeds again", zap.String(KeyMachine, machine))
	}
	if r.changed(key, text) {
		r.log.Warn("reconciling a machine failed; MIC retries", zap.String(KeyMachine, machine), zap.Error(err))
	}
}
