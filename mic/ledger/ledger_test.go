package ledger

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

const machineID = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/virtualMachineScaleSets/nodes"

// configMaps is a store in memory that checks resourceVersions as the API server does.
type configMaps struct {
	typedcorev1.ConfigMapInterface
	version int
	objects map[string]*corev1.ConfigMap
	fail    error // of every request
}

var resource = corev1.Resource("configmaps")

func (c *configMaps) put(o *corev1.ConfigMap) *corev1.ConfigMap {
	c.version++
	o = o.DeepCopy()
	o.ResourceVersion = strconv.Itoa(c.version)
	c.objects[o.Name] = o
	return o.DeepCopy()
}

func (c *configMaps) Get(_ context.Context, name string, _ metav1.GetOptions) (*corev1.ConfigMap, error) {
	if c.fail != nil {
		return nil, c.fail
	}
	if o := c.objects[name]; o != nil {
		return o.DeepCopy(), nil
	}
	return nil, apierrors.NewNotFound(resource, name)
}

func (c *configMaps) List(_ context.Context, o metav1.ListOptions) (*corev1.ConfigMapList, error) {
	if c.fail != nil {
		return nil, c.fail
	}
	list := &corev1.ConfigMapList{}
	for _, m := range c.objects {
		if _, ok := m.Labels[o.LabelSelector]; ok {
			list.Items = append(list.Items, *m.DeepCopy())
		}
	}
	return list, nil
}

func (c *configMaps) Create(_ context.Context, o *corev1.ConfigMap, _ metav1.CreateOptions) (*corev1.ConfigMap, error) {
	if c.fail != nil {
		return nil, c.fail
	}
	if c.objects[o.Name] != nil {
		return nil, apierrors.NewAlreadyExists(resource, o.Name)
	}
	return c.put(o), nil
}

func (c *configMaps) check(name, version string) error {
	switch o := c.objects[name]; {
	case c.fail != nil:
		return c.fail
	case o == nil:
		return apierrors.NewNotFound(resource, name)
	case o.ResourceVersion != version:
		return apierrors.NewConflict(resource, name, errors.New("another resourceVersion"))
	}
	return nil
}

func (c *configMaps) Update(_ context.Context, o *corev1.ConfigMap, _ metav1.UpdateOptions) (*corev1.ConfigMap, error) {
	if err := c.check(o.Name, o.ResourceVersion); err != nil {
		return nil, err
	}
	return c.put(o), nil
}

func (c *configMaps) Delete(_ context.Context, name string, o metav1.DeleteOptions) error {
	if err := c.check(name, *o.Preconditions.ResourceVersion); err != nil {
		return err
	}
	delete(c.objects, name)
	return nil
}

func newStore() *configMaps { return &configMaps{objects: map[string]*corev1.ConfigMap{}} }

func read(t *testing.T, store *configMaps) *Ledger {
	t.Helper()
	l, err := Read(t.Context(), store, "vmss/nodes", machineID)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestWhatIsWrittenIsReadByTheNextLeader(t *testing.T) {
	store := newStore()
	l := read(t, store)
	if l.Stored() || len(l.Attached) > 0 {
		t.Errorf("without a ConfigMap the ledger is %+v, want an empty one that is not stored", l)
	}
	first := l.Begin(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), []string{"/A"}, nil)
	second := first.Clone()
	second.Update.Token = "operation"
	for _, e := range []Entries{first, second} {
		if err := l.Write(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		got := read(t, store)
		if diff := cmp.Diff(e, got.Entries); diff != "" || !got.Stored() {
			t.Errorf("the ledger that was read is stored: %t, want true; difference (-written +read):\n%s", got.Stored(), diff)
		}
	}
	if ids, err := Machines(t.Context(), store); err != nil || len(ids) != 1 || ids[0] != machineID {
		t.Errorf("Machines returned %v, %v; want only the machine of the ledger", ids, err)
	}
}

func TestAnEmptyLedgerIsDeleted(t *testing.T) {
	store := newStore()
	l := read(t, store)
	empty := Entries{Machine: machineID, Attached: map[string]string{}}
	for _, e := range []Entries{empty, l.With(map[string]string{"/a": "/A"}), empty} {
		if err := l.Write(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		if want := len(e.Attached) > 0; l.Stored() != want || len(store.objects) > 0 != want {
			t.Errorf("with %v attached, stored is %t and there are %d ConfigMaps", e.Attached, l.Stored(), len(store.objects))
		}
	}
}

func TestTheSecondOfTwoLeadersIsStopped(t *testing.T) {
	attach := func(l *Ledger, id string) Entries { return l.With(map[string]string{id: id}) }
	none := Entries{Machine: machineID, Attached: map[string]string{}}
	cases := map[string]struct {
		before    []string // attached when both read the ledger
		first     func(*Ledger) Entries
		second    func(*Ledger) Entries
		overtaken bool
	}{
		"both create":               {nil, func(l *Ledger) Entries { return attach(l, "/b") }, func(l *Ledger) Entries { return attach(l, "/c") }, true},
		"both update":               {[]string{"/a"}, func(l *Ledger) Entries { return attach(l, "/b") }, func(l *Ledger) Entries { return attach(l, "/c") }, true},
		"one updates, one deletes":  {[]string{"/a"}, func(l *Ledger) Entries { return attach(l, "/b") }, func(*Ledger) Entries { return none }, true},
		"one deletes, one updates":  {[]string{"/a"}, func(*Ledger) Entries { return none }, func(l *Ledger) Entries { return attach(l, "/c") }, true},
		"both delete":               {[]string{"/a"}, func(*Ledger) Entries { return none }, func(*Ledger) Entries { return none }, false},
		"one creates, one has none": {nil, func(l *Ledger) Entries { return attach(l, "/b") }, func(*Ledger) Entries { return none }, false},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			store := newStore()
			if before := read(t, store); len(c.before) > 0 {
				if err := before.Write(t.Context(), attach(before, c.before[0])); err != nil {
					t.Fatal(err)
				}
			}
			first, second := read(t, store), read(t, store)
			if err := first.Write(t.Context(), c.first(first)); err != nil {
				t.Fatal(err)
			}
			if err := second.Write(t.Context(), c.second(second)); errors.Is(err, ErrOvertaken) != c.overtaken || err != nil && !c.overtaken {
				t.Errorf("the second write: %v; want ErrOvertaken: %t", err, c.overtaken)
			}
		})
	}
}

func TestAConfigMapThatCannotBeParsedIsAnError(t *testing.T) {
	for name, data := range map[string]map[string]string{
		"no machine":         {dataAttached: "{}"},
		"no identities":      {dataMachine: machineID},
		"invalid identities": {dataMachine: machineID, dataAttached: "{"},
		"invalid update":     {dataMachine: machineID, dataAttached: "{}", dataUpdate: "soon"},
	} {
		store := newStore()
		store.put(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "mic", Name: nameOf("vmss/nodes")}, Data: data})
		_, err := Read(t.Context(), store, "vmss/nodes", machineID)
		if err == nil || !strings.Contains(err.Error(), "ConfigMap mic/"+nameOf("vmss/nodes")) {
			t.Errorf("%s: got %v; want an error that names the ConfigMap", name, err)
		}
	}
}

func TestAFailureOfTheAPIServerIsNotOvertaking(t *testing.T) {
	store := newStore()
	l := read(t, store)
	if err := l.Write(t.Context(), l.With(map[string]string{"/a": "/A"})); err != nil {
		t.Fatal(err)
	}
	store.fail = errors.New("not available")
	_, readErr := Read(t.Context(), store, "vmss/nodes", machineID)
	_, listErr := Machines(t.Context(), store)
	writeErr := l.Write(t.Context(), l.With(map[string]string{"/b": "/B"}))
	deleteErr := l.Write(t.Context(), Entries{Machine: machineID})
	for _, err := range []error{readErr, listErr, writeErr, deleteErr} {
		if !errors.Is(err, store.fail) || errors.Is(err, ErrOvertaken) {
			t.Errorf("got %v; want the error of the store, and not ErrOvertaken", err)
		}
	}
	if len(l.Attached) != 1 {
		t.Errorf("after failed writes the ledger has %v, want only /a", l.Attached)
	}
}
