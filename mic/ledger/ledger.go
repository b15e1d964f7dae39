package ledger

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// label marks the ConfigMaps that are ledgers.
const label = "podidentity.io/ledger"

// ErrOvertaken means that somebody else has written the ledger since it was read: another MIC that believes that it
// leads. Nothing may be done on the ground of what was read.
var ErrOvertaken = errors.New("the ledger has been written by another MIC meanwhile")

// Ledger is what MIC attached to one machine itself, and the update of it that is under way. It is a ConfigMap in MIC's
// own namespace: assignments are in namespaces of users and may be deleted there, and what may be detached must not
// hang on them. It is written before Azure is asked for anything, so that it never knows less than has been done.
type Ledger struct {
	store   typedcorev1.ConfigMapInterface
	name    string
	version string // as it was read or written last; "" if there is none
	Entries
}

// Keys of the ConfigMap.
const (
	dataMachine  = "machine"
	dataAttached = "attached"
	dataUpdate   = "update"
)

func nameOf(machine string) string {
	sum := sha256.Sum256([]byte(machine))
	return "mic-machine-" + hex.EncodeToString(sum[:10])
}

// Read reads the ledger of a machine (key, ARM ID), which may be empty.
func Read(ctx context.Context, store typedcorev1.ConfigMapInterface, key, id string) (*Ledger, error) {
	l := &Ledger{store: store, name: nameOf(key), Entries: Entries{Machine: id, Attached: map[string]string{}}}
	o, err := store.Get(ctx, l.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading what MIC has attached to %s: %w", id, err)
	}
	l.version = o.ResourceVersion
	l.Entries, err = parseRecord(o)
	return l, err
}

// parseRecord reads a ConfigMap. One that makes no sense is an error: taking it for empty could leave identities on the
// machine for good.
func parseRecord(o *corev1.ConfigMap) (Entries, error) {
	r := Entries{Machine: o.Data[dataMachine], Attached: map[string]string{}}
	err := json.Unmarshal([]byte(o.Data[dataAttached]), &r.Attached)
	if text := o.Data[dataUpdate]; err == nil && text != "" {
		r.Update = &Update{}
		err = json.Unmarshal([]byte(text), r.Update)
	}
	if err != nil || r.Machine == "" {
		return Entries{}, fmt.Errorf("ConfigMap %s/%s, which says what MIC has attached to %q, has been changed by somebody (%w); mend its JSON, or delete it: MIC then leaves on the machine what is there now", o.Namespace, o.Name, r.Machine, err)
	}
	return r, nil
}

// Write makes the ledger say so. An empty one is deleted. ErrOvertaken: see there.
func (l *Ledger) Write(ctx context.Context, r Entries) error {
	if len(r.Attached) == 0 && r.Update == nil {
		return l.remove(ctx, r)
	}
	attached, err := json.Marshal(r.Attached)
	if err != nil {
		return err
	}
	o := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: l.name, ResourceVersion: l.version, Labels: map[string]string{label: "machine"}},
		Data:       map[string]string{dataMachine: r.Machine, dataAttached: string(attached)},
	}
	if r.Update != nil {
		under, err := json.Marshal(r.Update)
		if err != nil {
			return err
		}
		o.Data[dataUpdate] = string(under)
	}
	put := l.store.Create
	if l.version != "" {
		put = func(ctx context.Context, o *corev1.ConfigMap, _ metav1.CreateOptions) (*corev1.ConfigMap, error) {
			return l.store.Update(ctx, o, metav1.UpdateOptions{})
		}
	}
	written, err := put(ctx, o, metav1.CreateOptions{})
	switch {
	case err == nil:
		l.version, l.Entries = written.ResourceVersion, r.Clone()
		return nil
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err), l.version != "" && apierrors.IsNotFound(err):
		return fmt.Errorf("%w: %w", ErrOvertaken, err)
	}
	return fmt.Errorf("writing down what MIC attaches to %s: %w", r.Machine, err)
}

func (l *Ledger) remove(ctx context.Context, r Entries) error {
	if l.version != "" {
		err := l.store.Delete(ctx, l.name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &l.version}})
		switch {
		case apierrors.IsConflict(err):
			return fmt.Errorf("%w: %w", ErrOvertaken, err)
		case err != nil && !apierrors.IsNotFound(err):
			return fmt.Errorf("writing down that MIC has nothing attached to %s any more: %w", r.Machine, err)
		}
	}
	l.version, l.Entries = "", r.Clone()
	return nil
}

// Machines lists the machines (ARM IDs) to which MIC has attached anything.
func Machines(ctx context.Context, store typedcorev1.ConfigMapInterface) ([]string, error) {
	list, err := store.List(ctx, metav1.ListOptions{LabelSelector: label})
	if err != nil {
		return nil, fmt.Errorf("listing what MIC has attached: %w", err)
	}
	var ids []string
	for _, o := range list.Items {
		ids = append(ids, o.Data[dataMachine])
	}
	return ids, nil
}

// Stored reports whether there is a ConfigMap.
func (l *Ledger) Stored() bool { return l.version != "" }
