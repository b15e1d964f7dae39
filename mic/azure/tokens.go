package azure

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
)

const (
	// fetchTimeout bounds one fetch of a token.
	fetchTimeout = 30 * time.Second
	// A token that expires within refreshAhead is replaced; the response with the token may specify an earlier time. A
	// token that expires within minValidity is not used.
	refreshAhead, minValidity = 5 * time.Minute, time.Minute
	// failureTTL is how long a failure is cached for all callers, of which there may be hundreds. A longer Retry-After is
	// respected up to maxFailureTTL.
	failureTTL, maxFailureTTL = 5 * time.Second, time.Minute
)

// tokens caches MIC's token for ARM. In the SDK's own cache one caller fetches the token and the others wait without
// regard to their contexts, so a response that hangs would delay all machines, one after the other. Here the context of
// the fetch belongs to no caller, and callers stop waiting when their context ends. Before each call, [tokens.ready]
// makes sure that the SDK finds a token at once.
type tokens struct {
	own   *ownCredential
	scope string

	mu          sync.Mutex
	token       azcore.AccessToken
	fetch       *fetch    // the running fetch; nil if there is none
	failed      *Error    // of the last fetch
	failedUntil time.Time // no fetch before this time; zero if the last fetch succeeded
}

type fetch struct {
	done   chan struct{}
	failed *Error // valid once done
}

// ready waits until there is a usable token, or returns why there is none. If the token expires soon, ready starts to
// replace it but does not wait for that.
func (t *tokens) ready(ctx context.Context) error {
	_, err := t.get(ctx)
	return err
}

// GetToken implements [azcore.TokenCredential].
func (t *tokens) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	if o.Claims != "" { // a claims challenge: ARM requires another token
		token, failed := t.requestToken(ctx, o)
		if failed != nil {
			return azcore.AccessToken{}, failed
		}
		return token, nil
	}
	return t.get(ctx)
}

func (t *tokens) get(ctx context.Context) (azcore.AccessToken, error) {
	t.mu.Lock()
	now := time.Now()
	usable := t.token.ExpiresOn.After(now.Add(minValidity))
	due := !t.token.ExpiresOn.After(now.Add(refreshAhead)) || !t.token.RefreshOn.IsZero() && now.After(t.token.RefreshOn)
	failureCached := now.Before(t.failedUntil)
	if (!usable || due) && !failureCached && t.fetch == nil {
		t.fetch = &fetch{done: make(chan struct{})}
		go t.run(t.fetch) //nolint:contextcheck // others wait for this token, too
	}
	token, failed, running := t.token, t.failed, t.fetch
	t.mu.Unlock()
	switch {
	case usable:
		return token, nil
	case running == nil:
		return azcore.AccessToken{}, failed
	}
	select {
	case <-running.done:
	case <-ctx.Done():
		failed := t.own.tokenError(Unavailable, "stopped waiting for a response")
		failed.Err = ctx.Err()
		return azcore.AccessToken{}, failed
	}
	if running.failed != nil {
		return azcore.AccessToken{}, running.failed
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.token, nil
}

// run fetches a token for all callers that wait.
func (t *tokens) run(f *fetch) {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	got, failed := t.requestToken(ctx, policy.TokenRequestOptions{Scopes: []string{t.scope}})
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fetch, t.failed, f.failed = nil, failed, failed
	if failed == nil {
		t.token, t.failedUntil = got, time.Time{}
	} else {
		t.failedUntil = time.Now().Add(min(max(failureTTL, failed.RetryAfter), maxFailureTTL))
	}
	close(f.done)
}

func (t *tokens) requestToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, *Error) {
	seen := &lastResponse{}
	got, err := t.own.GetToken(context.WithValue(ctx, lastResponseKey{}, seen), o)
	if err == nil && !got.ExpiresOn.After(time.Now().Add(minValidity)) {
		err = errExpiredToken
	}
	if err != nil {
		return got, t.own.failure(seen, err)
	}
	return got, nil
}

var errExpiredToken = errors.New("the token in the response has expired or expires within a minute; check the clock of the node")
