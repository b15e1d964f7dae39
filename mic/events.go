package mic

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/azure"
)

// Keys of log lines.
const (
	keyMachine  = "machine"
	keyIdentity = "identity"
	keyPod      = "pod"
	keyBinding  = "binding"
	keyReason   = "reason"
	keyDetail   = "detail"
)

// Reasons of Events, as `kubectl describe` shows them.
const (
	reasonInvalid = "IdentityInvalid"
	reasonMissing = "IdentityMissing"
	reasonWaiting = "AssignmentFailed"
)

// toldKept bounds what is remembered of what was told already. What is forgotten may be told once more.
const toldKept = 16384

// makeEvents prepares the writing of Events. The library counts equal ones together and bounds their rate.
func (c *Controller) makeEvents(client typedcorev1.EventsGetter) {
	c.events = record.NewBroadcaster()
	c.events.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: client.Events("")})
	c.recorder = c.events.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: "podidentity-mic"})
}

// tell says what stands in the way of a pod: one Event on the pod, one on the binding and one line in the log for each
// change.
func (c *Controller) tell(p *Pod, troubles []trouble) {
	texts := make([]string, len(troubles))
	for i, t := range troubles {
		texts[i] = t.reason + ": " + t.text
	}
	key := "pod/" + p.UID
	before, _ := c.told.Get(key)
	if !c.news(key, strings.Join(texts, "\n")) {
		return
	}
	for i, t := range troubles {
		if slices.Contains(strings.Split(before, "\n"), texts[i]) {
			continue
		}
		c.recorder.Event(&corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID)},
			corev1.EventTypeWarning, t.reason, t.text)
		fields := []zap.Field{zap.String(keyPod, p.Key()), zap.String(keyReason, t.reason), zap.String(keyDetail, t.text)}
		if t.binding != nil {
			fields = append(fields, zap.String(keyBinding, t.binding.Key()))
			c.tellBinding(t.binding, t.reason, t.text)
		}
		c.log.Warn("a pod does not get an identity that is bound to it", fields...)
	}
}

// news reports whether a text is another than the last one under its key. "" is no news, and forgets the last one.
func (c *Controller) news(key, text string) bool {
	if text == "" {
		c.told.Remove(key)
		return false
	}
	if before, ok := c.told.Get(key); ok && before == text {
		return false
	}
	c.told.Add(key, text)
	return true
}

func (c *Controller) tellBinding(b *Binding, reason, text string) {
	if c.news("binding/"+string(b.Full.UID)+"/"+reason, text) {
		c.recorder.Event(&corev1.ObjectReference{
			APIVersion: v1.GroupVersion.String(), Kind: "AzureIdentityBinding", Namespace: b.Namespace, Name: b.Name, UID: b.Full.UID,
		}, corev1.EventTypeWarning, reason, text)
	}
}

// reconcileBinding looks whether a binding can work at all, and tells if it cannot.
func (c *Controller) reconcileBinding(_ context.Context, key string) (time.Duration, error) {
	b, ok := kube.Get[*Binding](c.cluster.bindings, key)
	if !ok {
		return 0, nil
	}
	name := kube.Key(b.Namespace, b.Value.AzureIdentity)
	i, ok := kube.Get[*AzureIdentity](c.cluster.identities, name)
	reason, text := "", ""
	switch {
	case b.Value.Selector == "":
		reason, text = reasonInvalid, "spec.selector is empty, so the binding selects no pod; write the value of the label "+v1.BindingLabel
	case !ok:
		reason, text = reasonMissing, fmt.Sprintf("AzureIdentity %s does not exist; create it in the binding's namespace, or correct spec.azureIdentity", name)
	case i.Value.Problem() != "":
		reason, text = reasonInvalid, fmt.Sprintf("AzureIdentity %s cannot work: %s", name, i.Value.Problem())
	}
	for _, r := range []string{reasonInvalid, reasonMissing} {
		if r != reason {
			c.news("binding/"+string(b.Full.UID)+"/"+r, "")
		}
	}
	if reason != "" {
		if known, _ := c.told.Peek("binding/" + string(b.Full.UID) + "/" + reason); known != text {
			c.log.Warn("a binding cannot work", zap.String(keyBinding, key), zap.String(keyReason, reason), zap.String(keyDetail, text))
		}
		c.tellBinding(b, reason, text)
	}
	return 0, nil
}

// said logs what is wrong with a machine, once for each change; nil is that nothing is.
func (c *Controller) said(machine string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
		// The same failure has another ID each time.
		var e *azure.Error
		if errors.As(err, &e) {
			text = string(e.Class) + " " + e.Code
		}
	}
	key := "machine/" + machine
	if err == nil && c.told.Contains(key) {
		c.log.Info("Azure does what is asked for a machine again", zap.String(keyMachine, machine))
	}
	if c.news(key, text) {
		c.log.Warn("a machine cannot be brought up to date; it is tried again", zap.String(keyMachine, machine), zap.Error(err))
	}
}

// arrivals is since when pods wait for their identities. Pods that were there when MIC began are not counted: it is not
// known how long they have waited.
type arrivals struct {
	mu    sync.Mutex
	since map[string]time.Time // by pod
}

// open begins to note pods.
func (a *arrivals) open() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.since = map[string]time.Time{}
}

func (a *arrivals) begin(pod string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.since != nil {
		a.since[pod] = time.Now()
	}
}

// end tells how long a pod waited if it has got what it waited for, and forgets it.
func (a *arrivals) end(pod string, got bool, tell func(time.Duration)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	since, ok := a.since[pod]
	delete(a.since, pod)
	if ok && got {
		tell(time.Since(since))
	}
}
