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
	// fetchTimeout bounds one attempt to get a token.
	fetchTimeout = 30 * time.Second
	// refreshAhead is how long before its end a token is replaced, unless Entra ID says when; minValidity is how long one
	// must still be good to be used.
	refreshAhead, minValidity = 5 * time.Minute, time.Minute
	// failureTTL is how long a failure answers for all who ask, of whom there may be hundreds; more if the answer said so,
	// but no more than maxFailureTTL.
	failureTTL, maxFailureTTL = 5 * time.Second, time.Minute
)

// tokens holds MIC's token for ARM. The SDK's own holder lets one caller fetch it and the others wait without looking at
// their contexts, so that one answer that hangs would hold up every machine one after the other. Here the fetch belongs
// to none of them, and who waits stops waiting when his time is up. Before each call [tokens.ready] sees to it that the
// SDK finds a token at once.
type tokens struct {
	own   *ownCredential
	scope string

	mu          sync.Mutex
	token       azcore.AccessToken
	fetch       *fetch    // under way; nil if none is
	failed      *Error    // the last time
	failedUntil time.Time // zero if it did not
}

type fetch struct {
	done   chan struct{}
	failed *Error // valid once done
}

// ready waits until there is a token that can be used. One that is about to end is replaced meanwhile.
func (t *tokens) ready(ctx context.Context) error {
	_, err := t.get(ctx)
	return err
}

// GetToken implements [azcore.TokenCredential].
func (t *tokens) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	if o.Claims != "" { // ARM wants a token that takes account of something new
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
	held := now.Before(t.failedUntil)
	if (!usable || due) && !held && t.fetch == nil {
		t.fetch = &fetch{done: make(chan struct{})}
		go t.run(t.fetch)
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
		failed := t.own.tokenError(Unavailable, "given up waiting for an answer")
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

// run fetches a token for all who want one.
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

var errExpiredToken = errors.New("the token that came has ended already; compare the clocks")
