package azure

import (
	"context"
	"fmt"
	"net/http"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/compute/armcompute/v7"

	"github.com/podidentity/podidentity/internal/text"
)

// MaxIdentities is the maximum number of identities in one update, additions and removals together.
const MaxIdentities = 150

// patch is the content of an update. ARM merges a patch into the machine: identities that the patch does not name stay.
type patch struct {
	identityType armcompute.ResourceIdentityType
	// identities are added with a value and removed with nil.
	identities map[string]*armcompute.UserAssignedIdentitiesValue
	// requested are the identities to add and remove, folded, even if identities is nil.
	requested map[string]bool
	etag      string
}

func (p patch) ifMatch() *string {
	if p.etag == "" {
		return nil
	}
	return &p.etag
}

// newPatch returns the patch that adds and removes identities. It skips additions that the machine has and removals
// that the machine does not have, and spells a removal as ARM does. A patch whose requested is empty must not be sent.
// newPatch returns an error if an identity is to be both added and removed, or if there are more than MaxIdentities.
//
// The identity type describes the result. A type without "UserAssigned" removes all user-assigned identities, so
// newPatch uses it only if no identity is left after the update, and then the patch names none.
func newPatch(basis State, add, remove []string) (patch, error) {
	p := patch{
		identities: map[string]*armcompute.UserAssignedIdentitiesValue{},
		requested:  map[string]bool{},
		etag:       basis.ETag,
	}
	left := len(basis.Identities)
	for _, id := range add {
		folded := Fold(id)
		if _, there := basis.Identities[folded]; !there && !p.requested[folded] {
			p.requested[folded] = true
			p.identities[id] = &armcompute.UserAssignedIdentitiesValue{}
			left++
		}
	}
	added := make(map[string]bool, len(add))
	for _, id := range add {
		added[Fold(id)] = true
	}
	for _, id := range remove {
		folded := Fold(id)
		if added[folded] {
			return patch{}, fmt.Errorf("the update both adds and removes identity %s", text.OneLine(id, maxMessage/2))
		}
		if identity, there := basis.Identities[folded]; there && !p.requested[folded] {
			p.requested[folded] = true
			p.identities[identity.ID] = nil
			left--
		}
	}
	if n := len(p.requested); n > MaxIdentities {
		return patch{}, fmt.Errorf("the update has %d identities; ARM allows %d", n, MaxIdentities)
	}
	switch {
	case left > 0 && basis.SystemAssigned:
		p.identityType = armcompute.ResourceIdentityTypeSystemAssignedUserAssigned
	case left > 0:
		p.identityType = armcompute.ResourceIdentityTypeUserAssigned
	case basis.SystemAssigned:
		p.identityType, p.identities = armcompute.ResourceIdentityTypeSystemAssigned, nil
	default:
		p.identityType, p.identities = armcompute.ResourceIdentityTypeNone, nil
	}
	return p, nil
}

// Begin sends one update that adds and removes identities. basis is the state from which the caller planned the
// update. If basis has an ETag and the machine has changed since then, the error is a Conflict. If there is nothing
// to change, Begin sends nothing and returns an operation that is done. The caller must check that the machine may be
// updated, for example that it is not Deleting.
//
// Begin sends the update once. After an error of class Unavailable the update may have started nevertheless; only Get
// shows this. The error of Begin is an *Error.
func (c *Client) Begin(ctx context.Context, r Resource, basis State, add, remove []string) (*Operation, error) {
	operation := r.Kind.String() + "_update"
	p, err := newPatch(basis, add, remove)
	if err != nil {
		return nil, &Error{Class: Invalid, Operation: operation, Message: err.Error()}
	}
	if len(p.requested) == 0 {
		return &Operation{state: basis}, nil
	}
	s, err := c.subscription(r)
	if err != nil {
		return nil, err
	}
	var started poller
	var answer *http.Response
	err = c.call(ctx, operation, s, p.requested, func(ctx context.Context) error {
		var err error
		started, err = s.machines[r.Kind].update(policy.WithCaptureResponse(c.once(ctx), &answer), r, p, "")
		return err
	})
	if err != nil {
		return nil, err
	}
	o := c.operation(r, s, started, p.requested)
	if answer != nil {
		o.wait = retryAfter(answer.Header)
	}
	return o, nil
}

// Resume returns the operation of an update that was started before, from the token of that operation. It sends no
// request. If the token is unusable, the error has class Invalid; the caller must then drop the token and read the
// machine instead. The error of Resume is an *Error.
func (c *Client) Resume(ctx context.Context, r Resource, token string) (*Operation, error) {
	s, err := c.subscription(r)
	if err != nil {
		return nil, err
	}
	if token == "" {
		return nil, &Error{Class: Invalid, Operation: r.Kind.String() + "_poll", Message: "the resume token is empty"}
	}
	resumed, err := s.machines[r.Kind].update(ctx, r, patch{}, token)
	if err != nil || resumed.Done() {
		// The error of the SDK quotes the token, which is secret, see Operation.Token.
		return nil, &Error{Class: Invalid, Operation: r.Kind.String() + "_poll", Message: "the resume token is unusable: it does not belong to an update in progress of this kind of machine"}
	}
	// The identities of the update are unknown, so an error reports all identities that Azure names.
	return c.operation(r, s, resumed, nil), nil
}
