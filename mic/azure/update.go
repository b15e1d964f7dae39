package azure

import (
	"context"
	"fmt"
	"net/http"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/compute/armcompute/v7"

	"github.com/podidentity/podidentity/internal/text"
)

// MaxIdentities is how many identities one update takes, additions and removals together.
const MaxIdentities = 150

// patch is the difference that an update makes. ARM merges it: what it does not name stays.
type patch struct {
	identityType armcompute.ResourceIdentityType
	// identities are added with a value and removed with nil.
	identities map[string]*armcompute.UserAssignedIdentitiesValue
	// requested are the same, folded.
	requested map[string]bool
	etag      string
}

func (p patch) ifMatch() *string {
	if p.etag == "" {
		return nil
	}
	return &p.etag
}

// newPatch makes the patch that adds and removes identities. What is there already is not added, what is not there is not
// removed; a removal is spelled as ARM spells it. A patch without identities does nothing and is not to be sent.
//
// The type speaks of what is there afterwards. One without "UserAssigned" removes all user-assigned identities, so it is
// only sent when basis has no other than those to be removed, and then names none.
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
			return patch{}, fmt.Errorf("identity %s is to be both added and removed", text.OneLine(id, maxMessage/2))
		}
		if identity, there := basis.Identities[folded]; there && !p.requested[folded] {
			p.requested[folded] = true
			p.identities[identity.ID] = nil
			left--
		}
	}
	if n := len(p.requested); n > MaxIdentities {
		return patch{}, fmt.Errorf("%d identities in one update; ARM takes %d", n, MaxIdentities)
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

// Begin sends one update that adds and removes identities, for a machine that is as basis says: where basis has an ETag
// and the machine is another by now, that is a Conflict. If there is nothing to do it sends nothing, and the operation is
// done. Whether basis may be changed at all, or is Deleting, is for the caller to see.
//
// It sends once. After Unavailable the update may have begun nevertheless; only a Get tells. Its error is an *Error.
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

// Resume takes up an update that was begun by another Client, with the token of its operation. It sends nothing. A token
// that makes no sense is Invalid; drop it, and read the machine instead. Its error is an *Error.
func (c *Client) Resume(ctx context.Context, r Resource, token string) (*Operation, error) {
	s, err := c.subscription(r)
	if err != nil {
		return nil, err
	}
	if token == "" {
		return nil, &Error{Class: Invalid, Operation: r.Kind.String() + "_poll", Message: "there is no token to resume by"}
	}
	resumed, err := s.machines[r.Kind].update(ctx, r, patch{}, token)
	if err != nil || resumed.Done() {
		// The library quotes the token, which holds addresses that are as good as passwords.
		return nil, &Error{Class: Invalid, Operation: r.Kind.String() + "_poll", Message: "the token to resume by is none of an update of this kind"}
	}
	// Which identities were in the update is not known any more, so all count that an error names.
	return c.operation(r, s, resumed, nil), nil
}
