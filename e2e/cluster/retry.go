package cluster

import (
	"fmt"
	"time"
)

// maxStep is how much one call of check counts at most. A virtual machine that does not run for minutes would otherwise use
// up the limits of all tests that wait at that time.
const maxStep = 20 * time.Second

// Retry calls check every 100 ms until it returns nil, and returns the last error after the time limit.
func Retry(within time.Duration, check func() error) error {
	for elapsed := time.Duration(0); ; {
		began := time.Now()
		err := check()
		if err == nil {
			return nil
		}
		if elapsed >= within {
			return fmt.Errorf("still not true after %s: %w", within, err)
		}
		time.Sleep(100 * time.Millisecond)
		elapsed += min(time.Since(began), maxStep)
	}
}
