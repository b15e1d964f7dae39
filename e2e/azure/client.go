package azure

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Client controls a fake Azure over its unix socket. It is safe for concurrent
// use. The methods for the fake ARM are those of the embedded ARMClient.
type Client struct {
	ARMClient

	mu   sync.Mutex
	keys Keys // for Verify; fetched once
}

// ARMClient has the methods of a Client that control the fake ARM.
type ARMClient struct{ *controlClient }

// controlClient sends requests to the control API.
type controlClient struct {
	socket string
	http   *http.Client
}

// Dial returns a client for the socket. It does not connect yet.
func Dial(socket string) *Client {
	return &Client{ARMClient: ARMClient{&controlClient{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}}}}
}

// Ready returns nil if the control API of the fake Azure responds. It does not retry.
func (c *Client) Ready(ctx context.Context) error {
	_, err := c.Addresses(ctx)
	return err
}

// WaitReady waits until the fake Azure responds or the context ends.
func (c *Client) WaitReady(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := c.Ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the fake Azure: %w", err)
		}
	}
}

// Addresses returns two listen addresses: that of IMDS, and the one that Entra ID and
// ARM share.
func (c *Client) Addresses(ctx context.Context) (Addresses, error) {
	var a Addresses
	return a, c.call(ctx, "GET", "/ready", nil, &a)
}

// AddIdentity creates or replaces a user-assigned identity and attaches it to
// the nodes; no nodes, or "", means all. It does not detach the identity from
// other nodes.
func (c *Client) AddIdentity(ctx context.Context, id Identity, nodes ...string) error {
	return c.call(ctx, "PUT", "/identities", identityRequest{id, nodes}, nil)
}

// Detach detaches a user-assigned identity, given by client, object or resource
// ID, from the nodes; no nodes, or "", means all.
func (c *Client) Detach(ctx context.Context, id string, nodes ...string) error {
	return c.call(ctx, "POST", "/identities/detach", detachRequest{id, nodes}, nil)
}

// RemoveIdentity deletes a user-assigned identity. An unknown one is not an
// error.
func (c *Client) RemoveIdentity(ctx context.Context, id string) error {
	return c.call(ctx, "DELETE", "/identities", detachRequest{ID: id}, nil)
}

// Identities lists the user-assigned identities and where they are attached.
func (c *Client) Identities(ctx context.Context) ([]AttachedIdentity, error) {
	var out []AttachedIdentity
	return out, c.call(ctx, "GET", "/identities", nil, &out)
}

// AddApp creates or replaces an application.
func (c *Client) AddApp(ctx context.Context, a App) error {
	return c.call(ctx, "PUT", "/apps", a, nil)
}

// AddFederated adds a federated credential to an application or a user-assigned
// identity, which can then authenticate with tokens of the credential's issuer. If an
// earlier call added a credential with the same issuer and subject, AddFederated
// replaces that one.
func (c *Client) AddFederated(ctx context.Context, clientID string, f FederatedCredential) error {
	return c.call(ctx, "PUT", "/federated", federatedRequest{clientID, f}, nil)
}

// Set sets the switches in changes: all of them or, if one is invalid, none. The entry
// "reset": "all" restores the defaults of all switches before the others are set.
func (c *Client) Set(ctx context.Context, changes map[string]string) error {
	return c.call(ctx, "PATCH", "/switches", changes, nil)
}

// Switches returns all switches with their values. A positive value of throttle or
// status-count is the number of requests to which the fault still applies. When
// status-count falls to 0, status also becomes 0 (off). With throttle -1, or with a status
// that was set while status-count was 0, the fault applies until a test changes the switch.
func (c *Client) Switches(ctx context.Context) (map[string]string, error) {
	var out map[string]string
	return out, c.call(ctx, "GET", "/switches", nil, &out)
}

// Log returns the entries of the log of IMDS and Entra ID with a sequence number
// greater than since.
func (c *Client) Log(ctx context.Context, since int) ([]Entry, error) {
	return readLines[Entry](ctx, c.controlClient, "/log", since)
}

func readLines[T any](ctx context.Context, c *controlClient, path string, since int) ([]T, error) {
	body, err := c.do(ctx, "GET", path+"?since="+strconv.Itoa(since), nil)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var out []T
	dec := json.NewDecoder(body)
	for {
		var e T
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return out, nil
		} else if err != nil {
			return nil, fmt.Errorf("fake Azure: reading the response to GET %s: %w", path, err)
		}
		out = append(out, e)
	}
}

// ResetLog empties the log of IMDS and Entra ID and both logs of the fake ARM. It sets
// the counts to 0, except that InFlight and MaxConcurrency still include the requests
// to IMDS and Entra ID in progress. Sequence numbers continue.
func (c *Client) ResetLog(ctx context.Context) error {
	return c.call(ctx, "DELETE", "/log", nil, nil)
}

// Stats returns the counts.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	var s Stats
	return s, c.call(ctx, "GET", "/stats", nil, &s)
}

// Keys returns the keys that verify tokens and TLS connections.
func (c *Client) Keys(ctx context.Context) (Keys, error) {
	var k Keys
	return k, c.call(ctx, "GET", "/keys", nil, &k)
}

// Verify checks a token's signature and times and returns its claims. The first call
// fetches the keys, and later calls reuse them.
func (c *Client) Verify(token string) (Claims, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keys.JWKS == nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		keys, err := c.Keys(ctx)
		if err != nil {
			return Claims{}, err
		}
		c.keys = keys
	}
	return c.keys.Verify(token)
}

func (c *controlClient) call(ctx context.Context, method, path string, in, out any) error {
	body, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return fmt.Errorf("fake Azure: reading the response to %s %s: %w", method, path, err)
	}
	return nil
}

func (c *controlClient) do(ctx context.Context, method, path string, in any) (io.ReadCloser, error) {
	var payload io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("fake Azure: encoding %T: %w", in, err)
		}
		payload = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://fake-azure"+path, payload)
	if err != nil {
		return nil, fmt.Errorf("fake Azure: creating the request %s %s: %w", method, path, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("request to the fake Azure at %s: %w", c.socket, err)
	}
	if resp.StatusCode < 300 {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	var refused controlError
	if err := json.NewDecoder(resp.Body).Decode(&refused); err != nil || refused.Error == "" {
		return nil, fmt.Errorf("fake Azure: %s %s: status %s", method, path, resp.Status)
	}
	return nil, fmt.Errorf("fake Azure: %s", refused.Error)
}
