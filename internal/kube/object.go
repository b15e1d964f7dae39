package kube

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

// Meta contains what an informer must know of an object. The transform of an informer can replace an object by a
// smaller type that embeds Meta and has only the fields that the program reads. Such a type takes a fraction of the
// memory.
type Meta struct{ Namespace, Name, ResourceVersion string }

// MetaOf returns the Meta of an object.
func MetaOf(o metav1.Object) Meta {
	return Meta{o.GetNamespace(), o.GetName(), o.GetResourceVersion()}
}

// GetObjectMeta implements metav1.ObjectMetaAccessor.
func (m *Meta) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, ResourceVersion: m.ResourceVersion}
}

// Key returns the key of the object in informer caches.
func (m *Meta) Key() string { return Key(m.Namespace, m.Name) }

// Key returns namespace/name, or the name of an object without a namespace.
func Key(namespace, name string) string {
	return cache.NewObjectName(namespace, name).String()
}

// LastState returns the deleted object from the argument of a deletion handler. If the watch missed the deletion, the
// argument is a tombstone, and LastState returns the last known state in it, or nil if the tombstone has none.
func LastState(o any) any {
	if tombstone, ok := o.(cache.DeletedFinalStateUnknown); ok {
		return tombstone.Obj
	}
	return o
}

// TypedHandler returns an event handler for an informer that holds objects of type *T. It calls handle with old nil for
// an added object and with current nil for a deleted one. Events about other types are dropped, as are deletions of
// which no state is known.
func TypedHandler[T any](handle func(old, current *T)) cache.ResourceEventHandlerFuncs {
	call := func(old, current any) {
		before, _ := old.(*T)
		after, _ := current.(*T)
		if before != nil || after != nil {
			handle(before, after)
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { call(nil, o) },
		UpdateFunc: call,
		DeleteFunc: func(o any) { call(LastState(o), nil) },
	}
}

// Newest returns current, or old if current is nil: for an event of a TypedHandler, the state after the event, or the
// last state before a deletion.
func Newest[T any](old, current *T) *T {
	if current != nil {
		return current
	}
	return old
}
