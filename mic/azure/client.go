// Package azure reads and changes the identities of virtual machines and scale sets, through Azure Resource Manager.
//
// What it protects against: an identity of somebody else that is lost, since an update says only what to add and what to
// remove, keeps the type that goes with the rest, and holds for the state that it was planned from; one subscription that
// Azure throttles and all others wait for; one answer that hangs and everybody waits for; and MIC's token or its client
// secret in a log, or on its way to another host than Azure's.
//
// It does not decide what to attach, and does not try again what costs: that is its caller's.
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

// Observer is told of each call to ARM when it has ended. operation is vm_get, vm_update, vm_poll, vmss_get, vmss_update
// or vmss_poll; outcome is "ok" or the class of the failure.
type Observer interface {
	Called(operation, outcome string, d time.Duration)
}

// Options are what a Client is told besides the configuration. The zero value is usable.
type Options struct {
	UserAgent string
	// RootCAs are who may vouch for Azure; nil means the system's.
	RootCAs *x509.CertPool
	// Transport carries all requests, those for tokens too; nil means HTTP.
	Transport policy.Transporter
	// Credential is whom MIC is; nil means what the configuration says.
	Credential azcore.TokenCredential
	Observer   Observer
	// RequestTimeout bounds one exchange with ARM; 0 means 30 s.
	RequestTimeout time.Duration
	// PollMost bounds how long an update is waited for; 0 means 20 minutes.
	PollMost time.Duration
	// PollEvery is how often is asked what became of an update, where ARM does not say. ARM lets one machine be asked 15
	// times a minute; 0 means 5 s.
	PollEvery time.Duration
}

const (
	requestTimeout = 30 * time.Second
	maxPollTime    = 20 * time.Minute
	pollInterval   = 5 * time.Second
)

// Client talks to ARM with one configuration. Two of them share nothing.
type Client struct {
	cleaner
	arm            arm.ClientOptions
	tokens         *tokens
	observer       Observer
	requestTimeout time.Duration
	maxPollTime    time.Duration
	pollInterval   time.Duration

	mu            sync.Mutex
	subscriptions map[string]*subscription // by folded ID; as many as the nodes name
}

// subscription is what is known of one. ARM throttles by subscription, so each has a door of its own.
type subscription struct {
	retryAfter outbound.RetryAfterGate
	machines   [2]machines // by Kind
}

// New returns a Client. It sends nothing yet.
func New(cfg Config, o Options) (*Client, error) {
	where, err := cfg.cloud()
	if err != nil {
		return nil, err
	}
	manager := where.Services[cloud.ResourceManager]
	endpoint, err := url.Parse(manager.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("the address of Azure Resource Manager: %w", withoutURL(err))
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
		maxPollTime:    positive(o.PollMost, maxPollTime),
		pollInterval:   positive(o.PollEvery, pollInterval),
		subscriptions:  map[string]*subscription{},
	}
	c.arm = arm.ClientOptions{
		DisableRPRegistration: true,
		ClientOptions: policy.ClientOptions{
			Cloud:           where,
			Transport:       transporter{next: proxied, maxBytes: maxResponse, host: strings.ToLower(endpoint.Hostname())},
			Telemetry:       policy.TelemetryOptions{ApplicationID: o.UserAgent},
			PerCallPolicies: []policy.Policy{acceptedAsOK{}},
			// Short, and never for what a 409, 412 or 429 says: the caller plans anew, or waits.
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

// shouldRetry says whether to ask again at once. What took all its time once would take it again, and people wait.
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

// once is for what must not be sent twice.
func (c *Client) once(ctx context.Context) context.Context {
	return policy.WithRetryOptions(ctx, policy.RetryOptions{MaxRetries: -1, TryTimeout: c.requestTimeout})
}

// acceptedAsOK makes a 202 out of ARM's contract what the library knows: that an update has begun, and where to ask for it.
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

// noIdentities are the identities of a request that has none.
var noIdentities = map[string]bool{}

// subscription returns what belongs to the machine's subscription.
func (c *Client) subscription(r Resource) (*subscription, error) {
	key := strings.ToLower(r.SubscriptionID)
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, ok := c.subscriptions[key]; ok {
		return s, nil
	}
	machines, err := newMachines(r.SubscriptionID, c.tokens, &c.arm)
	if err != nil {
		return nil, &Error{Class: Unconfigured, Operation: r.Kind.String(), Message: c.clean(err.Error(), maxMessage)}
	}
	s := &subscription{machines: machines}
	c.subscriptions[key] = s
	return s, nil
}

// call puts a question to ARM, unless the subscription is shut. Its error is an *Error.
func (c *Client) call(ctx context.Context, operation string, s *subscription, requested map[string]bool, send func(context.Context) error) error {
	if wait := s.retryAfter.Remaining(); wait > 0 {
		return &Error{Class: Throttled, Operation: operation, RetryAfter: wait, Message: "Azure asked for the subscription to be left alone"}
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

// failed sorts a failure, and says of one that took too long whose time was up.
func (c *Client) failed(ctx context.Context, operation string, requested map[string]bool, err error) *Error {
	failed := c.failure(operation, requested, err)
	var own *Error
	switch cause := ctx.Err(); {
	case failed.Status != 0 || failed.Err == nil || errors.As(err, &own):
	case cause != nil:
		failed.Err, failed.Message = cause, "given up: "+cause.Error()
	case errors.Is(failed.Err, context.DeadlineExceeded):
		failed.Message = fmt.Sprintf("no answer within %s", c.requestTimeout)
	}
	return failed
}
