package kube

import (
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

type trimmedPod struct {
	Meta
	node string
}

func TestATrimmedObjectIsAnObjectForInformers(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", ResourceVersion: "7"}}
	trimmed := &trimmedPod{Meta: MetaOf(pod)}
	o, err := meta.Accessor(trimmed)
	if err != nil {
		t.Fatal(err)
	}
	if o.GetNamespace() != "ns" || o.GetName() != "p" || o.GetResourceVersion() != "7" {
		t.Errorf("the accessor of the trimmed object returns %+v", o)
	}
	for object, want := range map[metav1.ObjectMetaAccessor]string{trimmed: "ns/p", &Meta{Name: "n"}: "n"} {
		key, err := cache.MetaNamespaceKeyFunc(object)
		if err != nil || key != want {
			t.Errorf("key %q, %v, want %q", key, err, want)
		}
	}
	if trimmed.Key() != "ns/p" || Key("", "n") != "n" {
		t.Errorf("the keys are %q and %q, want ns/p and n", trimmed.Key(), Key("", "n"))
	}
}

func TestATypedHandlerUnwrapsTombstones(t *testing.T) {
	var got []string
	h := TypedHandler(func(old, current *trimmedPod) {
		got = append(got, fmt.Sprintf("%t %t %s", old != nil, current != nil, Newest(old, current).Name))
	})
	a, b := &trimmedPod{Meta: Meta{Name: "a"}}, &trimmedPod{Meta: Meta{Name: "b"}}
	h.OnAdd(a, false)
	h.OnUpdate(a, b)
	h.OnDelete(b)
	h.OnDelete(cache.DeletedFinalStateUnknown{Key: "a", Obj: a})
	h.OnDelete(cache.DeletedFinalStateUnknown{Key: "a"})
	h.OnAdd(&corev1.Pod{}, false)
	want := []string{"false true a", "true true b", "true false b", "true false a"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestObjectsAreFoundByKeyAndByIndex(t *testing.T) {
	informer := cache.NewSharedIndexInformer(&cache.ListWatch{}, &corev1.Pod{}, 0,
		cache.Indexers{"node": IndexBy(func(p *trimmedPod) string { return p.node })})
	for _, p := range []*trimmedPod{{Meta{"ns", "a", "1"}, "n1"}, {Meta{"ns", "b", "1"}, "n1"}, {Meta{"ns", "c", "1"}, ""}} {
		if err := informer.GetIndexer().Add(p); err != nil {
			t.Fatal(err)
		}
	}
	if p, ok := Get[*trimmedPod](informer, "ns/a"); !ok || p.Name != "a" {
		t.Errorf("Get for the key ns/a: %v, %v", p, ok)
	}
	if p, ok := Get[*trimmedPod](informer, "ns/x"); ok {
		t.Errorf("Get for a key without an object found %v", p)
	}
	if n := len(ByIndex[*trimmedPod](informer, "node", "n1")); n != 2 {
		t.Errorf("the index has %d objects under n1, want 2", n)
	}
	if n := len(ByIndex[*trimmedPod](informer, "node", "")); n != 0 {
		t.Errorf("the index has %d objects under the empty value, want 0", n)
	}
	if _, err := IndexBy(func(p *trimmedPod) string { return "" })(&corev1.Pod{}); err == nil {
		t.Error("an object of another type is indexed")
	}
}
