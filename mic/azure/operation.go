package azure

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
)

// initialPollInterval is the interval between the first and the second poll if ARM sends no Retry-After. The interval
// then doubles with each poll, up to Client.pollInterval.
const initialPollInterval = time.Second

// Operation is an update that was sent, or one that needs no request. It must be used by one goroutine at a time.
type Operation struct {
	client    *Client
	resource  Resource
	s         *subscription
	requested map[string]bool
	deadline  time.Time
	wait      time.Duration // before the next poll

	poller poller // nil: done
	token  string
	// state and failed are the outcome once the operation is done.
	state  State
	failed error
}

func (c *Client) operation(r Resource, s *subscription, p poller, requested map[string]bool) *Operation {
	o := &Operation{client: c, resource: r, s: s, requested: requested, deadline: time.Now().Add(c.maxPollTime), poller: p}
	if token, err := p.ResumeToken(); err == nil { // there is an error if the update is done
		o.token = token
	}
	return o
}

// Token returns the token for [Client.Resume]; empty once the operation is done. The token is secret: it contains URLs
// that give access to the result of the update without a credential.
func (o *Operation) Token() string { return o.token }

// Wait polls until the update is done, at the interval that ARM requests, and returns the resulting state of the
// machine. Wait continues after throttling and after polls that fail as Unavailable. After an error, Token says
// whether the update has ended: if it is not empty, the outcome is unknown, and Wait may be called again. Once Options.MaxPollTime has passed since Begin or
// Resume, each call polls at most once. The error of Wait is an *Error.
//
// ARM forgets updates after a while. If ARM no longer knows the update, Wait returns the state of the machine without
// an error; the caller must compare it with what the update was to do.
func (o *Operation) Wait(ctx context.Context) (State, error) {
	if o.poller == nil {
		return o.state, o.failed
	}
	every := initialPollInterval
	var failed *Error // of the last poll
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

// waitForPoll waits until the next poll is due and the subscription is not throttled. It returns an error if ctx
// ends, or at once if the next poll is due after the deadline. failed is the error of the last poll, for the message.
func (o *Operation) waitForPoll(ctx context.Context, failed *Error) error {
	for {
		throttled := o.s.retryAfter.Remaining()
		pause := max(o.wait, throttled)
		o.wait = 0
		if ctx.Err() != nil {
			return o.unfinished(Error{Class: Unavailable, Message: "stopped waiting for the update: " + ctx.Err().Error(), Err: ctx.Err()})
		}
		if pause <= 0 {
			return nil
		}
		if time.Until(o.deadline) < pause {
			e := Error{Class: Unavailable, Message: fmt.Sprintf("MIC stopped polling the update, whose end is not known: the next poll is due after the limit of %s", o.client.maxPollTime), RetryAfter: pause}
			if throttled == pause {
				e.Class = Throttled
			}
			if failed != nil {
				e.Message += "; the last response: " + failed.Message
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

// isFinal reports whether Wait must not poll again after the error: the update failed, or no later poll can succeed.
// ARM reports a failed update in a poll response with a success status. The classes in the switch are final whatever
// the status.
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

// pollOnce polls the update, unless the last poll reported its end. Once the update is done, it reads the machine.
func (o *Operation) pollOnce(ctx context.Context) (state State, done bool, err error) {
	c, kind := o.client, o.resource.Kind.String()
	if !o.poller.Done() {
		err := c.call(ctx, kind+"_poll", o.s, o.requested, func(ctx context.Context) error {
			resp, err := o.poller.Poll(c.once(ctx)) //nolint:bodyclose // azcore closes it
			if err != nil {
				return err
			}
			if !o.poller.Done() {
				o.wait = retryAfter(resp.Header)
				return nil
			}
			if body, err := runtime.Payload(resp); err == nil && parseARMError(body).updateFailed() {
				_, _, err = o.poller.outcome(ctx) // sends no request, and returns why the update failed
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
