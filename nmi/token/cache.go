package token

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"

	"github.com/podidentity/podidentity/identity"
)

// Origin says how an answer of the cache came about. It is fit to be a metric label.
type Origin string

const (
	Hit     Origin = "hit"     // from the cache
	Fetched Origin = "fetched" // this caller's fetch
	Shared  Origin = "shared"  // somebody else's fetch, waited for
	Failed  Origin = "failed"  // a failure from the cache
)

const (
	// fetchTimeout bounds one fetch with its retries and the wait for its turn, and so how long callers wait for it.
	// Go's SDK waits 60 s for an answer, others 100 s.
	fetchTimeout = 20 * time.Second

	// Clients that refresh do so when half of what they were told is left. A refresh here comes before that, at a
	// point drawn from this part of the rest of the life, so that a client's refresh finds a newer token.
	refreshFrom, refreshTo = 0.35, 0.475
	// minRefresh keeps a token that IMDS hands out again and again near its end from being asked for in a loop.
	minRefresh = 30 * time.Second

	// A failed refresh is tried again after refreshRetry, then after twice that, and so on up to refreshRetryMax.
	refreshRetry, refreshRetryMax = 30 * time.Second, 5 * time.Minute

	// How long a failure is kept, so that callers who come again at once do not all reach Azure.
	unavailableTTL, deniedTTL, throttledTTL = 2 * time.Second, 5 * time.Second, 1 * time.Second

	// bypassInterval is how often bypass_cache gets through for one key.
	bypassInterval = 10 * time.Second

	// recheckInterval is how often a kept failure is passed by for one key, see Request.Again, and recheckRate how often a
	// second that is done for all keys together: a part of what IMDS allows, so that there is room for the others.
	recheckInterval = time.Second
	recheckRate     = 5

	// One pod may cause this many fetches a second, and this many at once. A pod that asks for ever new resources
	// must not use up what IMDS allows all pods of the node together.
	podFetchRate, podFetchBurst = 2, 10
	// podKeys is how many tokens one pod may keep in the cache. Others must not be pushed out by it.
	podKeys = 64
)

// DefaultSize is how many tokens a cache holds: some 3 KiB each, and more than 250 pods with 8 audiences each need.
const DefaultSize = 2048

// Observer is told what the cache does, for metrics. Its methods must not block.
type Observer interface {
	// CacheAnswered: one Get ended so.
	CacheAnswered(Origin)
	// SourceAsked: one fetch ended after d; class is empty when it brought a token.
	SourceAsked(source Source, class Class, d time.Duration)
}

// Cache holds tokens, fetches those that it lacks once for all who want them, and renews those that living pods use.
// It is safe for concurrent use. Close ends its work.
type Cache struct {
	fetcher Fetcher
	allowed func(pod string, p Principal) bool
	observe Observer
	ctx     context.Context // of the fetches; ends with Close
	stop    context.CancelFunc

	mu       sync.Mutex // guards all below, and the fields of entries
	rechecks *rate.Limiter
	entries  *simplelru.LRU[Key, *entry]
	pods     map[string]*podState
}

// entry is what is known about one key. All fields are guarded by the cache's mutex.
type entry struct {
	token        Token
	failure      error // of the last fetch, if that failed; nil once one succeeds
	failureUntil time.Time
	failures     int // in a row

	fetching *fetch
	asked    time.Time           // when the last fetch began
	users    map[string]struct{} // UIDs of the living pods that asked for it
	renewal  *time.Timer
}

// fetch is a fetch under way. done is closed once the result is in.
type fetch struct {
	done  chan struct{}
	token Token
	err   error
}

// holder is a pod.
type podState struct {
	fetches *rate.Limiter
	keys    map[Key]struct{}
}

// NewCache returns a cache of size tokens before the fetcher. allowed tells whether the pod with a UID still lives and
// may still have tokens of a principal, so that they are worth renewing; it must not block nor call the cache.
func NewCache(fetcher Fetcher, size int, allowed func(pod string, p Principal) bool, observe Observer) (*Cache, error) {
	c := &Cache{fetcher: fetcher, allowed: allowed, observe: observe, rechecks: rate.NewLimiter(recheckRate, recheckRate), pods: map[string]*podState{}}
	c.ctx, c.stop = context.WithCancel(context.Background())
	var err error
	c.entries, err = simplelru.NewLRU(size, func(key Key, e *entry) { c.onEvicted(key, e) })
	return c, err
}

// Close stops renewals and ends fetches under way.
func (c *Cache) Close() {
	c.stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries.Purge()
}

// Request is what one caller wants to know.
type Request struct {
	Key Key
	// Pod is the UID of the pod that the token is for. Its token is renewed until the pod is released.
	Pod string
	// Fresh asks for a token that is not from the cache. It is granted now and then, see bypassInterval.
	Fresh bool
	// Rejected is the hash of a token that the caller wants replaced; the same as Fresh if it is the cached one.
	Rejected string
	// Again asks to look once more although a refusal is kept, because there is reason to think that it holds no longer.
	// It is granted now and then, see recheckInterval.
	Again bool
}

// ErrPodThrottled is returned to a pod that causes too many fetches.
var ErrPodThrottled = errors.New("this pod asks for new tokens too often")

// Get returns the token. The caller must have established that the pod may have it. The error is an *Error,
// ErrPodThrottled, or that of ctx, which bounds only this caller's wait.
func (c *Cache) Get(ctx context.Context, r Request) (Token, Origin, error) {
	t, origin, err := c.get(ctx, r)
	c.observe.CacheAnswered(origin)
	return t, origin, err
}

func (c *Cache) get(ctx context.Context, r Request) (Token, Origin, error) {
	now := time.Now()
	c.mu.Lock()
	pod := c.podState(r.Pod)
	e, known := c.entries.Get(r.Key)
	if known {
		fresh := r.Fresh || r.Rejected != "" && r.Rejected == e.token.SHA256()
		if now.Before(e.token.ExpiresOn) && (!fresh || now.Sub(e.asked) < bypassInterval) {
			c.addUser(r, pod, e)
			t := e.token
			if e.renewal == nil && e.fetching == nil {
				// Nobody lived who used it, now somebody does.
				c.scheduleRenewal(r.Key, e, now)
			}
			c.mu.Unlock()
			return t, Hit, nil
		}
		if !fresh && c.servesFailure(r, pod, e, now) {
			err := e.failure
			c.mu.Unlock()
			return Token{}, Failed, err
		}
	}
	origin := Shared
	if !known || e.fetching == nil {
		if !pod.fetches.AllowN(now, 1) || !c.hasRoom(pod, r.Key, now) {
			c.mu.Unlock()
			return Token{}, Failed, ErrPodThrottled
		}
		if !known {
			e = &entry{users: map[string]struct{}{}}
			c.entries.Add(r.Key, e)
		}
		origin = Fetched
		c.startFetch(Call{Key: r.Key, Pod: r.Pod, Fresh: r.Fresh || r.Rejected != ""}, e)
	}
	c.addUser(r, pod, e)
	f := e.fetching
	c.mu.Unlock()

	select {
	case <-f.done:
		return f.token, origin, f.err
	case <-ctx.Done():
		return Token{}, origin, ctx.Err()
	}
}

// servesFailure reports whether the last failure still stands for the answer. c.mu is held.
func (c *Cache) servesFailure(r Request, pod *podState, e *entry, now time.Time) bool {
	if !r.Again || classOf(e.failure) != Denied {
		return now.Before(e.failureUntil)
	}
	if e.fetching != nil {
		return false
	}
	return now.Sub(e.asked) < recheckInterval || pod.fetches.TokensAt(now) < 1 || !c.rechecks.AllowN(now, 1)
}

// holder returns what is kept about a pod. c.mu is held.
func (c *Cache) podState(pod string) *podState {
	h := c.pods[pod]
	if h == nil {
		h = &podState{fetches: rate.NewLimiter(podFetchRate, podFetchBurst), keys: map[Key]struct{}{}}
		c.pods[pod] = h
	}
	return h
}

// hasRoom reports whether the pod may keep one more key, after forgetting those of its keys that hold nothing. c.mu is held.
func (c *Cache) hasRoom(h *podState, key Key, now time.Time) bool {
	if _, has := h.keys[key]; has || len(h.keys) < podKeys {
		return true
	}
	for k := range h.keys {
		if e, ok := c.entries.Peek(k); ok && e.fetching == nil && !now.Before(e.token.ExpiresOn) {
			c.entries.Remove(k)
		}
	}
	return len(h.keys) < podKeys
}

// addUser notes that the pod uses the key. c.mu is held.
func (c *Cache) addUser(r Request, h *podState, e *entry) {
	if _, noted := e.users[r.Pod]; !noted {
		e.users[r.Pod] = struct{}{}
		h.keys[r.Key] = struct{}{}
	}
}

// Release forgets a pod that is gone: its tokens are not renewed any more unless other pods use them too. Calling it
// for a pod that never asked does nothing.
func (c *Cache) Release(pod string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.release(pod)
}

func (c *Cache) release(pod string) {
	h := c.pods[pod]
	if h == nil {
		return
	}
	delete(c.pods, pod)
	for key := range h.keys {
		if e, ok := c.entries.Peek(key); ok {
			delete(e.users, pod)
			if len(e.users) == 0 {
				e.cancelRenewal()
			}
		}
	}
}

// onEvicted tidies up after an entry that the bound on the number pushed out. c.mu is held.
func (c *Cache) onEvicted(key Key, e *entry) {
	e.cancelRenewal()
	for pod := range e.users {
		if h := c.pods[pod]; h != nil {
			delete(h.keys, key)
		}
	}
}

func (e *entry) cancelRenewal() {
	if e.renewal != nil {
		e.renewal.Stop()
		e.renewal = nil
	}
}

// startFetch begins a fetch that belongs to no caller. c.mu is held, and no other fetch of this key runs.
func (c *Cache) startFetch(call Call, e *entry) {
	e.cancelRenewal()
	f := &fetch{done: make(chan struct{})}
	e.fetching, e.asked = f, time.Now()
	go func() {
		ctx, cancel := context.WithTimeout(c.ctx, fetchTimeout)
		defer cancel()
		start := time.Now()
		f.token, f.err = c.fetcher.Fetch(ctx, call)
		c.observe.SourceAsked(call.Source, classOf(f.err), time.Since(start))
		c.mu.Lock()
		defer c.mu.Unlock()
		e.fetching = nil
		c.recordResult(call.Key, e, f)
		close(f.done)
	}()
}

func classOf(err error) Class {
	var e *Error
	switch {
	case err == nil:
		return ""
	case errors.As(err, &e):
		return e.Class
	default:
		return Unavailable
	}
}

// recordResult takes a result in. A failure leaves the token of before in place until that expires: then whoever asked for
// a fresh one gets it all the same. c.mu is held.
func (c *Cache) recordResult(key Key, e *entry, f *fetch) {
	now := time.Now()
	if f.err == nil {
		e.token, e.failure, e.failures, e.failureUntil = f.token, nil, 0, time.Time{}
	} else {
		e.failure = f.err
		e.failures++
		if !concernsOnePod(f.err) {
			e.failureUntil = now.Add(failureTTL(f.err))
		}
		if now.Before(e.token.ExpiresOn) {
			f.token, f.err = e.token, nil
		}
	}
	c.scheduleRenewal(key, e, now)
}

// concernsOnePod reports whether the failure is about the pod that the fetch was made by way of: the next to ask is another.
func concernsOnePod(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Reason == identity.PodStale
}

func failureTTL(err error) time.Duration {
	var e *Error
	errors.As(err, &e)
	switch classOf(err) {
	case Throttled:
		return max(throttledTTL, e.RetryAfter)
	case Denied:
		return deniedTTL
	default:
		return unavailableTTL
	}
}

// scheduleRenewal sets the time of the next renewal, if there is a token to renew and a pod that lives to use it. c.mu is held.
func (c *Cache) scheduleRenewal(key Key, e *entry, now time.Time) {
	e.cancelRenewal()
	// An entry that was pushed out while its fetch ran is nobody's any more.
	current, ok := c.entries.Peek(key)
	if !ok || current != e || len(e.users) == 0 || !now.Before(e.token.ExpiresOn) || c.ctx.Err() != nil {
		return
	}
	var in time.Duration
	if e.failures == 0 {
		left := e.token.ExpiresOn.Sub(e.token.Fetched)
		part := refreshFrom + rand.Float64()*(refreshTo-refreshFrom)
		at := e.token.Fetched.Add(time.Duration(float64(left) * part))
		in = max(at.Sub(now), minRefresh)
	} else {
		in = min(refreshRetry<<min(e.failures-1, 10), refreshRetryMax)
		in += time.Duration(rand.Int64N(int64(in / 4)))
		in = max(in, e.failureUntil.Sub(now))
	}
	e.renewal = time.AfterFunc(in, func() { c.renew(key, e) })
}

// renew is what a renewal's timer runs.
func (c *Cache) renew(key Key, e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.renewal = nil
	current, ok := c.entries.Peek(key)
	if !ok || current != e || e.fetching != nil || c.ctx.Err() != nil {
		return
	}
	for pod := range e.users {
		// A pod that is gone may have been noted again by a request that was under way; one that lives may have lost its
		// binding. Neither is a reason to ask Azure.
		if !c.allowed(pod, key.Principal) {
			c.removeUser(pod, key, e)
			continue
		}
		c.startFetch(Call{Key: key, Pod: pod}, e)
		return
	}
}

// removeUser notes that a pod does not use a key any more. c.mu is held.
func (c *Cache) removeUser(pod string, key Key, e *entry) {
	delete(e.users, pod)
	if h := c.pods[pod]; h != nil {
		delete(h.keys, key)
		if len(h.keys) == 0 {
			delete(c.pods, pod)
		}
	}
}

// Drop forgets all tokens of some principals. It is for those whose AzureIdentity or Secret has changed or gone. Fetches
// under way end for those who wait, and are not kept.
func (c *Cache) Drop(which func(Principal) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range c.entries.Keys() {
		if which(key.Principal) {
			c.entries.Remove(key)
		}
	}
}

// Len returns how many keys are held.
func (c *Cache) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries.Len()
}
