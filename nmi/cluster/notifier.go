package cluster

import "sync"

// Key stands for a group of objects. A subscriber of a Notifier names the groups whose changes wake it.
type Key struct{ kind, name string }

// PodKey is the key of a pod and its assignments.
func PodKey(namespace, name string) Key { return Key{"pod", namespace + "/" + name} }

// BindingsKey is the key of the bindings with this selector.
func BindingsKey(selector string) Key { return Key{"bindings", selector} }

// ExceptionsKey is the key of the exceptions of a namespace.
func ExceptionsKey(namespace string) Key { return Key{"exceptions", namespace} }

// IdentitiesKey is the key of all identities. One key for all is enough, because identities rarely change.
func IdentitiesKey() Key { return Key{"identities", ""} }

// Notifier wakes only the subscribers of the keys that changed. When all pods of a node start at once, there are
// thousands of events and hundreds of waiting requests, and each request depends on few of the events. The zero value
// is ready for use.
type Notifier struct {
	mu          sync.Mutex
	subscribers map[Key]map[chan struct{}]struct{}
}

// Subscribe returns a channel that receives a value after Notify is called for one of the keys. Calls of Notify before
// the subscriber reads the value add no further value. unsubscribe ends the subscription.
func (n *Notifier) Subscribe(keys ...Key) (changed <-chan struct{}, unsubscribe func()) {
	ch := make(chan struct{}, 1)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.subscribers == nil {
		n.subscribers = map[Key]map[chan struct{}]struct{}{}
	}
	for _, key := range keys {
		if n.subscribers[key] == nil {
			n.subscribers[key] = map[chan struct{}]struct{}{}
		}
		n.subscribers[key][ch] = struct{}{}
	}
	return ch, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, key := range keys {
			if delete(n.subscribers[key], ch); len(n.subscribers[key]) == 0 {
				delete(n.subscribers, key)
			}
		}
	}
}

// Notify wakes the subscribers of a key. It does not block.
func (n *Notifier) Notify(key Key) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ch := range n.subscribers[key] {
		select {
		case ch <- struct{}{}:
		default: // the subscriber has not read an earlier value yet
		}
	}
}

// SubscribedKeys returns the number of keys that have subscribers.
func (n *Notifier) SubscribedKeys() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.subscribers)
}
