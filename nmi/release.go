package nmi

import (
	"context"
	"time"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/token"
)

// releasePod drops the state of a pod that was deleted or has finished: the assertion of the pod, the renewal of each
// token that no other pod uses, and the watch of each Secret that no other pod uses.
func (a *agent) releasePod(uid string) {
	a.tokens.Release(uid)
	a.principals.Release(uid)
}

// releaseInterval is the time between two searches for state of pods that are gone. Such state exists if a request was
// still in flight when releasePod was called, and added state of its pod afterwards.
const releaseInterval = 5 * time.Minute

// releaseDeletedPods releases each pod for which NMI watches Secrets or requested an assertion, if the cache has no
// live pod with its UID. It does so every releaseInterval until ctx ends. It may also release a live pod that the watch
// has not reported yet; the next request of that pod restores the state.
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

// dropIdentity drops the tokens and credentials of an AzureIdentity that was changed or deleted. old is its previous
// state.
func (a *agent) dropIdentity(old identity.Identity) {
	a.dropPrincipals(func(p token.Principal) bool { return a.principals.Matches(old, p) })
}

// dropSecret drops the tokens and credentials that were made from this revision of the Secret ref. It is called when
// the Secret was replaced or deleted, or when no pod uses the Secret any more.
func (a *agent) dropSecret(ref token.Ref, revision string) {
	a.dropPrincipals(func(p token.Principal) bool { return p.Secret == ref && p.Revision == revision })
}

func (a *agent) dropPrincipals(matches func(token.Principal) bool) {
	a.tokens.Drop(matches)
	a.sources.Drop(matches)
}
