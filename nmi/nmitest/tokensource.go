package nmitest

import (
	"context"
	"sync"
	"time"

	"github.com/podidentity/podidentity/nmi/token"
)

// TokenSource is a fake source of tokens.
type TokenSource struct {
	Mu                sync.Mutex
	Requests          []token.Key
	Error             error  // returned for every request
	UnavailableClient string // client ID for which the source is unavailable
	During            func() // is called during each request
}

// Fetch implements token.Fetcher.
func (s *TokenSource) Fetch(_ context.Context, call token.Call) (token.Token, error) {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	s.Requests = append(s.Requests, call.Key)
	if s.During != nil {
		s.During()
	}
	if s.Error != nil {
		return token.Token{}, s.Error
	}
	if call.ClientID == s.UnavailableClient && s.UnavailableClient != "" {
		return token.Token{}, &token.Error{Class: token.Unavailable}
	}
	now := time.Now()
	return token.Token{AccessToken: "token-of-" + call.ClientID, Fetched: now, NotBefore: now, ExpiresOn: now.Add(time.Hour), ClientID: call.ClientID, ObjectID: "object-of-" + call.ClientID,
		ID: "id-of-" + call.ClientID, CorrelationID: "correlation"}, nil
}
