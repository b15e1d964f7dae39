package kube

import (
	"fmt"

	"k8s.io/client-go/tools/cache"
)

// IndexBy returns an index function for objects of type T from a function that returns one value, or "" for an object
// that is not in the index.
func IndexBy[T any](value func(T) string) cache.IndexFunc {
	return func(o any) ([]string, error) {
		t, ok := o.(T)
		if !ok {
			return nil, fmt.Errorf("indexing a %T as a %T", o, t)
		}
		if v := value(t); v != "" {
			return []string{v}, nil
		}
		return nil, nil
	}
}

// Get returns the object of this key, as an object of type T.
func Get[T any](informer cache.SharedIndexInformer, key string) (none T, ok bool) {
	o, ok, err := informer.GetIndexer().GetByKey(key)
	if err != nil || !ok {
		return none, false
	}
	t, ok := o.(T)
	return t, ok
}

// ByIndex returns the objects of type T that an index has under a value. The index must exist: that it does is fixed
// when the informer is made, so an error is a mistake in the program, and the result is empty.
func ByIndex[T any](informer cache.SharedIndexInformer, index, value string) []T {
	objects, _ := informer.GetIndexer().ByIndex(index, value)
	found := make([]T, 0, len(objects))
	for _, o := range objects {
		if t, ok := o.(T); ok {
			found = append(found, t)
		}
	}
	return found
}
