// Package azure reads and updates the identities of virtual machines and scale sets through Azure Resource Manager
// (ARM). A "machine" here is a virtual machine or a scale set.
//
// It protects against:
//   - removing an identity that MIC did not add: an update contains only what to add and what to remove, keeps the
//     identity type that the remaining identities need, and, if ARM returned an ETag, applies only to the state from
//     which it was planned;
//   - a response that hangs and delays other machines, or a throttled subscription that delays other subscriptions;
//   - MIC's token or client secret in a log, or sent to a host other than Azure's.
//
// It does not decide which identities to attach, and does not retry updates: both are up to the caller.
package azure

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/arm"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"github.com/podidentity/podidentity/internal/outbound"
)

// Observer is called when a call to ARM ends. operation is vm_get, vm_update, vm_poll, vmss_get, vmss_update or
// vmss_poll; outcome is "ok" or the class of the failure.
type Observer interface {
	Called(operation, outcome string, d time.Duration)
}

// Options are the settings of a Client that are not in azure.json. The zero value is usable.
type Options struct {
	UserAgent string
	// RootCAs verify the certificates of Azure; nil means those of the system.
	RootCAs *x509.CertPool
	// Transport sends all requests, including those for tokens; nil means clients of net/http.
	Transport policy.Transporter
	// Credential is MIC's credential; nil means the one in the configuration.
	Credential azcore.TokenCredential
	Observer   Observer
	// RequestTimeout bounds one request to ARM; 0 means 30 s.
	RequestTimeout time.Duration
	// MaxPollTime bounds how long Wait polls an update; 0 means 20 minutes.
	MaxPollTime time.Duration
	// PollInterval is the longest interval between polls of an update if ARM sends no Retry-After; 0 means 5 s. ARM allows
	// 15 polls per minute for one machine.
	PollInterval time.Duration
}

const (
	requestTimeout = 30 * time.Second
	maxPollTime    = 20 * time.Minute
	pollInterval   = 5 * time.Second
)

// Client is an ARM client with one configuration. Two Clients share nothing except the SDK's cache of tokens of managed
// identities.
type Client struct {
	cleaner
	arm            arm.ClientOptions
	tokens         *tokens
	observer       Observer
	requestTimeout time.Duration
	maxPollTime    time.Duration
	pollInterval   time.Duration

	mu            sync.Mutex
	subscriptions map[string]*subscription // by folded ID; bounded by the subscriptions of nodes and ledgers
}

// subscription is the state of a subscription. ARM throttles each subscription separately, so each has its own
// RetryAfterGate.
type subscription struct {
	retryAfter outbound.RetryAfterGate
	machines   [2]machines // by Kind
}

// New returns a Client. It sends no request.
func New(cfg Config, o Options) (*Client, error) {
	where, err := cfg.cloud()
	if err != nil {
		return nil, err
	}
	manager := where.Services[cloud.ResourceManager]
	endpoint, err := url.Parse(manager.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("parsing the endpoint of Azure Resource Manager: %w", withoutURL(err))
	}
	direct, proxied := o.Transport, o.Transport
	if o.Transport == nil {
		direct, proxied = httpClient(o.RootCAs, nil), httpClient(o.RootCAs, http.ProxyFromEnvironment)
	}
	own := &ownCredential{TokenCredential: o.Credential, cleaner: cleaner{cfg.ClientSecret}}
	if o.Credential == nil {
		if own, err = cfg.credential(where, direct, proxied, o.UserAgent); err != nil {
			return nil, err
		}
	}
	c := &Client{
		cleaner:        own.cleaner,
		tokens:         &tokens{own: own, scope: manager.Audience + "/.default"},
		observer:       o.Observer,
		requestTimeout: positive(o.RequestTimeout, requestTimeout),
		maxPollTime:    positive(o.MaxPollTime, maxPollTime),
		pollInterval:   positive(o.PollInterval, pollInterval),
		subscriptions:  map[string]*subscription{},
	}
	c.arm = arm.ClientOptions{
		DisableRPRegistration: true,
		ClientOptions: policy.ClientOptions{
			Cloud:           where,
			Transport:       transporter{next: proxied, maxBytes: maxResponse, host: strings.ToLower(endpoint.Hostname())},
			Telemetry:       policy.TelemetryOptions{ApplicationID: o.UserAgent},
			PerCallPolicies: []policy.Policy{acceptedAsOK{}},
			// The SDK retries only for a short time, and never after 409, 412 or 429: after these the caller plans
			// again or waits.
			Retry: policy.RetryOptions{
				MaxRetries: 2, RetryDelay: 250 * time.Millisecond, MaxRetryDelay: 2 * time.Second, TryTimeout: c.requestTimeout,
				ShouldRetry: shouldRetry,
			},
		},
	}
	return c, nil
}

func positive(d, otherwise time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return otherwise
}

// shouldRetry reports whether the SDK retries within the call. It returns false after a timeout: the next attempt would
// probably time out too, while callers wait.
func shouldRetry(resp *http.Response, err error) bool {
	if err != nil {
		return !timedOut(err)
	}
	switch resp.StatusCode {
	case http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// once returns a context with which the SDK does not retry. It is for updates, which must not be sent twice, and for
// polls, which Wait repeats.
func (c *Client) once(ctx context.Context) context.Context {
	return policy.WithRetryOptions(ctx, policy.RetryOptions{MaxRetries: -1, TryTimeout: c.requestTimeout})
}

// acceptedAsOK changes the status 202 of a response to an update to 200 if the response has a header with a URL to
// poll. ARM's contract allows 202 for an update that started, but the SDK accepts only 200. Without such a header the
// SDK would treat a response with 200 as the end of the update, so the status stays 202, which the SDK returns as an
// error.
type acceptedAsOK struct{}

func (acceptedAsOK) Do(r *policy.Request) (*http.Response, error) {
	resp, err := r.Next()
	if err == nil && r.Raw().Method == http.MethodPatch && resp.StatusCode == http.StatusAccepted &&
		(resp.Header.Get("Azure-AsyncOperation") != "" || resp.Header.Get("Location") != "") {
		resp.StatusCode, resp.Status = http.StatusOK, "200 OK"
	}
	return resp, err
}

// Get reads a machine. Its error is an *Error.
func (c *Client) Get(ctx context.Context, r Resource) (State, error) {
	var state State
	s, err := c.subscription(r)
	if err != nil {
		return state, err
	}
	err = c.call(ctx, r.Kind.String()+"_get", s, noIdentities, func(ctx context.Context) error {
		var err error
		state, err = s.machines[r.Kind].get(ctx, r)
		return err
	})
	return state, err
}

// noIdentities are the requested identities of a read.
var noIdentities = map[string]bool{}

// subscription returns the state of the machine's subscription, and creates it if there is none.
func (c *Client) subscription(r Resource) (*subscription, error) {
	key := strings.ToLower(r.SubscriptionID)
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, ok := c.subscriptions[key]; ok {
		return s, nil
	}
	machines, err := newMachines(r.SubscriptionID, c.tokens, &c.arm)
	if err != nil {
		return nil, &Error{Class: Unconfigured, Operation: r.Kind.String(), Message: c.clean("creating a client for subscription "+r.SubscriptionID+": "+err.Error(), maxMessage)}
	}
	s := &subscription{machines: machines}
	c.subscriptions[key] = s
	return s, nil
}

// call waits for a token and then calls send. While the subscription is throttled, call does not call send and returns
// Throttled. Its error is an *Error. requested is for [cleaner.failure].
func (c *Client) call(ctx context.Context, operation string, s *subscription, requested map[string]bool, send func(context.Context) error) error {
	if wait := s.retryAfter.Remaining(); wait > 0 {
		return &Error{Class: Throttled, Operation: operation, RetryAfter: wait, Message: "Azure throttles the subscription of this machine; MIC sends no request about this subscription until the time of Retry-After has passed"}
	}
	start := time.Now()
	err := c.tokens.ready(ctx)
	if err == nil {
		err = send(ctx)
	}
	outcome := "ok"
	var failed *Error
	if err != nil {
		failed = c.failed(ctx, operation, requested, err)
		outcome = string(failed.Class)
		if failed.Class == Throttled {
			s.retryAfter.Extend(failed.RetryAfter)
		}
	}
	if c.observer != nil {
		c.observer.Called(operation, outcome, time.Since(start))
	}
	if failed != nil {
		return failed
	}
	return nil
}

// failed classifies a failure. If no response came because ctx ended or the request timed out, the message of the Error
// says which of the two happened.
func (c *Client) failed(ctx context.Context, operation string, requested map[string]bool, err error) *Error {
	failed := c.failure(operation, requested, err)
	var own *Error
	switch cause := ctx.Err(); {
	case failed.Status != 0 || failed.Err == nil || errors.As(err, &own):
	case cause != nil:
		failed.Err, failed.Message = cause, "stopped waiting for a response: "+cause.Error()
	case errors.Is(failed.Err, context.DeadlineExceeded):
		failed.Message = fmt.Sprintf("no response within %s", c.requestTimeout)
	}
	return failed
}
