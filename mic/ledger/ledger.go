package ledger

import (
	"cmp"
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

// ErrOvertaken means that the ledger is not in the version that this process last read or wrote. Another MIC that acts
// as the leader or an operator changed it, or this process did not get the response to its own last write. The caller
// must not act on what it read.
var ErrOvertaken = errors.New("the ledger is not in the version that this MIC last read or wrote: another process changed it, or MIC did not get the response to its last write; MIC reads the ledger again")

// Ledger is the ledger of one machine, as this process last read or wrote it.
type Ledger struct {
	store   typedcorev1.ConfigMapInterface
	name    string
	version string // the resourceVersion; "" if there is no ConfigMap
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

// Read reads the ledger of a machine. key and id are the key and the resource ID of the machine. If no ConfigMap
// exists, the ledger is empty.
func Read(ctx context.Context, store typedcorev1.ConfigMapInterface, key, id string) (*Ledger, error) {
	l := &Ledger{store: store, name: nameOf(key), Entries: Entries{Machine: id, Attached: map[string]string{}}}
	o, err := store.Get(ctx, l.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the ledger of %s: %w", id, err)
	}
	l.version = o.ResourceVersion
	l.Entries, err = parse(o)
	return l, err
}

// parse parses a ConfigMap. If it cannot, it returns an error and not an empty ledger: with an empty ledger MIC would
// never detach the identities that it attached.
func parse(o *corev1.ConfigMap) (Entries, error) {
	e := Entries{Machine: o.Data[dataMachine], Attached: map[string]string{}}
	err := json.Unmarshal([]byte(o.Data[dataAttached]), &e.Attached)
	if text := o.Data[dataUpdate]; err == nil && text != "" {
		e.Update = &Update{}
		err = json.Unmarshal([]byte(text), e.Update)
	}
	if err != nil || e.Machine == "" {
		return Entries{}, fmt.Errorf("ConfigMap %s/%s, the ledger of machine %q, cannot be parsed (%w); correct it; if you delete it instead, MIC no longer knows which identities it attached to the machine, and does not detach them", o.Namespace, o.Name, e.Machine, cmp.Or(err, errors.New(`its key "machine" is missing or empty`)))
	}
	return e, nil
}

// Write saves e in the ConfigMap. If the ConfigMap is not in the version of l, Write changes nothing and returns an
// error that wraps ErrOvertaken. If e has no identities and no update, Write deletes the ConfigMap instead. It then
// returns nil if there is nothing to delete: l had no ConfigMap, or the ConfigMap is already gone.
func (l *Ledger) Write(ctx context.Context, e Entries) error {
	if len(e.Attached) == 0 && e.Update == nil {
		return l.remove(ctx, e)
	}
	attached, err := json.Marshal(e.Attached)
	if err != nil {
		return err
	}
	o := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: l.name, ResourceVersion: l.version, Labels: map[string]string{label: "machine"}},
		Data:       map[string]string{dataMachine: e.Machine, dataAttached: string(attached)},
	}
	if e.Update != nil {
		update, err := json.Marshal(e.Update)
		if err != nil {
			return err
		}
		o.Data[dataUpdate] = string(update)
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
		l.version, l.Entries = written.ResourceVersion, e.Clone()
		return nil
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err), l.version != "" && apierrors.IsNotFound(err):
		return fmt.Errorf("%w: %w", ErrOvertaken, err)
	}
	return fmt.Errorf("writing the ledger of %s: %w", e.Machine, err)
}

func (l *Ledger) remove(ctx context.Context, e Entries) error {
	if l.version != "" {
		err := l.store.Delete(ctx, l.name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &l.version}})
		switch {
		case apierrors.IsConflict(err):
			return fmt.Errorf("%w: %w", ErrOvertaken, err)
		case err != nil && !apierrors.IsNotFound(err):
			return fmt.Errorf("deleting the ledger of %s: %w", e.Machine, err)
		}
	}
	l.version, l.Entries = "", e.Clone()
	return nil
}

// Machines lists the resource IDs of the machines that have a ledger.
func Machines(ctx context.Context, store typedcorev1.ConfigMapInterface) ([]string, error) {
	list, err := store.List(ctx, metav1.ListOptions{LabelSelector: label})
	if err != nil {
		return nil, fmt.Errorf("listing the ledgers: %w", err)
	}
	var ids []string
	for _, o := range list.Items {
		ids = append(ids, o.Data[dataMachine])
	}
	return ids, nil
}

// Stored reports whether there is a ConfigMap.
func (l *Ledger) Stored() bool { return l.version != "" }
