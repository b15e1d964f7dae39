package azure

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
)

// initialPollInterval is how soon is asked again for an update that was not done at once; the pauses double up to the Client's.
const initialPollInterval = time.Second

// Operation is an update on its way. It belongs to one goroutine at a time.
type Operation struct {
	client    *Client
	resource  Resource
	s         *subscription
	requested map[string]bool
	deadline  time.Time
	wait      time.Duration // before the next question

	poller poller // nil: done
	token  string
	// state and failed are the outcome once it is done.
	state  State
	failed error
}

func (c *Client) operation(r Resource, s *subscription, p poller, requested map[string]bool) *Operation {
	o := &Operation{client: c, resource: r, s: s, requested: requested, deadline: time.Now().Add(c.maxPollTime), poller: p}
	if token, err := p.ResumeToken(); err == nil { // otherwise it is done
		o.token = token
	}
	return o
}

// Token is what the operation can be taken up by again, with [Client.Resume]; empty once it is done. It holds addresses
// that are as good as passwords for what became of the update.
func (o *Operation) Token() string { return o.token }

// Wait asks until the update is done, as often as ARM says, and returns the machine as ARM has it then. The subscription
// may be throttled, and answers may fail: that does not end the update. After an error that leaves Token as it was, the
// outcome is unknown, and Wait may be called again; once the time for all is over it then asks only once. Its error is
// an *Error.
//
// ARM forgets updates after a while. Of one that it does not know any more the state is returned without an error, and
// says by itself what became of it.
func (o *Operation) Wait(ctx context.Context) (State, error) {
	if o.poller == nil {
		return o.state, o.failed
	}
	every := initialPollInterval
	var failed *Error // the last time
	for {
		if err := o.waitForPoll(ctx, failed); err != nil {
			return State{}, err
		}
		state, done, err := o.pollOnce(ctx)
		failed = nil
		switch errors.As(err, &failed); {
		case err == nil && done:
			return o.finish(state, nil)
		case err == nil:
		case failed.Class == Throttled, failed.Class == Unavailable && ctx.Err() == nil && !o.isFinal(failed):
			o.wait = max(o.wait, failed.RetryAfter)
		case o.isFinal(failed):
			return o.finish(State{}, err)
		default:
			return State{}, err
		}
		if o.wait == 0 {
			o.wait = min(every, o.client.pollInterval)
			every = 2 * o.wait
		}
	}
}

// waitForPoll waits for the pause to be over, and for the subscription to be open again. failed is what went wrong last.
func (o *Operation) waitForPoll(ctx context.Context, failed *Error) error {
	for {
		shut := o.s.retryAfter.Remaining()
		pause := max(o.wait, shut)
		o.wait = 0
		if ctx.Err() != nil {
			return o.unfinished(Error{Class: Unavailable, Message: "given up: " + ctx.Err().Error(), Err: ctx.Err()})
		}
		if pause <= 0 {
			return nil
		}
		if time.Until(o.deadline) < pause {
			e := Error{Class: Unavailable, Message: fmt.Sprintf("the update has not ended within %s", o.client.maxPollTime), RetryAfter: pause}
			if shut == pause {
				e.Class = Throttled
			}
			if failed != nil {
				e.Message += "; the last answer: " + failed.Message
			}
			return o.unfinished(e)
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

func (o *Operation) unfinished(e Error) error {
	e.Operation = o.resource.Kind.String() + "_poll"
	return &e
}

// isFinal reports whether a failure is the end of the update, and not only of a question about it. An update that fails
// says so in an answer that is a success itself; and what no question can mean, the update meant.
func (o *Operation) isFinal(e *Error) bool {
	switch e.Class {
	case NotFound, Conflict, BadIdentity, Invalid:
		return true
	}
	return e.Status != 0 && e.Status < 300
}

func (o *Operation) finish(state State, err error) (State, error) {
	o.poller, o.token, o.requested = nil, "", nil
	o.state, o.failed = state, err
	return state, err
}

// pollOnce puts one question: what became of the update, or how the machine is now that it is done.
func (o *Operation) pollOnce(ctx context.Context) (state State, done bool, err error) {
	c, kind := o.client, o.resource.Kind.String()
	if !o.poller.Done() {
		err := c.call(ctx, kind+"_poll", o.s, o.requested, func(ctx context.Context) error {
			resp, err := o.poller.Poll(c.once(ctx))
			if err != nil {
				return err
			}
			if !o.poller.Done() {
				o.wait = retryAfter(resp.Header)
				return nil
			}
			if body, err := runtime.Payload(resp); err == nil && parseARMError(body).updateFailed() {
				_, _, err = o.poller.outcome(ctx) // it asks nothing, and tells why
				return err
			}
			return nil
		})
		var failed *Error
		if errors.As(err, &failed) && failed.Class == NotFound {
			state, err := c.Get(ctx, o.resource)
			return state, err == nil, err
		}
		if err != nil || !o.poller.Done() {
			return State{}, false, err
		}
	}
	var found bool
	err = c.call(ctx, kind+"_get", o.s, o.requested, func(ctx context.Context) error {
		var err error
		state, found, err = o.poller.outcome(ctx)
		return err
	})
	if err == nil && !found {
		state, err = c.Get(ctx, o.resource)
	}
	return state, err == nil, err
}
