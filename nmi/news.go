package nmi

import "sync"

// topic is what somebody may wait for news of: one thing of a kind.
type topic struct{ kind, name string }

const (
	ofPod        = "pod"        // by namespace/name: the pod itself, and what it is assigned
	ofBindings   = "bindings"   // by what they select
	ofExceptions = "exceptions" // by namespace
	ofIdentities = "identities" // of all together, since edits of them are rare
)

// news wakes those who wait for a change of some things among many, and nobody else: on a node whose pods all start at
// once there are thousands of events, and hundreds of requests that wait for one of them each. Its zero value is ready
// for use.
type news struct {
	mu      sync.Mutex
	readers map[topic]map[chan struct{}]struct{}
}

// read returns a channel that has something in it whenever there has been news of the topics since it was last looked
// into. stop ends that.
func (n *news) read(topics ...topic) (told <-chan struct{}, stop func()) {
	ch := make(chan struct{}, 1)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.readers == nil {
		n.readers = map[topic]map[chan struct{}]struct{}{}
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

// tell wakes the readers of a topic. It does not wait for them.
func (n *news) tell(t topic) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ch := range n.readers[t] {
		select {
		case ch <- struct{}{}:
		default: // it has not looked yet
		}
	}
}
