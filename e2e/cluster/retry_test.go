package cluster

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestRetryDoesNotCountAPauseOfTheComputer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls int
		began := time.Now()
		err := Retry(time.Minute, func() error {
			if calls++; calls == 2 {
				time.Sleep(10 * time.Minute) // the pause
			}
			return errors.New("not yet")
		})
		if err == nil || !strings.Contains(err.Error(), "still not true after 1m0s: not yet") {
			t.Errorf("Retry returned %v, want an error with the time limit and the last error of check", err)
		}
		// The pause counts 20 s, and each other call 100 ms.
		if took := time.Since(began); calls < 400 || took < 10*time.Minute+40*time.Second || took > 11*time.Minute {
			t.Errorf("%d calls in %s, want at least 400 calls in 10m40s to 11m", calls, took)
		}
		if err := Retry(time.Minute, func() error { return nil }); err != nil {
			t.Error(err)
		}
	})
}
