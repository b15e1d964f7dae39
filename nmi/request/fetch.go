package request

import (
	"context"
	"errors"

	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/token"
)

// fetchTokens gets the tokens of an authorization from the cache, which fetches missing tokens. If retryUpstream is
// true, the cache may fetch a token again although it has a recent refusal, see token.Request.Recheck. fetched is false
// if the cache had all tokens, or the failure, without a fetch.
func (p *Processor) fetchTokens(ctx context.Context, rec *Record, auth authorization, req metadata.Request, retryUpstream bool) (tokens []metadata.TokenResponse, fetched bool, refusal *metadata.Error) {
	tokens = make([]metadata.TokenResponse, len(auth.keys))
	for i, key := range auth.keys {
		got, origin, err := p.Cache.Get(ctx, token.Request{Key: key, Pod: string(auth.pod.UID), Fresh: req.Bypass, Rejected: req.Rejected, Recheck: retryUpstream})
		rec.Origin = origin
		fetched = fetched || origin == token.Fetched || origin == token.Shared
		if err != nil {
			rec.TokenID, rec.CorrelationID = "", "" // they may be those of the token of an earlier key
			var e *token.Error
			if errors.As(err, &e) {
				rec.CorrelationID = e.CorrelationID
			}
			return nil, fetched, upstreamError(auth.decision, p.notYetPropagated(auth.pod, auth.decision.Identity, err))
		}
		if i == 0 {
			rec.TokenID, rec.CorrelationID = got.ID, got.CorrelationID
		}
		tokens[i] = metadata.TokenResponse{
			AccessToken: got.AccessToken,
			ClientID:    got.ClientID,
			Resource:    req.Resource,
			ExpiresOn:   got.ExpiresOn,
			NotBefore:   got.NotBefore,
			Lifetime:    got.ExpiresOn.Sub(got.Fetched),
		}
		if auth.decision.Identity != nil {
			tokens[i].ClientID = auth.decision.Identity.ClientID
		}
	}
	rec.Reason = auth.decision.Reason
	return tokens, fetched, nil
}
