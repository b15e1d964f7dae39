package mic

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// ledgerLabel marks the ConfigMaps that are ledgers.
const ledgerLabel = "podidentity.io/ledger"

// errOvertaken means that somebody else has written the ledger since it was read: another MIC that believes that it
// leads. Nothing may be done on the ground of what was read.
var errOvertaken = errors.New("the ledger has been written by another MIC meanwhile")

// ledger is what MIC attached to one machine itself, and the update of it that is under way. It is a ConfigMap in MIC's
// own namespace: assignments are in namespaces of users and may be deleted there, and what may be detached must not
// hang on them. It is written before Azure is asked for anything, so that it never knows less than has been done.
type ledger struct {
	store   typedcorev1.ConfigMapInterface
	name    string
	version string // as it was read or written last; "" if there is none
	entries
}

// entries is the content of a ledger.
type entries struct {
	Machine  string            // its ARM ID
	Attached map[string]string // identities by folded ID, as spelled
	// Update is what Azure was asked for and has not been seen to end.
	Update *update
}

// update is one PATCH.
type update struct {
	Started time.Time `json:"started"`
	Add     []string  `json:"add,omitempty"`
	Remove  []string  `json:"remove,omitempty"`
	// Token resumes waiting for the operation. "" until Azure has taken it on.
	Token string `json:"token,omitempty"`
}

// Keys of the ConfigMap.
const (
	ledgerMachine  = "machine"
	ledgerAttached = "attached"
	ledgerUpdate   = "update"
)

func ledgerName(machine string) string {
	sum := sha256.Sum256([]byte(machine))
	return "mic-machine-" + hex.EncodeToString(sum[:10])
}

// readLedger reads the ledger of a machine (key, ARM ID), which may be empty.
func readLedger(ctx context.Context, store typedcorev1.ConfigMapInterface, key, id string) (*ledger, error) {
	l := &ledger{store: store, name: ledgerName(key), entries: entries{Machine: id, Attached: map[string]string{}}}
	o, err := store.Get(ctx, l.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading what MIC has attached to %s: %w", id, err)
	}
	l.version = o.ResourceVersion
	l.entries, err = parseRecord(o)
	return l, err
}

// parseRecord reads a ConfigMap. One that makes no sense is an error: taking it for empty could leave identities on the
// machine for good.
func parseRecord(o *corev1.ConfigMap) (entries, error) {
	r := entries{Machine: o.Data[ledgerMachine], Attached: map[string]string{}}
	err := json.Unmarshal([]byte(o.Data[ledgerAttached]), &r.Attached)
	if text := o.Data[ledgerUpdate]; err == nil && text != "" {
		r.Update = &update{}
		err = json.Unmarshal([]byte(text), r.Update)
	}
	if err != nil || r.Machine == "" {
		return entries{}, fmt.Errorf("ConfigMap %s/%s, which says what MIC has attached to %q, has been changed by somebody (%w); mend its JSON, or delete it: MIC then leaves on the machine what is there now", o.Namespace, o.Name, r.Machine, err)
	}
	return r, nil
}

// write makes the ledger say so. An empty one is deleted. errOvertaken: see there.
func (l *ledger) write(ctx context.Context, r entries) error {
	if len(r.Attached) == 0 && r.Update == nil {
		return l.remove(ctx, r)
	}
	attached, err := json.Marshal(r.Attached)
	if err != nil {
		return err
	}
	o := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: l.name, ResourceVersion: l.version, Labels: map[string]string{ledgerLabel: "machine"}},
		Data:       map[string]string{ledgerMachine: r.Machine, ledgerAttached: string(attached)},
	}
	if r.Update != nil {
		under, err := json.Marshal(r.Update)
		if err != nil {
			return err
		}
		o.Data[ledgerUpdate] = string(under)
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
		l.version, l.entries = written.ResourceVersion, r.clone()
		return nil
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err), l.version != "" && apierrors.IsNotFound(err):
		return fmt.Errorf("%w: %w", errOvertaken, err)
	}
	return fmt.Errorf("writing down what MIC attaches to %s: %w", r.Machine, err)
}

func (l *ledger) remove(ctx context.Context, r entries) error {
	if l.version != "" {
		err := l.store.Delete(ctx, l.name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &l.version}})
		switch {
		case apierrors.IsConflict(err):
			return fmt.Errorf("%w: %w", errOvertaken, err)
		case err != nil && !apierrors.IsNotFound(err):
			return fmt.Errorf("writing down that MIC has nothing attached to %s any more: %w", r.Machine, err)
		}
	}
	l.version, l.entries = "", r.clone()
	return nil
}

func (r entries) clone() entries {
	r.Attached = maps.Clone(r.Attached)
	if r.Update != nil {
		u := *r.Update
		r.Update = &u
	}
	return r
}

// machinesInLedgers lists the machines (ARM IDs) to which MIC has attached anything.
func machinesInLedgers(ctx context.Context, store typedcorev1.ConfigMapInterface) ([]string, error) {
	list, err := store.List(ctx, metav1.ListOptions{LabelSelector: ledgerLabel})
	if err != nil {
		return nil, fmt.Errorf("listing what MIC has attached: %w", err)
	}
	var ids []string
	for _, o := range list.Items {
		ids = append(ids, o.Data[ledgerMachine])
	}
	return ids, nil
}

// same reports whether the ledger says so already.
func (l *ledger) same(r entries) bool {
	return maps.Equal(l.Attached, r.Attached) && l.Update == nil && r.Update == nil
}
