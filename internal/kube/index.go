package kube

import (
	"fmt"

	"k8s.io/client-go/tools/cache"
)

// IndexBy returns an index function for objects of type T. value returns the index value of an object, or "" if the
// object is not in the index.
func IndexBy[T any](value func(T) string) cache.IndexFunc {
	return func(o any) ([]string, error) {
		t, ok := o.(T)
		if !ok {
			return nil, fmt.Errorf("the index of objects of type %[2]T was given a %[1]T", o, t)
		}
		if v := value(t); v != "" {
			return []string{v}, nil
		}
		return nil, nil
	}
}

// Get returns the object with this key from the cache of the informer. ok is false if there is none, or if it is not a
// T.
func Get[T any](informer cache.SharedIndexInformer, key string) (none T, ok bool) {
	o, ok, err := informer.GetIndexer().GetByKey(key)
	if err != nil || !ok {
		return none, false
	}
	t, ok := o.(T)
	return t, ok
}

// ByIndex returns the objects of type T that an index has under a value. The index must have been given to the informer
// when it was created. If it was not, which is a programming error, the result is empty.
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
