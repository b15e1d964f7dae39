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

// With the functions of this file, tests read and change objects directly, without HTTP, faults and subresources. The
// changes stand for those that clients other than MIC make.

func kindFor[T any](s *apiServer) *kind {
	t := reflect.TypeFor[T]()
	k := s.kindOf(func(k *kind) bool { return k.goType == t })
	if k == nil {
		panic(fmt.Sprintf("the fake API server does not serve %s", t))
	}
	return k
}

func decodeObject[T any](o *object) *T {
	v := new(T)
	if err := json.Unmarshal(o.raw, v); err != nil {
		panic(err)
	}
	return v
}

func encodeObject[T any](v *T) *unstructured.Unstructured {
	u := &unstructured.Unstructured{}
	if err := utiljson.Unmarshal(mustMarshal(v), &u.Object); err != nil {
		panic(err)
	}
	return u
}

// createObject creates an object with its status, or returns the error of the server.
func createObject[T any](s *apiServer, v *T) (*T, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, u := kindFor[T](s), encodeObject(v)
	if k.namespaced {
		if err := s.checkNamespace(k, u); err != nil {
			return nil, err
		}
	}
	if _, ok := k.objects[objectKey{u.GetNamespace(), u.GetName()}]; ok {
		return nil, apierrors.NewAlreadyExists(k.groupResource(), u.GetName())
	}
	if err := s.validate(k, u); err != nil {
		return nil, err
	}
	o, err := s.insert(k, u)
	if err != nil {
		return nil, err
	}
	return decodeObject[T](o), nil
}

// editObject changes an object including its status; false if it does not exist.
func editObject[T any](s *apiServer, namespace, name string, change func(*T)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := kindFor[T](s)
	old, ok := k.objects[objectKey{namespace, name}]
	if !ok {
		return false
	}
	v := decodeObject[T](old)
	change(v)
	if _, err := s.replace(k, old, encodeObject(v)); err != nil {
		panic(fmt.Sprintf("editing %s %s/%s: %v", k.resource, namespace, name, err))
	}
	return true
}

// deleteObject deletes an object with the default grace period or the given one; false if it does not exist.
func deleteObject[T any](s *apiServer, namespace, name string, grace ...int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	var options metav1.DeleteOptions
	if len(grace) > 0 {
		options.GracePeriodSeconds = &grace[0]
	}
	_, err := s.remove(kindFor[T](s), objectKey{namespace, name}, options)
	return err == nil
}

func getObject[T any](s *apiServer, namespace, name string) (*T, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := kindFor[T](s).objects[objectKey{namespace, name}]
	if !ok {
		return nil, false
	}
	return decodeObject[T](o), true
}

// listObjects returns the objects of a kind, sorted by namespace and name. Callers must not change them.
func listObjects[T any](s *apiServer) []*T {
	s.mu.Lock()
	defer s.mu.Unlock()
	selected, err := s.selectObjects(&call{kind: kindFor[T](s)})
	if err != nil {
		panic(err)
	}
	found := make([]*T, len(selected))
	for i, o := range selected {
		found[i] = decodedObject[T](o)
	}
	return found
}

// decodedObject returns the object in its Go type. Callers must not change it. They hold the mutex of the objectStore,
// which guards o.decoded.
func decodedObject[T any](o *object) *T {
	if o.decoded == nil {
		o.decoded = decodeObject[T](o)
	}
	return o.decoded.(*T)
}

// listObjectsAt returns the objects of a kind as of a version of the server. Callers must not change them.
func listObjectsAt[T any](s *apiServer, version int64) []*T {
	s.mu.Lock()
	defer s.mu.Unlock()
	existing := map[objectKey]*object{}
	for _, c := range kindFor[T](s).history {
		if c.version > version {
			break
		}
		if existing[c.after.key] = c.after; c.deleted {
			delete(existing, c.after.key)
		}
	}
	found := make([]*T, 0, len(existing))
	for _, o := range existing {
		found = append(found, decodedObject[T](o))
	}
	return found
}

// versionAt returns the version of the last change that was not later than when. It considers only changes of the given
// resources; if none are given, all changes.
func (s *objectStore) versionAt(when time.Time, resources ...string) (version int64) {
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

// changeTimes returns the times of the changes of a kind that were later than after and not later than until.
func changeTimes[T any](s *apiServer, after, until time.Time) (times []time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range kindFor[T](s).history {
		if c.at.After(after) && !c.at.After(until) {
			times = append(times, c.at)
		}
	}
	return times
}

// allStates returns all states that objects of a kind ever had. Callers must not change them.
func allStates[T any](s *apiServer) (states []*T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range kindFor[T](s).history {
		states = append(states, decodedObject[T](c.after))
	}
	return states
}
