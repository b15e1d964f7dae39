package token

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/outbound"
	"github.com/podidentity/podidentity/internal/text"
)

const (
	// entraClients bounds the number of values of type client that are kept, one for each principal.
	entraClients = 1024
	// maxBytesReceived is how many bytes of responses a credential may receive before it is replaced. MSAL keeps every
	// token in the memory of the credential, although NMI never reads it from there.
	maxBytesReceived = 256 << 10
	// invalidFor is how long NMI keeps the error for the invalid Secret of a principal before it reads and parses the
	// Secret again. Otherwise an attacker could make NMI parse the same Secret repeatedly. After a correction, the
	// Secret has another revision and so another principal, for which NMI reads it at once.
	invalidFor = time.Minute
)

// EntraConfig configures an Entra.
type EntraConfig struct {
	// RootCAs verify the certificate of Entra ID; nil means those of the system.
	RootCAs    *x509.CertPool
	UserAgent  string
	Secrets    Secrets
	Assertions Assertions
}

// Entra gets tokens from Entra ID, for the sources [Secret], [Certificate] and [Federated], through azidentity.
type Entra struct {
	secrets     Secrets
	assertions  Assertions
	authorities *authorities
	pkcs12      *pkcs12Opener
	transport   *http.Client
	userAgent   string
	clients     *lru.Cache[Principal, *client]
}

// client is what NMI keeps of one principal for its requests to Entra ID. The goroutine that holds lock owns the other
// fields, except retryAfter.
type client struct {
	lock chan struct{}
	// retryAfter stops requests after a 429. Entra ID throttles one application or one tenant, but each principal has a
	// gate of its own: with one gate for each tenant, any user who names a tenant could stop the requests of others.
	retryAfter outbound.RetryAfterGate

	credential    azcore.TokenCredential
	expires       time.Time // expiry of the certificate; zero if the credential has no certificate
	bytesReceived int
	failed        *Error // the error for an invalid Secret, see invalidFor
	failedUntil   time.Time
}

// NewEntra returns the source of tokens from Entra ID.
func NewEntra(cfg EntraConfig) (*Entra, error) {
	clients, err := lru.New[Principal, *client](entraClients)
	if err != nil {
		return nil, err
	}
	authorities, err := newAuthorities(cfg.RootCAs)
	if err != nil {
		return nil, err
	}
	return &Entra{
		secrets:     cfg.Secrets,
		assertions:  cfg.Assertions,
		authorities: authorities,
		pkcs12:      newPKCS12Opener(),
		userAgent:   cfg.UserAgent,
		clients:     clients,
		transport: &http.Client{
			Transport:     authorities,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Drop calls which for each principal, and removes the credential of the principal if which returns true, see
// [Sources.Drop].
func (e *Entra) Drop(which func(Principal) bool) {
	for _, p := range e.clients.Keys() {
		if which(p) {
			e.clients.Remove(p)
		}
	}
}

// Fetch implements [Fetcher]. Its error is an *Error.
func (e *Entra) Fetch(ctx context.Context, call Call) (Token, error) {
	c := e.client(call.Principal)
	var t Token
	var failed *Error
	if call.Source == Federated {
		t, failed = e.fetchFederated(ctx, c, call)
	} else {
		t, _, failed = e.requestToken(ctx, c, call, "")
	}
	if failed != nil {
		return Token{}, failed
	}
	return t, nil
}

func (e *Entra) client(p Principal) *client {
	if c, ok := e.clients.Get(p); ok {
		return c
	}
	c := &client{lock: make(chan struct{}, 1)}
	if earlier, ok, _ := e.clients.PeekOrAdd(p, c); ok {
		return earlier
	}
	return c
}

// requestToken sends one token request, which the SDK may retry a few times. assertion is empty unless the principal is
// federated. If the request fails, requestToken also returns the error codes in the response of Entra ID. The SDK
// serializes the requests of a credential, and ignores ctx while one request waits for another. Therefore requestToken
// acquires c.lock before it calls the SDK, and stops waiting for c.lock when ctx ends.
func (e *Entra) requestToken(ctx context.Context, c *client, call Call, assertion string) (Token, []int, *Error) {
	select {
	case c.lock <- struct{}{}:
		defer func() { <-c.lock }()
	case <-ctx.Done():
		return Token{}, nil, &Error{Class: Unavailable, Err: fmt.Errorf("waiting until earlier token requests for this identity have ended: %w", ctx.Err())}
	}
	if wait := c.retryAfter.Remaining(); wait > 0 {
		return Token{}, nil, &Error{Class: Throttled, Status: http.StatusTooManyRequests, Code: "too_many_requests", Description: "NMI did not send the request, because Entra ID responded to an earlier request for this identity with status 429", RetryAfter: wait}
	}
	if failed := e.ensureCredential(ctx, c, call.Principal); failed != nil {
		return Token{}, nil, failed
	}
	x := &entraRequest{assertion: assertion}
	ctx = context.WithValue(ctx, responseKey{}, &x.response)
	ctx = context.WithValue(ctx, entraRequestKey{}, x)
	got, err := c.credential.GetToken(ctx, policy.TokenRequestOptions{
		// Entra ID takes the part of the scope before the final "/.default" as the resource. So a resource that ends in
		// a slash keeps that slash.
		Scopes: []string{call.Resource + "/.default"},
		// With claims the SDK bypasses its own cache. When NMI renews a token before it expires, that cache would
		// return the old token. Entra ID receives no claims, see entraRequest.Do.
		Claims: "{}",
	})
	c.bytesReceived += len(x.response.body)
	if err != nil {
		failed, codes := x.failure(call.Principal, err)
		if failed.Class == Throttled {
			c.retryAfter.Extend(failed.RetryAfter)
		}
		return Token{}, codes, failed
	}
	t := describe(got.Token, got.ExpiresOn, time.Now())
	t.CorrelationID = text.OneLine(cmp.Or(x.response.header.Get("client-request-id"), x.requestID, x.response.header.Get("x-ms-request-id")), maxID)
	return t, nil, nil
}

// ensureCredential creates the credential of c if c has none, if its certificate has expired, or if it has received
// maxBytesReceived bytes. If the Secret is invalid, ensureCredential returns the same error for the time invalidFor.
// The caller holds c.lock.
func (e *Entra) ensureCredential(ctx context.Context, c *client, p Principal) *Error {
	now := time.Now()
	if c.credential != nil && c.bytesReceived < maxBytesReceived && (c.expires.IsZero() || now.Before(c.expires)) {
		return nil
	}
	if now.Before(c.failedUntil) {
		return c.failed
	}
	credential, expires, failed := e.credential(ctx, p)
	if failed != nil {
		if failed.Reason == identity.SecretInvalid {
			c.failed, c.failedUntil = failed, now.Add(invalidFor)
		}
		return failed
	}
	c.credential, c.expires, c.bytesReceived = credential, expires, 0
	return nil
}

// credential creates a credential. It also returns when the certificate of the credential expires, or the zero time if
// there is no certificate.
func (e *Entra) credential(ctx context.Context, p Principal) (azcore.TokenCredential, time.Time, *Error) {
	var none time.Time
	if p.Source == Federated {
		c, err := azidentity.NewClientAssertionCredential(p.TenantID, p.ClientID, assertionOf, &azidentity.ClientAssertionCredentialOptions{
			ClientOptions: e.options(p), DisableInstanceDiscovery: true,
		})
		return credentialOrError(c, none, err)
	}
	content, err := e.secrets.Secret(ctx, p.Secret)
	if err != nil {
		return nil, none, contentError(p.Secret, err)
	}
	if content.Revision != p.Revision {
		return nil, none, &Error{Class: Unavailable, Detail: "Secret " + p.Secret.String() + " changed during the request; retry"}
	}
	if p.Source == Secret {
		secret, err := clientSecret(content.Data)
		if err != nil {
			return nil, none, contentError(p.Secret, err)
		}
		c, err := azidentity.NewClientSecretCredential(p.TenantID, p.ClientID, secret, &azidentity.ClientSecretCredentialOptions{
			ClientOptions: e.options(p), DisableInstanceDiscovery: true,
		})
		return credentialOrError(c, none, err)
	}
	pair, err := certificate(ctx, content.Data, e.pkcs12.open, time.Now())
	if err != nil {
		return nil, none, contentError(p.Secret, fmt.Errorf("reading the certificate in Secret %s: %w", p.Secret, err))
	}
	expires := pair.chain[0].NotAfter
	if key, ok := pair.key.(*ecdsa.PrivateKey); ok {
		sign := func(context.Context) (string, error) { return ecAssertion(p, pair, key) }
		c, err := azidentity.NewClientAssertionCredential(p.TenantID, p.ClientID, sign, &azidentity.ClientAssertionCredentialOptions{
			ClientOptions: e.options(p), DisableInstanceDiscovery: true,
		})
		return credentialOrError(c, expires, err)
	}
	c, err := azidentity.NewClientCertificateCredential(p.TenantID, p.ClientID, pair.chain, pair.key, &azidentity.ClientCertificateCredentialOptions{
		ClientOptions: e.options(p), DisableInstanceDiscovery: true, SendCertificateChain: true,
	})
	return credentialOrError(c, expires, err)
}

func credentialOrError(c azcore.TokenCredential, expires time.Time, err error) (azcore.TokenCredential, time.Time, *Error) {
	if err != nil {
		return nil, expires, &Error{Class: Denied, Err: fmt.Errorf("creating a credential for Entra ID: %w", err)}
	}
	return c, expires, nil
}

func (e *Entra) options(p Principal) policy.ClientOptions {
	return policy.ClientOptions{
		Cloud:           cloud.Configuration{ActiveDirectoryAuthorityHost: p.Authority + "/"},
		Transport:       transporter{e.transport},
		PerCallPolicies: []policy.Policy{(*entraRequest)(nil)},
		Telemetry:       policy.TelemetryOptions{ApplicationID: e.userAgent},
		// The retries are short, because callers wait. A 429 is not retried here, see client.retryAfter.
		Retry: policy.RetryOptions{
			MaxRetries: 2, RetryDelay: 250 * time.Millisecond, MaxRetryDelay: time.Second,
			StatusCodes: []int{http.StatusRequestTimeout, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout},
		},
	}
}

type entraRequestKey struct{}

// entraRequest is the state of one token request and its response.
type entraRequest struct {
	assertion  string   // Federated: the assertion sent to Entra ID
	requestID  string   // client-request-id of the last request
	posted     bool     // the last request was for a token; false if it was for the addresses of the tenant's endpoints
	sentSecret string   // the secret or assertion in the last token request; errors must not contain it
	response   response // to the last request
}

// assertionOf returns the assertion of the token request in ctx. The SDK calls it.
func assertionOf(ctx context.Context) (string, error) {
	x, _ := ctx.Value(entraRequestKey{}).(*entraRequest)
	if x == nil || x.assertion == "" {
		return "", errors.New("requesting a token of a federated identity: the context has no assertion")
	}
	return x.assertion, nil
}

// Do removes the claims from the form: their only purpose is to bypass the SDK's cache. It also asks Entra ID to return
// the ID of the request in the response, and records in the entraRequest what was sent. The SDK calls Do as a policy of
// its pipeline. Do takes the entraRequest from the context, not from its receiver.
func (*entraRequest) Do(r *policy.Request) (*http.Response, error) {
	x, _ := r.Raw().Context().Value(entraRequestKey{}).(*entraRequest)
	if x == nil {
		return nil, errors.New("sending a request to Entra ID: the context has no token request")
	}
	header := r.Raw().Header
	header.Set("Return-Client-Request-Id", "true")
	x.requestID, x.posted = header.Get("client-request-id"), false
	if r.Body() == nil {
		return r.Next()
	}
	body, err := io.ReadAll(r.Body())
	if err != nil {
		return nil, err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, err
	}
	form.Del("claims")
	x.posted, x.sentSecret = true, cmp.Or(form.Get("client_secret"), form.Get("client_assertion"))
	if err := r.SetBody(streaming.NopCloser(strings.NewReader(form.Encode())), header.Get("Content-Type")); err != nil {
		return nil, err
	}
	return r.Next()
}

// failure converts err, the error of the SDK, into an *Error. The class depends on the last response. failure also
// returns the error codes in that response. If there was a response, the *Error does not contain err, because err
// quotes the response in full.
func (x *entraRequest) failure(p Principal, err error) (*Error, []int) {
	a := &x.response
	var own *Error
	var at nodeAddressError
	switch {
	case errors.As(a.err, &own):
		return own, nil
	case errors.As(a.err, &at):
		return &Error{Class: Denied, Detail: fmt.Sprintf("%s: %v; NMI does not connect to it; correct spec.adEndpoint or --authority-host, or the DNS record of the host", p.Authority, at)}, nil
	case a.err != nil:
		if x.sentSecret != "" && strings.Contains(a.err.Error(), x.sentSecret) {
			return &Error{Class: Unavailable, Err: fmt.Errorf("the response of %s is not valid HTTP; the details contain the credential that NMI sent, so they are not shown", p.Authority)}, nil
		}
		return &Error{Class: Unavailable, Err: a.err}, nil
	case a.status == 0:
		return &Error{Class: Unavailable, Err: err}, nil
	case a.status == http.StatusOK && x.posted:
		return &Error{Class: Unavailable, Detail: "The response of " + p.Authority + " contains no usable token; check that spec.adEndpoint, or --authority-host if the AzureIdentity has no adEndpoint, is the address of Entra ID"}, nil
	case a.status == http.StatusOK:
		return &Error{Class: Unavailable, Detail: "The response of " + p.Authority + " about tenant " + p.TenantID + " is not a valid response of Entra ID: an endpoint or the issuer is missing, or the issuer belongs to another host; correct spec.adEndpoint, or --authority-host if the AzureIdentity has no adEndpoint"}, nil
	}
	var body struct {
		Error         string `json:"error"`
		Description   string `json:"error_description"`
		Codes         []int  `json:"error_codes"`
		CorrelationID string `json:"correlation_id"`
	}
	_ = json.Unmarshal(a.body, &body) // fields that cannot be read stay empty
	e := &Error{Class: Denied, Status: a.status, Code: text.OneLine(x.redact(body.Error), 128)}
	e.CorrelationID = text.OneLine(x.redact(cmp.Or(body.CorrelationID, a.header.Get("client-request-id"), x.requestID)), maxID)
	e.Description = truncateDescription(x.redact(body.Description), e.CorrelationID)
	switch {
	case a.status == http.StatusTooManyRequests:
		e.Class, e.RetryAfter = Throttled, retryAfter(a.header)
	case a.status >= 500 || a.status == http.StatusRequestTimeout:
		e.Class = Unavailable
	case e.Code == "":
		e.Detail = fmt.Sprintf("%s responded with status %d, but not in the format of Entra ID; correct spec.adEndpoint, or --authority-host if the AzureIdentity has no adEndpoint", p.Authority, a.status)
	}
	return e, body.Codes
}

func (x *entraRequest) redact(s string) string {
	if x.sentSecret == "" {
		return s
	}
	return strings.ReplaceAll(s, x.sentSecret, "[...]")
}

// maxID bounds a correlation ID, which is a GUID.
const maxID = 64

// truncateDescription returns the description of an error of Entra ID as one line of at most 512 bytes. Operators
// search the logs of Entra ID for the correlation ID, which is near the end of a description. If the truncated line no
// longer contains the correlation ID, truncateDescription appends it.
func truncateDescription(description, correlationID string) string {
	const maxBytes = 512
	whole := text.OneLine(description, len(description))
	truncated := text.Truncate(whole, maxBytes)
	if len(truncated) == len(whole) || correlationID == "" || strings.Contains(truncated, correlationID) {
		return truncated
	}
	end := " Correlation ID: " + correlationID
	return text.Truncate(whole, maxBytes-len(end)) + end
}
