package token

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/podidentity/podidentity/identity"
)

// The source is unavailable for ten minutes, at a time when tokens are due for renewal.
func TestAnOutageOfTenMinutesIsHiddenAndEndsWithoutAStampede(t *testing.T) {
	const keys = 300
	synctest.Test(t, func(t *testing.T) {
		s := &source{lasts: time.Hour, takes: 50 * time.Millisecond}
		c, err := NewCache(s, 2*keys, func(string, Principal) bool { return true }, noObserver{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		getAll := func() {
			t.Helper()
			for i := range keys {
				if _, origin := mustGet(t, c, Request{Key: key(fmt.Sprint(i)), Pod: fmt.Sprint("p", i)}); origin != Hit {
					t.Fatalf("key %d was not served from the cache: origin %s", i, origin)
				}
			}
		}
		var all sync.WaitGroup
		for i := range keys {
			all.Go(func() { mustGet(t, c, Request{Key: key(fmt.Sprint(i)), Pod: fmt.Sprint("p", i)}) })
		}
		all.Wait()
		// All tokens were fetched together, so all are renewed at an age of 21 to 28.5 minutes.
		time.Sleep(20 * time.Minute)
		s.set(func(s *source) { s.fails = &Error{Class: Unavailable, Status: 503} })
		before := s.count()
		for range 20 {
			getAll()
			time.Sleep(30 * time.Second)
		}
		synctest.Wait()
		if n := s.count() - before; n < keys || n > 6*keys {
			t.Errorf("%d fetches for %d keys during the outage", n, keys)
		}
		s.set(func(s *source) { s.fails = nil })
		back := s.count()
		maxRenewals, last := 0, back
		for range 600 {
			time.Sleep(time.Second)
			synctest.Wait()
			maxRenewals, last = max(maxRenewals, s.count()-last), s.count()
		}
		if n := s.count() - back; n != keys {
			t.Errorf("%d fetches for %d keys after the outage: one each is enough", n, keys)
		}
		if maxRenewals > keys/10 {
			t.Errorf("%d keys were renewed within one second", maxRenewals)
		}
		getAll()
	})
}

func TestATokenIsNotRenewedForAPodThatLostItsBinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{lasts: time.Hour}
		var bound sync.Map
		bound.Store("p1", true)
		bound.Store("p2", true)
		c, _ := NewCache(s, 10, func(pod string, p Principal) bool {
			_, is := bound.Load(pod)
			return is && p.ClientID == "a"
		}, noObserver{})
		defer c.Close()
		mustGet(t, c, Request{Key: key("a"), Pod: "p1"})
		mustGet(t, c, Request{Key: key("a"), Pod: "p2"})
		bound.Delete("p1")
		time.Sleep(10 * time.Hour)
		synctest.Wait()
		before := s.count()
		if before < 10 || len(c.pods) != 1 {
			t.Errorf("%d fetches for pod p2, want at least 10, and the state of %d pods is kept, want one", before, len(c.pods))
		}
		bound.Delete("p2")
		time.Sleep(10 * time.Hour)
		synctest.Wait()
		if s.count() > before || len(c.pods) != 0 {
			t.Errorf("%d fetches of a token that no pod may use any more, and the state of %d pods is kept", s.count()-before, len(c.pods))
		}
	})
}

func TestDroppedTokensAreNotServed(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		second := ManagedKey("a", "", "", "https://other")
		for _, k := range []Key{key("a"), second, key("b")} {
			mustGet(t, c, Request{Key: k, Pod: "p"})
		}
		c.Drop(func(p Principal) bool { return p == key("a").Principal })
		for k, want := range map[Key]Origin{key("a"): Fetched, second: Fetched, key("b"): Hit} {
			if _, origin := mustGet(t, c, Request{Key: k, Pod: "p"}); origin != want {
				t.Errorf("after Drop, the token of client %s for %s has origin %s", k.ClientID, k.Resource, origin)
			}
		}
	})
}

func TestAFetchUnderWayWhileItsPrincipalIsDroppedIsNotKept(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		s.takes = time.Second
		old := make(chan Token)
		go func() {
			token, _, _ := c.Get(t.Context(), Request{Key: key("a"), Pod: "p"})
			old <- token
		}()
		synctest.Wait()
		c.Drop(func(Principal) bool { return true })
		now, origin := mustGet(t, c, Request{Key: key("a"), Pod: "p"})
		if before := <-old; origin != Fetched || before == now {
			t.Errorf("a request after Drop has origin %s, want fetched; the fetch before Drop returned %q, this request %q", origin, before.AccessToken, now.AccessToken)
		}
		if again, origin := mustGet(t, c, Request{Key: key("a"), Pod: "p"}); origin != Hit || again != now {
			t.Errorf("a later request got origin %s and token %q, want the token fetched after Drop from the cache", origin, again.AccessToken)
		}
	})
}

// The failure of the first request concerns only its pod. The second request is for another pod, for which the fetch
// can succeed.
func TestAFailureOfOnePodIsNotServedToOthers(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		s.fails = &Error{Class: Unavailable, Reason: identity.PodStale}
		if _, _, err := c.Get(t.Context(), Request{Key: key("a"), Pod: "gone"}); err == nil {
			t.Fatal("the failure of the fetch was not returned")
		}
		s.set(func(s *source) { s.fails = nil })
		if _, origin := mustGet(t, c, Request{Key: key("a"), Pod: "p"}); origin != Fetched {
			t.Errorf("the request for the other pod has origin %s, want fetched", origin)
		}
	})
}

// NMI rechecks a refusal while IMDS does not know a new identity yet. IMDS receives only a few of these requests.
func TestARefusalIsRecheckedAtALimitedRate(t *testing.T) {
	inBubble(t, func(t *testing.T, s *source, c *Cache) {
		refused := &Error{Class: Denied, Status: 400}
		s.set(func(s *source) { s.fails, s.takes = refused, 0 })
		ask := func(name, pod string, again bool) Origin {
			_, origin, err := c.Get(t.Context(), Request{Key: key(name), Pod: pod, Recheck: again})
			if errors.Is(err, ErrPodThrottled) {
				t.Errorf("pod %s is throttled", pod)
			}
			return origin
		}
		if got := ask("x", "p", true); got != Fetched {
			t.Fatalf("the first request has origin %s, want fetched", got)
		}
		if got := ask("x", "p", true); got != Failed {
			t.Errorf("a recheck at once has origin %s, want failed", got)
		}
		time.Sleep(recheckInterval)
		if got := ask("x", "p", false); got != Failed {
			t.Errorf("a request without Recheck has origin %s, want failed", got)
		}
		if got := ask("x", "p", true); got != Fetched {
			t.Errorf("a recheck after recheckInterval has origin %s, want fetched", got)
		}
		// Recheck many keys, first for one pod and then for many pods.
		for _, pods := range []int{1, 40} {
			time.Sleep(time.Minute)
			for i := range 10 {
				ask(fmt.Sprint(pods, "-", i), fmt.Sprint("q", i%pods), false)
			}
			before := s.count()
			for range 100 {
				time.Sleep(100 * time.Millisecond)
				for i := range 10 {
					ask(fmt.Sprint(pods, "-", i), fmt.Sprint("q", i%pods), true)
				}
			}
			if n := s.count() - before; n < 10 || n > recheckRate*11 {
				t.Errorf("rechecks caused %d fetches in ten seconds for %d pods, want at least 10 and at most 11*recheckRate", n, pods)
			}
		}
		// A throttled key is not fetched before its RetryAfter has passed.
		s.set(func(s *source) { s.fails = &Error{Class: Throttled, RetryAfter: time.Minute} })
		time.Sleep(time.Minute)
		ask("x", "p", false)
		time.Sleep(30 * time.Second)
		if got := ask("x", "p", true); got != Failed {
			t.Errorf("a recheck before RetryAfter has passed has origin %s, want failed", got)
		}
	})
}
