package nmitest

import (
	"context"
	"sync"
	"time"

	"github.com/podidentity/podidentity/nmi/token"
)

// TokenSource is a source of tokens that knows some identities and fails as told.
type TokenSource struct {
	Mu    sync.Mutex
	Asked []token.Key
	Fails error
	// FailsFor is the client ID that there is no token for.
	FailsFor string
	During   func() // what happens while it is asked
}

// Fetch implements token.Fetcher.
func (a *TokenSource) Fetch(_ context.Context, call token.Call) (token.Token, error) {
	a.Mu.Lock()
	defer a.Mu.Unlock()
	a.Asked = append(a.Asked, call.Key)
	if a.During != nil {
		a.During()
	}
	if a.Fails != nil {
		return token.Token{}, a.Fails
	}
	if call.ClientID == a.FailsFor && a.FailsFor != "" {
		return token.Token{}, &token.Error{Class: token.Unavailable}
	}
	now := time.Now()
	return token.Token{AccessToken: "token-of-" + call.ClientID, Fetched: now, NotBefore: now, ExpiresOn: now.Add(time.Hour), ClientID: call.ClientID, ObjectID: "object-of-" + call.ClientID,
		ID: "id-of-" + call.ClientID, CorrelationID: "correlation"}, nil
}
