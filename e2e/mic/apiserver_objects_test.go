package mic

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"sort"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utiljson "k8s.io/apimachinery/pkg/util/json"
)

// Tests look at and change the cluster without HTTP, faults and subresources, as its other inhabitants would.

func kindFor[T any](s *apiServer) *kind {
	t := reflect.TypeFor[T]()
	k := s.kindOf(func(k *kind) bool { return k.goType == t })
	if k == nil {
		panic(fmt.Sprintf("the API server knows no %s", t))
	}
	return k
}

func typed[T any](o *object) *T {
	v := new(T)
	if err := json.Unmarshal(o.raw, v); err != nil {
		panic(err)
	}
	return v
}

func untyped[T any](v *T) *unstructured.Unstructured {
	u := &unstructured.Unstructured{}
	if err := utiljson.Unmarshal(mustEncode(v), &u.Object); err != nil {
		panic(err)
	}
	return u
}

// put creates an object with its status, or gives the error of the server.
func put[T any](s *apiServer, v *T) (*T, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, u := kindFor[T](s), untyped(v)
	if k.namespaced {
		if err := s.mayCreateIn(k, u); err != nil {
			return nil, err
		}
	}
	if _, ok := k.objects[objectKey{u.GetNamespace(), u.GetName()}]; ok {
		return nil, apierrors.NewAlreadyExists(k.groupResource(), u.GetName())
	}
	o, err := s.insert(k, u)
	if err != nil {
		return nil, err
	}
	return typed[T](o), nil
}

// edit changes an object, status and all; false if it is not there.
func edit[T any](s *apiServer, namespace, name string, change func(*T)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := kindFor[T](s)
	old, ok := k.objects[objectKey{namespace, name}]
	if !ok {
		return false
	}
	v := typed[T](old)
	change(v)
	if _, err := s.replace(k, old, untyped(v)); err != nil {
		panic(fmt.Sprintf("edit of %s %s/%s: %v", k.resource, namespace, name, err))
	}
	return true
}

// drop deletes an object as kubectl does, or at once; false if it is not there.
func drop[T any](s *apiServer, namespace, name string, grace ...int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	var options metav1.DeleteOptions
	if len(grace) > 0 {
		options.GracePeriodSeconds = &grace[0]
	}
	_, err := s.remove(kindFor[T](s), objectKey{namespace, name}, options)
	return err == nil
}

func get[T any](s *apiServer, namespace, name string) (*T, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := kindFor[T](s).objects[objectKey{namespace, name}]
	if !ok {
		return nil, false
	}
	return typed[T](o), true
}

// all returns the objects of a kind, by namespace and name, to be read only.
func all[T any](s *apiServer) []*T {
	s.mu.Lock()
	defer s.mu.Unlock()
	selected, err := s.selected(&call{kind: kindFor[T](s)})
	if err != nil {
		panic(err)
	}
	found := make([]*T, len(selected))
	for i, o := range selected {
		found[i] = seen[T](o)
	}
	return found
}

// seen is the object in its Go type, to be read only. s.mu is held.
func seen[T any](o *object) *T {
	if o.asType == nil {
		o.asType = typed[T](o)
	}
	return o.asType.(*T)
}

// at returns what objects of a kind there were when the server had a version, to be read only.
func at[T any](s *apiServer, version int64) []*T {
	s.mu.Lock()
	defer s.mu.Unlock()
	there := map[objectKey]*object{}
	for _, c := range kindFor[T](s).history {
		if c.version > version {
			break
		}
		if there[c.now.key] = c.now; c.gone {
			delete(there, c.now.key)
		}
	}
	found := make([]*T, 0, len(there))
	for _, o := range there {
		found = append(found, seen[T](o))
	}
	return found
}

// versionAt is the version of the last change of any of these resources up to some time; without any, of all.
func (s *apiServer) versionAt(when time.Time, resources ...string) (version int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, k := range s.kinds {
		if len(resources) > 0 && !slices.Contains(resources, name) {
			continue
		}
		n := sort.Search(len(k.history), func(i int) bool { return k.history[i].at.After(when) })
		if n > 0 {
			version = max(version, k.history[n-1].version)
		}
	}
	return version
}

// changedBetween returns the times of changes after the one and up to the other.
func changedBetween[T any](s *apiServer, after, until time.Time) (times []time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range kindFor[T](s).history {
		if c.at.After(after) && !c.at.After(until) {
			times = append(times, c.at)
		}
	}
	return times
}

// everyState returns all states that objects of a kind ever had, to be read only.
func everyState[T any](s *apiServer) (states []*T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range kindFor[T](s).history {
		states = append(states, seen[T](c.now))
	}
	return states
}
