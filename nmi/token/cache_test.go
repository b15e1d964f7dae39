package token

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// source is a fetcher that records its calls and returns the configured results.
type source struct {
	mu     sync.Mutex
	calls  []Key
	fresh  int
	takes  time.Duration
	fails  error
	lasts  time.Duration
	serial int
}

func (s *source) Fetch(ctx context.Context, call Call) (Token, error) {
	s.mu.Lock()
	s.calls = append(s.calls, call.Key)
	if call.Fresh {
		s.fresh++
	}
	s.serial++
	serial, takes, fails, lasts := s.serial, s.takes, s.fails, s.lasts
	s.mu.Unlock()
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return Token{}, ctx.Err()
	}
	if fails != nil {
		return Token{}, fails
	}
	now := time.Now()
	return Token{AccessToken: fmt.Sprintf("%s#%d", call.ClientID, serial), Fetched: now, ExpiresOn: now.Add(lasts)}, nil
}

func (s *source) set(change func(*source)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *source) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.calls)
}

type noObserver struct{}

func (noObserver) CacheResult(Origin)                     {}
func (noObserver) FetchDone(Source, Class, time.Duration) {}

// inBubble runs the test with a fake clock, a source of tokens that last a day, and a cache whose function allowed
// always returns true.
func inBubble(t *testing.T, test func(t *testing.T, s *source, c *Cache)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &source{lasts: 24 * time.Hour, takes: 50 * time.Millisecond}
		c, err := NewCache(s, 100, func(string, Principal) bool { return true }, noObserver{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		test(t, s, c)
	})
}

func mustGet(t *testing.T, c *Cache, r Request) (Token, Origin) {
	t.Helper()
	token, origin, err := c.Get(t.Context(), r)
	if err != nil {
		t.Fatalf("Get: %v", err)
	}
	return token, origin
}

func key(name string) Key { return ManagedKey(name, "", "", "https://vault.azure.net") }

func TestConcurrentRequestsOf250PodsCauseOneFetch(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		var wg sync.WaitGroup
		tokens := make([]string, 250)
		for i := range tokens {
			wg.Go(func() {
				token, _ := mustGet(t, c, Request{Key: key("a"), Pod: fmt.Sprint("pod", i)})
				tokens[i] = token.AccessToken
			})
		}
		wg.Wait()
		for i, got := range tokens {
			if got != "a#1" {
				t.Errorf("pod %d got %q", i, got)
			}
		}
		if s.count() != 1 {
			t.Errorf("250 concurrent requests caused %d fetches, want one", s.count())
		}
		if _, origin := mustGet(t, c, Request{Key: key("a"), Pod: "pod0"}); origin != Hit {
			t.Errorf("a request after the fetch has origin %s, not hit", origin)
		}
	})
}

func TestKeysThatDifferInAnyPartShareNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		keys := []Key{
			ManagedKey("x", "", "", "r"), ManagedKey("", "x", "", "r"), ManagedKey("", "", "x", "r"), ManagedKey("", "", "", "r"),
			ManagedKey("x", "", "", "R"), ManagedKey("x", "", "", "r/"), ManagedKey("y", "", "", "r"),
		}
		for i, k := range keys {
			mustGet(t, c, Request{Key: k, Pod: "p"})
			if s.count() != i+1 {
				t.Errorf("%+v was served with another key's token", k)
			}
		}
		if ManagedKey("ABC", "", "", "r") != ManagedKey("abc", "", "", "r") {
			t.Error("IDs that differ only in case have different keys")
		}
	})
}

func TestACanceledCallerDoesNotCancelTheFetchForOthers(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		ctx, cancel := context.WithCancel(t.Context())
		first := make(chan error)
		go func() {
			_, _, err := c.Get(ctx, Request{Key: key("a"), Pod: "p1"})
			first <- err
		}()
		synctest.Wait()
		second := make(chan string)
		go func() {
			token, _, _ := c.Get(context.Background(), Request{Key: key("a"), Pod: "p2"})
			second <- token.AccessToken
		}()
		synctest.Wait()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("the canceled caller got %v", err)
		}
		if got := <-second; got != "a#1" {
			t.Errorf("the other caller got %q", got)
		}
	})
}

func TestATokenIsRenewedBeforeHalfOfItsLifeWhileAPodLives(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		mustGet(t, c, Request{Key: key("a"), Pod: "p"})
		time.Sleep(8*time.Hour + 20*time.Minute) // the token is 0.347 of 24 h old
		synctest.Wait()
		if s.count() != 1 {
			t.Fatalf("the token was renewed before refreshFrom of its life: %d fetches", s.count())
		}
		time.Sleep(3*time.Hour + 20*time.Minute) // the token is 0.486 of 24 h old
		synctest.Wait()
		if s.count() != 2 {
			t.Fatalf("%d fetches before half of the life of the token, want 2", s.count())
		}
		if token, origin := mustGet(t, c, Request{Key: key("a"), Pod: "p"}); token.AccessToken != "a#2" || origin != Hit {
			t.Errorf("after the renewal: got token %q with origin %s, want the renewed token from the cache", token.AccessToken, origin)
		}
		time.Sleep(100 * time.Hour)
		synctest.Wait()
		if n := s.count(); n < 8 || n > 14 {
			t.Errorf("%d fetches in 112 h, want 8 to 14", n)
		}
	})
}

func TestRenewalsOfManyTokensAreSpread(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		for i := range 50 {
			mustGet(t, c, Request{Key: key(fmt.Sprint("id", i)), Pod: fmt.Sprint("p", i)})
		}
		most := 0
		for range 24 * 60 {
			before := s.count()
			time.Sleep(time.Minute)
			synctest.Wait()
			most = max(most, s.count()-before)
		}
		if most > 6 {
			t.Errorf("%d of 50 tokens were renewed within one minute, want at most 6", most)
		}
	})
}

func TestATokenIsNotRenewedForAPodThatIsGone(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		mustGet(t, c, Request{Key: key("a"), Pod: "p1"})
		mustGet(t, c, Request{Key: key("a"), Pod: "p2"})
		c.Release("p1")
		c.Release("p1")
		time.Sleep(23 * time.Hour)
		synctest.Wait()
		before := s.count()
		if before < 2 {
			t.Error("the token was not renewed although pod p2 still uses it")
		}
		c.Release("p2")
		time.Sleep(100 * time.Hour)
		synctest.Wait()
		if s.count() != before {
			t.Errorf("%d fetches of a token that no pod uses any more", s.count()-before)
		}
	})
}

func TestARequestAfterItsPodWasReleasedRenewsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{lasts: time.Hour, takes: time.Second}
		c, _ := NewCache(s, 10, func(string, Principal) bool { return false }, noObserver{})
		defer c.Close()
		mustGet(t, c, Request{Key: key("a"), Pod: "gone"})
		time.Sleep(100 * time.Hour)
		synctest.Wait()
		if s.count() != 1 || len(c.pods) != 0 {
			t.Errorf("for a pod that is gone: %d fetches, want one, and the state of %d pods is kept, want none", s.count(), len(c.pods))
		}
	})
}

func TestATokenIsServedUntilItExpiresWhileTheSourceFails(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		start := time.Now()
		mustGet(t, c, Request{Key: key("a"), Pod: "p"})
		s.set(func(s *source) { s.fails = &Error{Class: Unavailable, Status: 500} })
		for time.Since(start) < 23*time.Hour+59*time.Minute {
			time.Sleep(time.Minute)
			if token, origin := mustGet(t, c, Request{Key: key("a"), Pod: "p"}); origin != Hit || token.AccessToken != "a#1" {
				t.Fatalf("%s after the fetch: origin %s, token %q; want the first token from the cache", time.Since(start), origin, token.AccessToken)
			}
		}
		if n := s.count(); n > 200 {
			t.Errorf("%d fetches in half a day: the renewal does not back off", n)
		}
		time.Sleep(2 * time.Minute)
		var e *Error
		if _, _, err := c.Get(t.Context(), Request{Key: key("a"), Pod: "p"}); !errors.As(err, &e) || e.Class != Unavailable {
			t.Errorf("after the token has expired, the caller must get the failure; got %v", err)
		}
		s.set(func(s *source) { s.fails = nil })
		time.Sleep(10 * time.Minute)
		if token, _ := mustGet(t, c, Request{Key: key("a"), Pod: "p"}); !strings.HasPrefix(token.AccessToken, "a#") {
			t.Errorf("after the recovery of the source: got token %q", token.AccessToken)
		}
	})
}

func TestFailuresAreServedAccordingToTheirClass(t *testing.T) {
	cases := []struct {
		name string
		err  error
		kept time.Duration
	}{
		{"unavailable", &Error{Class: Unavailable}, unavailableTTL},
		{"denied", &Error{Class: Denied, Status: 400}, deniedTTL},
		{"throttled", &Error{Class: Throttled}, throttledTTL},
		{"throttled, with a time", &Error{Class: Throttled, RetryAfter: 20 * time.Second}, 20 * time.Second},
		{"of unknown class", errors.New("?"), unavailableTTL},
	}
	for _, test := range cases {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *source, c *Cache) {
				s.fails = test.err
				for _, step := range []struct {
					wait   time.Duration
					origin Origin
					calls  int
				}{{0, Fetched, 1}, {test.kept - time.Millisecond, Failed, 1}, {2 * time.Millisecond, Fetched, 2}} {
					time.Sleep(step.wait)
					_, origin, err := c.Get(t.Context(), Request{Key: key("a"), Pod: "p"})
					if !errors.Is(err, test.err) || origin != step.origin || s.count() != step.calls {
						t.Fatalf("got %v, %s, %d calls; want %+v", err, origin, s.count(), step)
					}
				}
			})
		})
	}
}

func TestAFreshTokenIsFetchedAtALimitedRate(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		first, _ := mustGet(t, c, Request{Key: key("a"), Pod: "p"})
		for range 100 {
			mustGet(t, c, Request{Key: key("a"), Pod: "p", Fresh: true})
			mustGet(t, c, Request{Key: key("a"), Pod: "q", Rejected: first.SHA256()})
		}
		if s.count() != 1 {
			t.Fatalf("%d fetches within bypassInterval, want one", s.count())
		}
		time.Sleep(bypassInterval)
		if token, _ := mustGet(t, c, Request{Key: key("a"), Pod: "p", Rejected: "00"}); token != first {
			t.Error("a request that rejects another token got a new token")
		}
		token, origin := mustGet(t, c, Request{Key: key("a"), Pod: "p", Rejected: first.SHA256()})
		if token == first || origin != Fetched || s.fresh != 1 {
			t.Errorf("a request that rejects the cached token got %v, origin %s, after %d fetches with Fresh; want a new token after one", token, origin, s.fresh)
		}
		time.Sleep(bypassInterval)
		if again, _ := mustGet(t, c, Request{Key: key("a"), Pod: "p", Fresh: true}); again == token {
			t.Error("a request with Fresh got the cached token")
		}
		time.Sleep(bypassInterval)
		s.set(func(s *source) { s.fails = &Error{Class: Unavailable} })
		if _, _, err := c.Get(t.Context(), Request{Key: key("a"), Pod: "p", Fresh: true}); err != nil {
			t.Errorf("the fetch of a fresh token failed, so the caller must get the valid token in the cache; got %v", err)
		}
	})
}

func TestAPodThatRequestsManyResourcesIsThrottledAlone(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		mustGet(t, c, Request{Key: key("other"), Pod: "other"})
		s.set(func(s *source) { s.fails = &Error{Class: Denied} })
		throttled := 0
		for i := range 5000 {
			_, _, err := c.Get(t.Context(), Request{Key: ManagedKey("a", "", "", fmt.Sprint("https://r", i)), Pod: "bad"})
			if errors.Is(err, ErrPodThrottled) {
				throttled++
			}
			time.Sleep(100 * time.Millisecond)
		}
		if throttled < 3000 {
			t.Errorf("only %d of 5000 requests of the pod were throttled, want at least 3000", throttled)
		}
		if c.Len() > podKeys+1 {
			t.Errorf("the cache has %d entries, more than podKeys and one of the other pod", c.Len())
		}
		if _, origin := mustGet(t, c, Request{Key: key("other"), Pod: "other"}); origin != Hit {
			t.Errorf("the other pod's token was evicted: %s", origin)
		}
	})
}

func TestTheCacheIsBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		for i := range 150 {
			mustGet(t, c, Request{Key: key(fmt.Sprint("id", i)), Pod: fmt.Sprint("p", i)})
		}
		if c.Len() != 100 {
			t.Errorf("%d entries in a cache of 100", c.Len())
		}
		for i := range 150 {
			c.Release(fmt.Sprint("p", i))
		}
		if len(c.pods) != 0 {
			t.Errorf("the state of %d released pods is kept", len(c.pods))
		}
		time.Sleep(48 * time.Hour)
		synctest.Wait()
		if s.count() != 150 {
			t.Errorf("%d fetches after all pods were released, want the 150 from before", s.count())
		}
	})
}

func TestCloseEndsAFetchUnderWay(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		s.takes = time.Hour
		done := make(chan error)
		go func() {
			_, _, err := c.Get(t.Context(), Request{Key: key("a"), Pod: "p"})
			done <- err
		}()
		synctest.Wait()
		c.Close()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("after Close, Get returned %v, want context.Canceled", err)
		}
	})
}

func TestAHangingFetchTimesOut(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		s.takes = time.Hour
		start := time.Now()
		_, _, err := c.Get(t.Context(), Request{Key: key("a"), Pod: "p"})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != fetchTimeout {
			t.Errorf("a hanging fetch ended with %v after %s, want a timeout after fetchTimeout", err, time.Since(start))
		}
	})
}
