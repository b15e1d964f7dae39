package retry

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestTheWaitDoublesUpToTheMaximum(t *testing.T) {
	b := Backoff{Initial: time.Second, Max: 10 * time.Second}
	for failures, want := range map[int]time.Duration{
		0: time.Second, 1: time.Second, 2: 2 * time.Second, 3: 4 * time.Second, 4: 8 * time.Second,
		5: 10 * time.Second, 6: 10 * time.Second, 1 << 30: 10 * time.Second,
	} {
		for range 100 {
			if got := b.After(failures); got < want || got > want+want/5 {
				t.Fatalf("After(%d) = %s, want %s to %s", failures, got, want, want+want/5)
			}
		}
	}
}

func TestStepsReturnTheSameWaitsAsAfter(t *testing.T) {
	b := Backoff{Initial: 125 * time.Millisecond, Max: 5 * time.Second, Factor: 1.5, Jitter: 1}
	steps, want := b.Steps(), b.Initial
	for n := 1; n < 20; n++ {
		for _, got := range []time.Duration{steps.Step(), b.After(n)} {
			if got < want || got > 2*want {
				t.Errorf("wait %d is %s, want %s to %s", n, got, want, 2*want)
			}
		}
		want = min(want*3/2, b.Max)
	}
}

func TestAnInitialWaitAboveTheMaximumIsTheMaximum(t *testing.T) {
	if got := (Backoff{Initial: time.Minute, Max: time.Second}).After(1); got > 1200*time.Millisecond {
		t.Errorf("the wait is %s", got)
	}
}

func TestJitterAddsAtMostAFifth(t *testing.T) {
	for range 1000 {
		if got := Jitter(time.Second); got < time.Second || got > 1200*time.Millisecond {
			t.Fatalf("Jitter(1s) = %s", got)
		}
	}
}

func TestUntilSuccessRetriesUntilSuccess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attempts, failures := 0, 0
		err := UntilSuccess(t.Context(), Backoff{Initial: time.Second, Max: time.Second}, func(context.Context) error {
			if attempts++; attempts < 4 {
				return errors.New("not yet")
			}
			return nil
		}, func(error) { failures++ })
		if err != nil || attempts != 4 || failures != 3 {
			t.Errorf("got %v after %d attempts and %d failures; want success after 4 and 3", err, attempts, failures)
		}
	})
}

func TestUntilSuccessEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		err := UntilSuccess(ctx, Backoff{Initial: time.Hour, Max: time.Hour}, func(context.Context) error { return errors.New("never") }, func(error) {})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Minute {
			t.Errorf("got %v after %s; want the error of the context after a minute", err, time.Since(start))
		}
	})
}
