package token

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/podidentity/podidentity/internal/outbound"
	"github.com/podidentity/podidentity/internal/text"
)

// maxResponse bounds the body of a response. A token has about 2 KiB, one with very many groups about 10 KiB.
const maxResponse = 64 << 10

// maxErrorText bounds, in bytes, a text from IMDS or from a token before it becomes part of log lines and responses.
const maxErrorText = 512

// managedCredentials bounds the number of credentials that are kept, one for each principal. A credential takes some
// hundred bytes and is cheap to create, so the bound only has to exceed the number of principals in use on a node.
const managedCredentials = 1024

// ManagedIdentities gets tokens of the managed identities of the VM from IMDS, through azidentity.
type ManagedIdentities struct {
	transport   *http.Client
	userAgent   string
	credentials *lru.Cache[Principal, azcore.TokenCredential]
}

// NewManagedIdentities returns the source of tokens of managed identities. It connects to IMDS at addr, not at the
// address that azidentity uses.
func NewManagedIdentities(addr netip.AddrPort, userAgent string) (*ManagedIdentities, error) {
	dialer := &net.Dialer{Timeout: 2 * time.Second}
	credentials, err := lru.New[Principal, azcore.TokenCredential](managedCredentials)
	if err != nil {
		return nil, err
	}
	return &ManagedIdentities{
		userAgent:   userAgent,
		credentials: credentials,
		transport: &http.Client{
			Transport: newIMDSLimiter(&http.Transport{
				Proxy: nil, // IMDS must never be reached through a proxy
				DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
					return dialer.DialContext(ctx, network, addr.String())
				},
				MaxIdleConnsPerHost:    imdsConcurrent,
				IdleConnTimeout:        30 * time.Second,
				ResponseHeaderTimeout:  10 * time.Second,
				MaxResponseHeaderBytes: 16 << 10,
			}),
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Fetch implements [Fetcher]. Its error is an *Error.
func (m *ManagedIdentities) Fetch(ctx context.Context, call Call) (Token, error) {
	credential, err := m.credential(call.Principal)
	if err != nil {
		return Token{}, &Error{Class: Denied, Err: err}
	}
	seen := &response{}
	ctx = context.WithValue(ctx, responseKey{}, seen)
	ctx = context.WithValue(ctx, imdsQueryKey{}, imdsQuery{call.Resource, call.Fresh})
	got, err := credential.GetToken(ctx, policy.TokenRequestOptions{
		Scopes: []string{call.Resource}, // see imdsQuery
		// With claims the SDK bypasses its own cache, which all credentials of the process share. When NMI renews a
		// token before it expires, that cache would return the old token. The SDK does not send the claims to IMDS.
		Claims: "{}",
	})
	if err != nil {
		return Token{}, seen.failure(err)
	}
	return describe(got.Token, got.ExpiresOn, time.Now()), nil
}

func (m *ManagedIdentities) credential(p Principal) (azcore.TokenCredential, error) {
	if c, ok := m.credentials.Get(p); ok {
		return c, nil
	}
	options := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: policy.ClientOptions{
		Transport:       transporter{m.transport},
		PerCallPolicies: []policy.Policy{imdsQuery{}},
		Telemetry:       policy.TelemetryOptions{ApplicationID: m.userAgent},
		// The retries are short, because callers wait. If IMDS still fails, clients get an error that makes them retry.
		Retry: policy.RetryOptions{
			MaxRetries: 2, RetryDelay: 250 * time.Millisecond, MaxRetryDelay: time.Second,
			StatusCodes: []int{http.StatusNotFound, http.StatusGone, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout},
		},
	}}
	switch {
	case p.ClientID != "":
		options.ID = azidentity.ClientID(p.ClientID)
	case p.ObjectID != "":
		options.ID = azidentity.ObjectID(p.ObjectID)
	case p.ResourceID != "":
		options.ID = azidentity.ResourceID(p.ResourceID)
	}
	c, err := azidentity.NewManagedIdentityCredential(options)
	if err != nil {
		return nil, err
	}
	m.credentials.Add(p, c)
	return c, nil
}

// imdsQuery has the parameters of a request to IMDS that NMI sets itself, not the SDK.
type imdsQuery struct {
	resource string
	fresh    bool
}

type imdsQueryKey struct{}

// Do sets the resource exactly as the client sent it: the SDK would remove "/.default" at its end. If the fetch must
// bypass caches, Do sets bypass_cache.
func (imdsQuery) Do(r *policy.Request) (*http.Response, error) {
	w, _ := r.Raw().Context().Value(imdsQueryKey{}).(imdsQuery)
	q := r.Raw().URL.Query()
	q.Set("resource", w.resource)
	if w.fresh {
		q.Set("bypass_cache", "true")
	}
	r.Raw().URL.RawQuery = q.Encode()
	return r.Next()
}

// transporter reads each response completely, up to maxResponse, and stores it in the *response of the request's
// context. The errors of the SDK are not enough to classify a failure: not all contain the status, and their texts are
// not stable.
type transporter struct{ client *http.Client }

func (t transporter) Do(r *http.Request) (*http.Response, error) {
	seen, _ := r.Context().Value(responseKey{}).(*response)
	sent, err := outbound.WithOwnBody(r)
	if err != nil {
		return nil, err
	}
	resp, err := t.client.Do(sent)
	if err != nil {
		if seen != nil {
			*seen = response{err: err}
		}
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse+1))
	if err == nil && len(body) > maxResponse {
		err = errors.New("the response of the token source is larger than 64 KiB, so it is not a valid response")
	}
	if seen != nil {
		*seen = response{status: resp.StatusCode, header: resp.Header, body: body, err: err}
	}
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

type responseKey struct{}

// response is the last response in one fetch, or the error of the transport if there was no complete response. Attempts
// of a fetch are sequential, so response needs no lock.
type response struct {
	status int
	header http.Header
	body   []byte
	err    error
}

// failure converts err, the error of the SDK, into an *Error. The class depends on the last response.
func (a *response) failure(err error) *Error {
	var own *Error
	if errors.As(a.err, &own) { // from imdsLimiter
		return own
	}
	if a.err != nil || a.status == 0 || a.status == http.StatusOK {
		return &Error{Class: Unavailable, Err: err}
	}
	e := &Error{Class: Denied, Status: a.status, Err: err}
	var body struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
	}
	if json.Unmarshal(a.body, &body) == nil {
		e.Code, e.Description = text.OneLine(body.Error, maxErrorText), text.OneLine(body.Description, maxErrorText)
	}
	switch {
	case a.status == http.StatusTooManyRequests:
		e.Class, e.RetryAfter = Throttled, retryAfter(a.header)
	case a.status >= 500 || a.status == http.StatusNotFound || a.status == http.StatusGone || a.status == http.StatusRequestTimeout:
		e.Class = Unavailable
	}
	return e
}
