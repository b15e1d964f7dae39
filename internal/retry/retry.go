// Package retry computes the waits between attempts: exponential backoff with jitter. It protects the API server and
// Azure against many nodes or many objects that failed together and would otherwise retry together.
//
// In addition to wait.Backoff of apimachinery it computes the wait after a given number of failures: the reconcilers of
// MIC and the token cache of NMI keep the number of failures with each object, not a wait.Backoff.
package retry

import (
	"context"
	"math"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
)

// Backoff describes the waits between attempts.
type Backoff struct {
	Initial time.Duration // the wait after the first failure
	Max     time.Duration // upper bound of the wait, before jitter
	Factor  float64       // growth of the wait with each failure; 0 means 2
	Jitter  float64       // a random time of up to Jitter times the wait is added; 0 means DefaultJitter
}

// DefaultJitter is the jitter of the function Jitter, and of a Backoff whose field Jitter is 0: a random time of up to
// DefaultJitter times the wait is added to each wait.
const DefaultJitter = 0.2

// After returns the wait after this many failures in a row. A number below one counts as one.
func (b Backoff) After(failures int) time.Duration {
	steps := b.Steps()
	d := steps.Step()
	for n := 1; n < failures; n++ {
		atMax := steps.Steps == 0 // more failures change only the jitter of the wait
		if d = steps.Step(); atMax {
			break
		}
	}
	return d
}

// Steps returns the waits as a wait.Backoff. Each call of its Step returns the next wait. The number of calls is not
// limited.
func (b Backoff) Steps() *wait.Backoff {
	factor, jitter := b.Factor, b.Jitter
	if factor == 0 {
		factor = 2
	}
	if jitter == 0 {
		jitter = DefaultJitter
	}
	return &wait.Backoff{Duration: min(b.Initial, b.Max), Cap: b.Max, Factor: factor, Jitter: jitter, Steps: math.MaxInt}
}

// Jitter returns d plus a random time of up to DefaultJitter times d.
func Jitter(d time.Duration) time.Duration { return wait.Jitter(d, DefaultJitter) }

// UntilSuccess calls try until try returns nil or ctx ends. After each failed attempt it calls onFailure with the
// error, then waits as b says. It returns nil after success, otherwise the error of ctx.
func UntilSuccess(ctx context.Context, b Backoff, try func(context.Context) error, onFailure func(error)) error {
	for steps := b.Steps(); ctx.Err() == nil; {
		err := try(ctx)
		if err == nil {
			return nil
		}
		onFailure(err)
		timer := time.NewTimer(steps.Step())
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
	return ctx.Err()
}
