package cluster

import "sync"

// Key is what somebody may wait for news of: one thing of a kind.
type Key struct{ kind, name string }

// PodKey is news of the pod itself, and of what it is assigned.
func PodKey(namespace, name string) Key { return Key{"pod", namespace + "/" + name} }

// BindingsKey is news of the bindings that select this.
func BindingsKey(selector string) Key { return Key{"bindings", selector} }

// ExceptionsKey is news of the exceptions of a namespace.
func ExceptionsKey(namespace string) Key { return Key{"exceptions", namespace} }

// IdentitiesKey is news of all identities together, since edits of them are rare.
func IdentitiesKey() Key { return Key{"identities", ""} }

// Notifier wakes those who wait for a change of some things among many, and nobody else: on a node whose pods all start at
// once there are thousands of events, and hundreds of requests that wait for one of them each. Its zero value is ready
// for use.
type Notifier struct {
	mu          sync.Mutex
	subscribers map[Key]map[chan struct{}]struct{}
}

// Subscribe returns a channel that has something in it whenever there has been news of the keys since it was last looked
// into. stop ends that.
func (n *Notifier) Subscribe(keys ...Key) (told <-chan struct{}, stop func()) {
	ch := make(chan struct{}, 1)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.subscribers == nil {
		n.subscribers = map[Key]map[chan struct{}]struct{}{}
	}
	for _, t := range keys {
		if n.subscribers[t] == nil {
			n.subscribers[t] = map[chan struct{}]struct{}{}
		}
		n.subscribers[t][ch] = struct{}{}
	}
	return ch, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, t := range keys {
			if delete(n.subscribers[t], ch); len(n.subscribers[t]) == 0 {
				delete(n.subscribers, t)
			}
		}
	}
}

// Notify wakes the subscribers of a topic. It does not wait for them.
func (n *Notifier) Notify(t Key) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ch := range n.subscribers[t] {
		select {
		case ch <- struct{}{}:
		default: // it has not looked yet
		}
	}
}

// Subscribed is how many wait for news of each topic.
func (n *Notifier) Subscribed() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.subscribers)
}
