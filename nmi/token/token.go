// Package token is where tokens come from: the sources, one file each, and the cache before them.
//
// What it protects against: a token that reaches a pod it was not issued for, and a node that asks Azure so often that
// everybody on it is throttled. The cache knows nothing of pods' rights: callers authorise first and look up after,
// with a key that holds everything that decided the token. One fetch serves all who wait for the same key and belongs
// to none of them. Towards the Instance Metadata Service all of this process stays below the limits of one machine.
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

// Source says which kind of source a key belongs to. It is fit to be a metric label.
type Source string

const (
	// Managed is a managed identity of the machine, by way of the machine's IMDS.
	Managed Source = "managed_identity"
	// Secret is a service principal that proves itself to Entra ID with a client secret.
	Secret Source = "secret"
	// Certificate is a service principal that proves itself to Entra ID with a certificate.
	Certificate Source = "certificate"
	// Federated is an application or managed identity that trusts the ServiceAccount of the pod.
	Federated Source = "federated"
)

// Principal is whom a token speaks for, and how that is proven. Two of them are equal only if a token of one may be
// given to whoever may have one of the other.
type Principal struct {
	Source Source
	// Of a managed identity at most one of these is set; none means the machine's default identity, which only an
	// excepted pod may ask for. The other sources have the ClientID.
	ClientID, ObjectID, ResourceID string

	// The others ask Entra ID: Authority is its address without a slash at the end, such as
	// https://login.microsoftonline.com, and TenantID whom to ask there.
	Authority, TenantID string
	// Secret and Certificate: the Kubernetes Secret, and which content of it. A Secret that changes makes another
	// principal, so that nothing that an old content brought is given out any more.
	Secret   Ref
	Revision string
	// Federated: whose Kubernetes token is shown to Entra ID.
	ServiceAccount Ref
}

// Ref names an object of Kubernetes.
type Ref struct{ Namespace, Name string }

func (r Ref) String() string { return r.Namespace + "/" + r.Name }

// Key is everything that decides which token is meant. Two requests with equal keys may share a token, and only they.
type Key struct {
	Principal
	// Resource is the audience, byte for byte.
	Resource string
}

// ManagedKey is the key of a managed identity's token. Azure compares the IDs without case, so the key folds them.
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

// Token is an access token and what is known about it.
type Token struct {
	AccessToken string
	ExpiresOn   time.Time
	NotBefore   time.Time
	// Fetched is when it came; ExpiresOn minus Fetched is what was left of its life then.
	Fetched time.Time
	// ClientID and ObjectID are the principal's, as the token itself says; empty if it is not a readable JWT.
	ClientID, ObjectID string
	// ID is what Entra ID's sign-in logs call the unique token identifier; empty as above.
	ID string
	// CorrelationID is what Entra ID's logs know the exchange by that brought the token; empty if IMDS brought it.
	CorrelationID string
}

// SHA256 is the hash by which a client names a token that it wants replaced: hex, lower case.
func (t Token) SHA256() string {
	sum := sha256.Sum256([]byte(t.AccessToken))
	return hex.EncodeToString(sum[:])
}

// Call is one fetch.
type Call struct {
	Key
	// Pod is the UID of a living pod that may have the token. A federated principal is proven by way of it.
	Pod string
	// Fresh asks that caches on the way are passed by, as far as they can be.
	Fresh bool
}

// Fetcher gets a token from where tokens come from. The context belongs to the fetch, not to a request; it carries a
// deadline.
type Fetcher interface {
	Fetch(ctx context.Context, call Call) (Token, error)
}

// Class sorts failures by what to do about them.
type Class string

const (
	// Unavailable: nobody answered, or with a 5xx, 404 or 410. It passes.
	Unavailable Class = "unavailable"
	// Throttled: too many requests. It passes after RetryAfter.
	Throttled Class = "throttled"
	// Denied: the answer is no, and stays so until somebody changes something.
	Denied Class = "refused"
)

// Error is a failed fetch.
type Error struct {
	Class Class
	// Status, Code and Description are those of the answer; zero if there was none.
	Status            int
	Code, Description string
	// CorrelationID is what Entra ID's logs know the exchange by; may be empty.
	CorrelationID string
	// Reason is why, where more is known than the class says; may be empty.
	Reason identity.Reason
	// Detail is a sentence for whoever can do something about it; may be empty.
	Detail string
	// RetryAfter is how long to leave the source alone; 0 if it did not say.
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

// NonRetriable keeps the Azure SDK from trying again: an Error that is seen inside its pipeline says that this process
// holds back by itself.
func (e *Error) NonRetriable() {}
