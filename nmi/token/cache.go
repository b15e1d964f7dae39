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
	"github.com/podidentity/podidentity/internal/retry"
)

// Origin says where a result of the cache comes from. It has few values, so it can be a metric label.
type Origin string

const (
	Hit     Origin = "hit"     // a cached token
	Fetched Origin = "fetched" // a fetch that this caller started
	Shared  Origin = "shared"  // a fetch that another caller started
	Failed  Origin = "failed"  // a cached failure, or a throttled pod
)

const (
	// fetchTimeout bounds one fetch, including its retries and the wait for rate limits, and so how long callers wait
	// for it. It is shorter than the timeouts of clients: the Azure SDK for Go waits 60 s for a response of IMDS, other
	// SDKs 100 s.
	fetchTimeout = 20 * time.Second

	// The cache renews a token after a random fraction of the lifetime that the token had when it was fetched. The
	// fraction is between refreshFrom and refreshTo. Azure SDKs refresh a token at the earliest when half of its
	// lifetime has passed, so they get the renewed token.
	refreshFrom, refreshTo = 0.35, 0.475
	// minRefresh is the minimum time until a scheduled renewal. It prevents a loop of requests when IMDS keeps
	// returning the same token shortly before the token expires.
	minRefresh = 30 * time.Second

	// How long a failure is served from the cache, so that not every retry of a caller causes a request to Azure. A
	// failure of class Throttled is served for Error.RetryAfter if that is longer than throttledTTL.
	unavailableTTL, deniedTTL, throttledTTL = 2 * time.Second, 5 * time.Second, 1 * time.Second

	// bypassInterval is the minimum time from the start of a fetch to a fetch that bypasses the cached token of the
	// same key, see Request.Fresh and Request.Rejected. Within this time such requests get the cached token.
	bypassInterval = 10 * time.Second

	// recheckInterval is the minimum time from the start of a fetch to a recheck of a cached refusal for the same key,
	// see Request.Recheck. recheckRate bounds the rechecks of all keys together, per second. It is only a part of the
	// rate that IMDS allows; the rest is for other requests.
	recheckInterval = time.Second
	recheckRate     = 5

	// The fetches per second that one pod may cause, and the burst. A pod that requests many different resources must
	// not use up the rate that IMDS allows for all pods of the node together.
	podFetchRate, podFetchBurst = 2, 10
	// podKeys bounds the tokens of one pod in the cache, so that one pod cannot fill the cache and evict the tokens of
	// other pods.
	podKeys = 64
)

// refreshBackoff gives the wait from a failed fetch to the next renewal.
var refreshBackoff = retry.Backoff{Initial: 30 * time.Second, Max: 5 * time.Minute, Jitter: 0.25}

// DefaultSize is the maximum number of tokens in NMI's cache, about 3 KiB each. It is enough for 250 pods that use 8
// resources each.
const DefaultSize = 2048

// Observer receives what the cache does, for metrics. Its methods must not block.
type Observer interface {
	// CacheResult is called when a Get ends.
	CacheResult(Origin)
	// FetchDone is called when a fetch ends, with its duration. class is empty if the fetch returned a token.
	FetchDone(source Source, class Class, d time.Duration)
}

// Cache holds tokens. It fetches a missing token once for all callers that wait for it, and renews tokens that running
// pods use. It is safe for concurrent use. Close stops it.
type Cache struct {
	fetcher Fetcher
	allowed func(pod string, p Principal) bool
	observe Observer
	ctx     context.Context // parent of the contexts of fetches; Close cancels it
	stop    context.CancelFunc

	mu       sync.Mutex // guards the fields below, and the fields of entries
	rechecks *rate.Limiter
	entries  *simplelru.LRU[Key, *entry]
	pods     map[string]*podState
}

// entry is the state of one key. The cache's mutex guards all fields.
type entry struct {
	token        Token
	failure      error // of the last fetch; nil if that succeeded
	failureUntil time.Time
	failures     int // consecutive failed fetches

	fetching *fetch
	asked    time.Time           // when the last fetch started
	users    map[string]struct{} // UIDs of the pods that requested the token; Release and renew remove them
	renewal  *time.Timer
}

// fetch is a running fetch. done is closed when token and err are set.
type fetch struct {
	done  chan struct{}
	token Token
	err   error
}

// podState is what the cache keeps about a pod.
type podState struct {
	fetches *rate.Limiter
	keys    map[Key]struct{}
}

// NewCache returns a cache that holds up to size tokens and gets them from the fetcher. allowed reports whether the pod
// with a UID still runs and may still have tokens of a principal; the cache renews a token only for such pods. allowed
// must neither block nor call the cache.
func NewCache(fetcher Fetcher, size int, allowed func(pod string, p Principal) bool, observe Observer) (*Cache, error) {
	c := &Cache{fetcher: fetcher, allowed: allowed, observe: observe, rechecks: rate.NewLimiter(recheckRate, recheckRate), pods: map[string]*podState{}}
	c.ctx, c.stop = context.WithCancel(context.Background())
	var err error
	c.entries, err = simplelru.NewLRU(size, func(key Key, e *entry) { c.onEvicted(key, e) })
	return c, err
}

// Close stops renewals and cancels running fetches.
func (c *Cache) Close() {
	c.stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries.Purge()
}

// Request is the request of one caller.
type Request struct {
	Key Key
	// Pod is the UID of the pod that the token is for. The cache renews the token until the pod is released or may no
	// longer have the token.
	Pod string
	// Fresh requests a token that comes neither from this cache nor from a cache of the source. The rate is limited,
	// see bypassInterval.
	Fresh bool
	// Rejected is the hash of a token that the caller does not accept, see Token.SHA256. If the cached token has this
	// hash, Rejected has the effect of Fresh. A fetch that a request with Rejected starts bypasses the caches of the
	// source, because they may have the rejected token.
	Rejected string
	// Recheck requests a new fetch although a refusal is cached, because the refusal is probably outdated. The rate is
	// limited, see recheckInterval.
	Recheck bool
}

// ErrPodThrottled is the error for a pod that causes too many fetches, has podKeys tokens in the cache, or uses too
// many Secrets. Package credentials returns it for the Secrets.
var ErrPodThrottled = errors.New("this pod requests new tokens too often, or uses too many different tokens or Secrets")

// Get returns the token. Before the call, the caller must check that the pod may have the token. The error is that of
// the Fetcher (from [Sources] an *Error), ErrPodThrottled, or the error of ctx. The end of ctx ends the wait of this
// caller, not the fetch.
func (c *Cache) Get(ctx context.Context, r Request) (Token, Origin, error) {
	t, origin, err := c.get(ctx, r)
	c.observe.CacheResult(origin)
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
				// An earlier renewal was stopped because no pod used the token any more.
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
		c.startFetch(Call{Key: r.Key, Pod: r.Pod, Fresh: r.Fresh || r.Rejected != ""}, e) //nolint:contextcheck // other callers wait for this token, too
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

// servesFailure reports whether Get returns the cached failure instead of starting or joining a fetch. c.mu is held.
func (c *Cache) servesFailure(r Request, pod *podState, e *entry, now time.Time) bool {
	if !r.Recheck || classOf(e.failure) != Denied {
		return now.Before(e.failureUntil)
	}
	if e.fetching != nil {
		return false
	}
	return now.Sub(e.asked) < recheckInterval || pod.fetches.TokensAt(now) < 1 || !c.rechecks.AllowN(now, 1)
}

// podState returns the state of a pod, and creates it if there is none. c.mu is held.
func (c *Cache) podState(pod string) *podState {
	h := c.pods[pod]
	if h == nil {
		h = &podState{fetches: rate.NewLimiter(podFetchRate, podFetchBurst), keys: map[Key]struct{}{}}
		c.pods[pod] = h
	}
	return h
}

// hasRoom reports whether the pod may use the key. If the pod has podKeys keys already, hasRoom first removes from the
// cache those keys of the pod that have neither a valid token nor a running fetch. c.mu is held.
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

// addUser records that the pod uses the key. c.mu is held.
func (c *Cache) addUser(r Request, h *podState, e *entry) {
	if _, known := e.users[r.Pod]; !known {
		e.users[r.Pod] = struct{}{}
		h.keys[r.Key] = struct{}{}
	}
}

// Release removes the state of a deleted or finished pod. The cache stops renewing its tokens unless other pods use
// them too. For a pod without state it does nothing.
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

// onEvicted stops the renewal of an entry and removes its key from the pods that use it. It is called when the entry is
// removed, or evicted because the cache is full. c.mu is held.
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

// startFetch starts a fetch whose context belongs to no caller. c.mu is held, and no other fetch of this entry runs.
func (c *Cache) startFetch(call Call, e *entry) {
	e.cancelRenewal()
	f := &fetch{done: make(chan struct{})}
	e.fetching, e.asked = f, time.Now()
	go func() {
		ctx, cancel := context.WithTimeout(c.ctx, fetchTimeout)
		defer cancel()
		start := time.Now()
		f.token, f.err = c.fetcher.Fetch(ctx, call)
		c.observe.FetchDone(call.Source, classOf(f.err), time.Since(start))
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

// recordResult stores the result of a fetch. After a failure the entry keeps its previous token. If that token has not
// expired, the callers that wait for the fetch get that token instead of the failure. c.mu is held.
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

// concernsOnePod reports whether the failure is about the pod of the call. Such a failure is not cached, because a
// fetch of the same key for another pod can succeed.
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

// scheduleRenewal sets the timer of the next renewal, if the token has not expired and a pod uses it. c.mu is held.
func (c *Cache) scheduleRenewal(key Key, e *entry, now time.Time) {
	e.cancelRenewal()
	// The entry may have been removed from the cache while its fetch ran.
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
		in = max(refreshBackoff.After(e.failures), e.failureUntil.Sub(now))
	}
	e.renewal = time.AfterFunc(in, func() { c.renew(key, e) })
}

// renew starts a fetch that renews the token of an entry, if a pod that uses the token is still allowed to have it. The
// renewal timer calls renew.
func (c *Cache) renew(key Key, e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.renewal = nil
	current, ok := c.entries.Peek(key)
	if !ok || current != e || e.fetching != nil || c.ctx.Err() != nil {
		return
	}
	for pod := range e.users {
		// allowed returns false for two kinds of users: a pod that lost its binding, and a pod that is gone. A pod that
		// is gone is still a user if its last request was running at the call of Release and added the pod afterwards.
		if !c.allowed(pod, key.Principal) {
			c.removeUser(pod, key, e)
			continue
		}
		c.startFetch(Call{Key: key, Pod: pod}, e)
		return
	}
}

// removeUser records that the pod no longer uses the key, and drops the state of a pod that uses no key. c.mu is held.
func (c *Cache) removeUser(pod string, key Key, e *entry) {
	delete(e.users, pod)
	if h := c.pods[pod]; h != nil {
		delete(h.keys, key)
		if len(h.keys) == 0 {
			delete(c.pods, pod)
		}
	}
}

// Drop calls which for each principal, and removes all tokens of the principal if which returns true. Drop is called
// after an AzureIdentity or a Secret changed or was deleted, and after the last pod that used a Secret was released.
// Callers that wait for a running fetch get the result of the fetch, but the cache does not keep that result.
func (c *Cache) Drop(which func(Principal) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range c.entries.Keys() {
		if which(key.Principal) {
			c.entries.Remove(key)
		}
	}
}

// Len returns the number of keys in the cache.
func (c *Cache) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries.Len()
}
