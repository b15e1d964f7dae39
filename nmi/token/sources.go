package token

import (
	"context"
	"fmt"
)

// Sources gets each token from the source of its principal.
type Sources struct {
	ManagedIdentities *ManagedIdentities
	Entra             *Entra
}

// Fetch implements [Fetcher]. Its error is an *Error.
func (s *Sources) Fetch(ctx context.Context, call Call) (Token, error) {
	switch call.Source {
	case Managed:
		return s.ManagedIdentities.Fetch(ctx, call)
	case Secret, Certificate, Federated:
		return s.Entra.Fetch(ctx, call)
	}
	return Token{}, &Error{Class: Denied, Detail: fmt.Sprintf("NMI has no source of tokens of the kind %q", call.Source)}
}

// Drop calls which for each principal, and removes the Entra ID credential of the principal if which returns true. Drop
// is called after an AzureIdentity or a Secret changed or was deleted, and after the last pod that used a Secret was
// released. A credential for IMDS depends only on its principal, so it stays.
func (s *Sources) Drop(which func(Principal) bool) {
	s.Entra.Drop(which)
}
