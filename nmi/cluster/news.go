package cluster

import "sync"

// Topic is what somebody may wait for news of: one thing of a kind.
type Topic struct{ kind, name string }

// OfPod is news of the pod itself, and of what it is assigned.
func OfPod(namespace, name string) Topic { return Topic{"pod", namespace + "/" + name} }

// OfBindings is news of the bindings that select this.
func OfBindings(selector string) Topic { return Topic{"bindings", selector} }

// OfExceptions is news of the exceptions of a namespace.
func OfExceptions(namespace string) Topic { return Topic{"exceptions", namespace} }

// OfIdentities is news of all identities together, since edits of them are rare.
func OfIdentities() Topic { return Topic{"identities", ""} }

// News wakes those who wait for a change of some things among many, and nobody else: on a node whose pods all start at
// once there are thousands of events, and hundreds of requests that wait for one of them each. Its zero value is ready
// for use.
type News struct {
	mu      sync.Mutex
	readers map[Topic]map[chan struct{}]struct{}
}

// Read returns a channel that has something in it whenever there has been news of the topics since it was last looked
// into. stop ends that.
func (n *News) Read(topics ...Topic) (told <-chan struct{}, stop func()) {
	ch := make(chan struct{}, 1)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.readers == nil {
		n.readers = map[Topic]map[chan struct{}]struct{}{}
	}
	for _, t := range topics {
		if n.readers[t] == nil {
			n.readers[t] = map[chan struct{}]struct{}{}
		}
		n.readers[t][ch] = struct{}{}
	}
	return ch, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, t := range topics {
			if delete(n.readers[t], ch); len(n.readers[t]) == 0 {
				delete(n.readers, t)
			}
		}
	}
}

// Tell wakes the readers of a topic. It does not wait for them.
func (n *News) Tell(t Topic) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ch := range n.readers[t] {
		select {
		case ch <- struct{}{}:
		default: // it has not looked yet
		}
	}
}

// Readers is how many wait for news of each topic.
func (n *News) Readers() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.readers)
}
