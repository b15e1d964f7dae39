package nmi

import (
	"context"
	"time"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/token"
)

// releasePod drops what NMI keeps for a pod that was deleted or has finished: its assertion, and unless other pods use
// them, the renewal of its tokens and the watches of its Secrets.
func (a *agent) releasePod(uid string) {
	a.tokens.Release(uid)
	a.principals.Release(uid)
}

// releaseInterval is the time between two searches for state of pods that are gone: a request that is still in flight
// when releasePod is called can add such state again.
const releaseInterval = 5 * time.Minute

// releaseDeletedPods releases the pods that have Secrets or assertions but are not live pods of this node, at each
// releaseInterval until ctx ends. It may release a pod that the watch has not reported yet; the next request of that
// pod restores the state.
func (a *agent) releaseDeletedPods(ctx context.Context) {
	ticker := time.NewTicker(releaseInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		for _, uid := range a.principals.PodUIDs() {
			if _, ok := a.objects.PodByUID(uid); !ok {
				a.releasePod(uid)
			}
		}
	}
}

// dropIdentity drops the tokens and credentials of an AzureIdentity that was changed or deleted.
func (a *agent) dropIdentity(old identity.Identity) {
	a.dropPrincipals(func(p token.Principal) bool { return a.principals.Matches(old, p) })
}

// dropSecret drops the tokens and credentials of a revision of a Secret that is no longer current.
func (a *agent) dropSecret(ref token.Ref, revision string) {
	a.dropPrincipals(func(p token.Principal) bool { return p.Secret == ref && p.Revision == revision })
}

func (a *agent) dropPrincipals(matches func(token.Principal) bool) {
	a.tokens.Drop(matches)
	a.sources.Drop(matches)
}
