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

// Assertions gives Kubernetes tokens that are shown to Entra ID. Its error is an *Error.
type Assertions interface {
	// Assertion returns a token of the ServiceAccount that is bound to the pod with this UID.
	Assertion(ctx context.Context, pod string, serviceAccount Ref) (string, error)
}

// untrustedCodes are the codes with which Entra ID says that it knows no federated credential that fits. A new one takes it
// minutes to know everywhere, and until then one answer says so and the next does not.
var untrustedCodes = []int{70021, 70025, 700211, 700212, 700213, 7002137, 7002138}

// federationRetryWaits are the waits before the question is put again. Callers wait all the while, and the cache's limit on
// a fetch leaves room for no more.
var federationRetryWaits = [...]time.Duration{1 * time.Second, 2 * time.Second, 4 * time.Second, 5 * time.Second}

// federationRetryTime is how much time a question needs that is put again.
const federationRetryTime = 2 * time.Second

// fetchFederated asks with a Kubernetes token of the pod's ServiceAccount.
func (e *Entra) fetchFederated(ctx context.Context, c *client, call Call) (Token, *Error) {
	assertion, err := e.assertions.Assertion(ctx, call.Pod, call.ServiceAccount)
	if err != nil {
		return Token{}, contentError(call.ServiceAccount, err)
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

// waitForRetry waits, and reports whether there is time left to ask again.
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

// federationUntrusted tells what the federated credential must look like. What the assertion says is not verified: it
// came from the API server.
func federationUntrusted(p Principal, assertion string, failed *Error) *Error {
	var claims struct {
		Issuer   string   `json:"iss"`
		Subject  string   `json:"sub"`
		Audience audience `json:"aud"`
	}
	if parts := strings.Split(assertion, "."); len(parts) == 3 {
		if payload, err := base64.RawURLEncoding.DecodeString(parts[1]); err == nil {
			_ = json.Unmarshal(payload, &claims) // what cannot be read is told as ""
		}
	}
	e := *failed
	e.Reason = identity.FederationUntrusted
	e.Detail = fmt.Sprintf("Entra ID finds no federated credential that fits: client ID %s in tenant %s must have one with issuer %q, subject %q and audience %q, to the letter; a new one takes some minutes to be known (%s)",
		p.ClientID, p.TenantID, text.OneLine(claims.Issuer, 256), text.OneLine(claims.Subject, 256), text.OneLine(strings.Join(claims.Audience, ", "), 256), aadCode(failed))
	return &e
}

// aadCode is the code at the start of Entra ID's text, such as AADSTS70021.
func aadCode(e *Error) string {
	code, _, _ := strings.Cut(e.Description, ":")
	return text.OneLine(code, 32)
}

// audience is one text or several.
type audience []string

func (a *audience) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*a = audience{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(a))
}
