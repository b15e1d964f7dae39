package azure

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
)

// fakeAzure responds to requests in place of Azure, and records them.
type fakeAzure struct {
	respond func(n int, r *http.Request) (*http.Response, error) // n is the number of the request, from 1

	mu   sync.Mutex
	seen []seen
}

type seen struct {
	method, url, body string
	header            http.Header
	at                time.Time
}

func (s *fakeAzure) Do(r *http.Request) (*http.Response, error) {
	var body []byte
	if r.Body != nil {
		var err error
		if body, err = io.ReadAll(r.Body); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	s.seen = append(s.seen, seen{r.Method, r.URL.String(), string(body), r.Header.Clone(), time.Now()})
	n := len(s.seen)
	s.mu.Unlock()
	return s.respond(n, r)
}

func (s *fakeAzure) requests() []seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen
}

// reply returns a response; headers are "Name: value".
func reply(r *http.Request, status int, body string, headers ...string) (*http.Response, error) {
	resp := &http.Response{
		StatusCode: status, Status: http.StatusText(status), Request: r,
		Header: http.Header{"Content-Type": {"application/json"}},
		Body:   io.NopCloser(strings.NewReader(body)),
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		resp.Header.Set(name, value)
	}
	return resp, nil
}

// replies responds with one function after the other, then always with the last.
func replies(each ...func(*http.Request) (*http.Response, error)) *fakeAzure {
	return &fakeAzure{respond: func(n int, r *http.Request) (*http.Response, error) {
		return each[min(n, len(each))-1](r)
	}}
}

func replying(status int, body string, headers ...string) func(*http.Request) (*http.Response, error) {
	return func(r *http.Request) (*http.Response, error) { return reply(r, status, body, headers...) }
}

// hung sends no response, and returns an error when the context of the request ends.
func hung(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// bearer looks like a token, and must not appear in any error or log.
const bearer = "eyJhbGciOiJub25lIn0.eyJzZWNyZXQiOiJ5ZXMifQ.c2lnbmF0dXJl"

type credential func(ctx context.Context) (azcore.AccessToken, error)

func (c credential) GetToken(ctx context.Context, _ policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return c(ctx)
}

func hasToken(context.Context) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: bearer, ExpiresOn: time.Now().Add(24 * time.Hour)}, nil
}

func newClient(t *testing.T, transport policy.Transporter, more ...func(*Options)) *Client {
	t.Helper()
	o := Options{UserAgent: "test", Transport: transport, Credential: credential(hasToken)}
	for _, f := range more {
		f(&o)
	}
	c, err := New(Config{}, o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var (
	vm   = Resource{Kind: VirtualMachine, SubscriptionID: "Sub", ResourceGroup: "Group", Name: "node-1"}
	vmss = Resource{Kind: ScaleSet, SubscriptionID: "Sub", ResourceGroup: "Group", Name: "pool"}
)

// id is the ID of an identity, as its owner spells it.
func id(name string) string {
	return "/subscriptions/Sub/resourceGroups/Ids/providers/Microsoft.ManagedIdentity/userAssignedIdentities/" + name
}

// armID is the ID of an identity, as ARM spells it.
func armID(name string) string {
	return "/subscriptions/Sub/resourcegroups/Ids/providers/Microsoft.ManagedIdentity/userAssignedIdentities/" + name
}

// having returns a state with the named user-assigned identities and, if system is true, a system-assigned one.
func having(system bool, names ...string) State {
	s := State{SystemAssigned: system, ETag: `"7"`, Identities: map[string]Identity{}}
	for _, name := range names {
		s.Identities[Fold(id(name))] = Identity{ID: armID(name), ClientID: "client-" + name, PrincipalID: "principal-" + name}
	}
	return s
}

// describe returns the JSON of a machine in ARM.
func describe(r Resource, provisioning, identityType string, names ...string) string {
	var ids []string
	for _, name := range names {
		ids = append(ids, `"`+armID(name)+`":{"clientId":"client-`+name+`","principalId":"principal-`+name+`"}`)
	}
	return `{"name":"x","id":"` + strings.ToUpper(r.ID()) + `","location":"here","etag":"\"7\"","tags":{"a":"b"},` +
		`"identity":{"type":"` + identityType + `","principalId":"p","tenantId":"t","userAssignedIdentities":{` + strings.Join(ids, ",") + `}},` +
		`"properties":{"provisioningState":"` + provisioning + `","timeCreated":"2026-01-01T00:00:00+00:00"}}`
}

// calls is an Observer that records its calls.
type calls struct {
	mu       sync.Mutex
	reported []string
}

func (c *calls) Called(operation, outcome string, _ time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reported = append(c.reported, operation+" "+outcome)
}

func (c *calls) all() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.reported, ", ")
}
