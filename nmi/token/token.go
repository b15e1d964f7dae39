// Package token gets tokens. It has the two token sources, IMDS and Entra ID, and the cache in front of them. Each kind
// of credential that Entra ID accepts (secret, certificate, assertion) has a file of its own.
//
// It protects against two things: a token that reaches a pod that may not have it, and a node that sends Azure so many
// requests that all pods on it are throttled. The cache does not authorize requests: callers first authorize the
// request and then look up the token. The key of the lookup contains everything that decides which token a request
// gets. One fetch serves all callers that wait for the same key; no caller can cancel it. All token requests of this
// process to IMDS together stay within the limits that IMDS sets for one VM.
package token

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/podidentity/podidentity/identity"
)

// Source is the kind of source that a token comes from. It has few values, so it can be a metric label.
type Source string

const (
	// Managed: a managed identity that is attached to the VM. Its tokens come from IMDS.
	Managed Source = "managed_identity"
	// Secret: a service principal that authenticates to Entra ID with a client secret.
	Secret Source = "secret"
	// Certificate: a service principal that authenticates to Entra ID with a certificate.
	Certificate Source = "certificate"
	// Federated: an application or managed identity that trusts the ServiceAccount of the pod. NMI authenticates to
	// Entra ID with an assertion.
	Federated Source = "federated"
)

// Principal is the identity that a token is for, and how it authenticates. Two principals are equal only if any caller
// that may have a token of one may also have a token of the other.
type Principal struct {
	Source Source
	// Managed: at most one of these three IDs is set. If none is set, the principal is the default identity of the VM,
	// which only a pod with an AzurePodIdentityException may request. The other sources: ClientID is set.
	ClientID, ObjectID, ResourceID string

	// The other sources: Authority is the address of Entra ID without a slash at the end, such as
	// https://login.microsoftonline.com, and TenantID is the tenant.
	Authority, TenantID string
	// Secret and Certificate: the Kubernetes Secret and the revision of its content. A changed Secret is another
	// principal, so that tokens from the old content are not served any more.
	Secret   Ref
	Revision string
	// Federated: the ServiceAccount that the assertion is for.
	ServiceAccount Ref
}

// Ref is the namespace and name of a Kubernetes object.
type Ref struct{ Namespace, Name string }

func (r Ref) String() string { return r.Namespace + "/" + r.Name }

// Key contains everything that decides which token a request gets. Only requests with equal keys share a token.
type Key struct {
	Principal
	// Resource is the parameter resource of the request. It is compared as received, without normalization.
	Resource string
}

// ManagedKey returns the key of a managed identity's token. Azure compares the IDs without regard to case, so the key
// has them in lower case.
func ManagedKey(clientID, objectID, resourceID, resource string) Key {
	return Key{
		Principal: Principal{
			Source:     Managed,
			ClientID:   strings.ToLower(clientID),
			ObjectID:   strings.ToLower(objectID),
			ResourceID: strings.ToLower(resourceID),
		},
		Resource: resource,
	}
}

// Token is an access token with its metadata.
type Token struct {
	AccessToken string
	ExpiresOn   time.Time
	NotBefore   time.Time
	// Fetched is when the token was received.
	Fetched time.Time
	// ClientID and ObjectID of the principal, from the token's claims; empty if the token is not a readable JWT.
	ClientID, ObjectID string
	// ID is the "unique token identifier" of Entra ID's sign-in logs; empty if the token is not a readable JWT.
	ID string
	// CorrelationID identifies the token request in Entra ID's logs; empty if the token came from IMDS.
	CorrelationID string
}

// SHA256 returns the hash that a client sends to name a token that it rejects: hexadecimal, lower case.
func (t Token) SHA256() string {
	sum := sha256.Sum256([]byte(t.AccessToken))
	return hex.EncodeToString(sum[:])
}

// Call has the parameters of one fetch.
type Call struct {
	Key
	// Pod is the UID of a running pod that may have the token. For a federated principal, NMI sends the assertion of
	// this pod to Entra ID.
	Pod string
	// Fresh bypasses the caches of the source, if the source has an option for that.
	Fresh bool
}

// Fetcher gets a token from a source. The context belongs to the fetch, not to a request, and has a deadline.
type Fetcher interface {
	Fetch(ctx context.Context, call Call) (Token, error)
}

// Class groups failures by how to react to them.
type Class string

const (
	// Unavailable: a retry can succeed. There was no usable response, the status was 5xx or 408 (of IMDS also 404 or
	// 410), or NMI could not get the credential at that time.
	Unavailable Class = "unavailable"
	// Throttled: too many requests. A retry can succeed after RetryAfter.
	Throttled Class = "throttled"
	// Denied: the source refused the request, or NMI did not send it because the configuration is invalid. A retry
	// usually fails until someone changes the configuration.
	Denied Class = "refused"
)

// Error is a failed fetch.
type Error struct {
	Class Class
	// Status, Code and Description of the error response; zero if there was no response. If NMI did not send the
	// request because of an earlier 429, Status is 429, too.
	Status            int
	Code, Description string
	// CorrelationID identifies the request in Entra ID's logs; may be empty.
	CorrelationID string
	// Reason is the reason code, if it is more specific than the class; may be empty.
	Reason identity.Reason
	// Detail is a sentence for the operator: what is wrong and what to do; may be empty.
	Detail string
	// RetryAfter is the time to wait before the next request; 0 if it is not specified. A source sets it in each error
	// of class Throttled.
	RetryAfter time.Duration
	Err        error
}

func (e *Error) Error() string {
	switch {
	case e.Status != 0:
		return fmt.Sprintf("%s: status %d, %s: %s", e.Class, e.Status, e.Code, e.Description)
	case e.Detail != "":
		return e.Detail
	case e.Err != nil:
		return fmt.Sprintf("%s: %v", e.Class, e.Err)
	}
	return string(e.Class)
}

func (e *Error) Unwrap() error { return e.Err }

// NonRetriable keeps the Azure SDK from retrying. The SDK receives an *Error only from a transport of NMI that refused
// to send the request, because of an earlier 429 or because the address has no https. An immediate retry would not
// help: after a 429 the transport refuses requests for the time RetryAfter, and an address without https has to be
// corrected.
func (e *Error) NonRetriable() {}
