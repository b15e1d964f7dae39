package cluster

import (
	"fmt"
	"time"
)

// maxStep is the most that one call of check adds to the elapsed time of Retry. If the tests run in a virtual machine
// that is paused for minutes, the pause must not use up the time limits of all tests that wait at that time.
const maxStep = 20 * time.Second

// Retry calls check until it returns nil, with a pause of 100 ms between calls. It returns the last error after the
// time limit, in which a call that takes longer than maxStep counts as maxStep.
func Retry(within time.Duration, check func() error) error {
	for elapsed := time.Duration(0); ; {
		began := time.Now()
		err := check()
		if err == nil {
			return nil
		}
		if elapsed >= within {
			return fmt.Errorf("the condition is still not true after %s: %w", within, err)
		}
		time.Sleep(100 * time.Millisecond)
		elapsed += min(time.Since(began), maxStep)
	}
}
