package token

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/text"
)

// Assertions returns the assertions that are sent to Entra ID. Its error is an *Error, or the error of ctx.
type Assertions interface {
	// Assertion returns a token of the ServiceAccount. The token is bound to the pod with the UID podUID.
	Assertion(ctx context.Context, podUID string, serviceAccount Ref) (string, error)
}

// untrustedCodes are the error codes of Entra ID for "no federated credential matches". A new federated credential
// takes minutes to propagate. Until then some requests succeed and others fail.
var untrustedCodes = []int{70021, 70025, 700211, 700212, 700213, 7002137, 7002138}

// federationRetryWaits are the waits before the retries while no federated credential matches. Callers of the cache
// wait all this time. The sum must stay well below fetchTimeout, which also covers the requests themselves.
var federationRetryWaits = [...]time.Duration{1 * time.Second, 2 * time.Second, 4 * time.Second, 5 * time.Second}

// federationRetryTime is the time that waitForRetry reserves for the retry itself.
const federationRetryTime = 2 * time.Second

// fetchFederated requests a token from Entra ID with the assertion of the pod. It retries while no federated credential
// matches the assertion.
func (e *Entra) fetchFederated(ctx context.Context, c *client, call Call) (Token, *Error) {
	assertion, err := e.assertions.Assertion(ctx, call.Pod, call.ServiceAccount)
	if err != nil {
		return Token{}, contentError(call.ServiceAccount, fmt.Errorf("getting a token of ServiceAccount %s from the API server: %w", call.ServiceAccount, err))
	}
	for _, pause := range federationRetryWaits {
		t, codes, failed := e.requestToken(ctx, c, call, assertion)
		if failed == nil || !isUntrusted(codes) {
			return t, failed
		}
		if !waitForRetry(ctx, pause) {
			return Token{}, federationUntrusted(call.Principal, assertion, failed)
		}
	}
	t, codes, failed := e.requestToken(ctx, c, call, assertion)
	if failed != nil && isUntrusted(codes) {
		failed = federationUntrusted(call.Principal, assertion, failed)
	}
	return t, failed
}

func isUntrusted(codes []int) bool {
	return slices.ContainsFunc(codes, func(code int) bool { return slices.Contains(untrustedCodes, code) })
}

// waitForRetry waits for the pause and then returns true. It returns false if ctx ends during the pause. If the
// deadline of ctx leaves too little time for the pause and a retry, it returns false at once.
func waitForRetry(ctx context.Context, pause time.Duration) bool {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < pause+federationRetryTime {
		return false
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// federationUntrusted returns an error that says what the federated credential must contain. The claims of the
// assertion are not verified: it came from the API server.
func federationUntrusted(p Principal, assertion string, failed *Error) *Error {
	var claims struct {
		Issuer   string   `json:"iss"`
		Subject  string   `json:"sub"`
		Audience audience `json:"aud"`
	}
	if parts := strings.Split(assertion, "."); len(parts) == 3 {
		if payload, err := base64.RawURLEncoding.DecodeString(parts[1]); err == nil {
			_ = json.Unmarshal(payload, &claims) // a claim that cannot be read is reported as ""
		}
	}
	e := *failed
	e.Reason = identity.FederationUntrusted
	e.Detail = fmt.Sprintf("Entra ID finds no matching federated credential: client ID %s in tenant %s must have one with exactly issuer %q, subject %q and audience %q; a new federated credential takes some minutes to propagate (%s)",
		p.ClientID, p.TenantID, text.OneLine(claims.Issuer, 256), text.OneLine(claims.Subject, 256), text.OneLine(strings.Join(claims.Audience, ", "), 256), aadCode(failed))
	return &e
}

// aadCode returns the code at the start of Entra ID's error description, such as AADSTS70021.
func aadCode(e *Error) string {
	code, _, _ := strings.Cut(e.Description, ":")
	return text.OneLine(code, 32)
}

// audience is the aud claim: a string or a list of strings.
type audience []string

func (a *audience) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*a = audience{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(a))
}
