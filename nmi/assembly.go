package nmi

import (
	"context"
	"errors"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/outbound"
	"github.com/podidentity/podidentity/nmi/token"
)

// prepareTokens builds what is between a decision and its token. Requests wait for assignments until ctx ends; watches of
// Secrets end with watching.
func (n *node) prepareTokens(ctx, watching context.Context) error {
	roots, err := outbound.RootCAs(n.cfg.CABundle)
	if err != nil {
		return err
	}
	authority, err := identity.ParseAuthority(n.cfg.Authority)
	if err != nil {
		return err
	}
	proofs := &principals{
		authority:    authority,
		byResourceID: n.cfg.ManagedIdentityBy == ByResourceID,
		secrets:      newSecrets(watching, n.watch.secret, n.watch.readSecret, n.secretChanged),
		assertions:   newAssertions(n.watch.requestToken, n.watch.pod),
	}
	managed, err := token.NewManagedIdentities(n.cfg.imds(), n.cfg.UserAgent)
	if err != nil {
		return err
	}
	entra, err := token.NewEntra(token.EntraConfig{RootCAs: roots, UserAgent: n.cfg.UserAgent, Secrets: proofs.secrets, Assertions: proofs.assertions})
	if err != nil {
		return err
	}
	n.sources = &token.Sources{ManagedIdentities: managed, Entra: entra}
	allowed := func(uid string, p token.Principal) bool {
		pod, alive := n.watch.pod(uid)
		return alive && n.tokens.allowed(pod, p)
	}
	if n.cache, err = token.NewCache(n.sources, token.DefaultSize, allowed, n.metrics); err != nil {
		return err
	}
	objectIDs, err := lru.New[token.Principal, string](objectIDsKept)
	if err != nil {
		return err
	}
	n.tokens = &tokens{
		pods:       newPodFinder(n.watch, n.cfg.PodLookup),
		facts:      n.watch.facts,
		latest:     n.watch.latest,
		ready:      n.waitFilled,
		stale:      n.watch.connection.stale,
		rules:      n.cfg.rules(),
		principals: proofs,
		objectIDs:  objectIDs,
		cache:      n.cache,
		metrics:    n.metrics,
	}
	if n.cfg.standard() {
		n.tokens.waiting = &waiting{
			most:          n.cfg.AssignmentWait,
			news:          &n.watch.news,
			assignedSince: n.watch.assignedSince,
			ending:        ctx.Done(),
			places:        newPlaces(maxWaiting, maxWaitingPerSource),
			observe:       n.metrics.AssignmentWaits(),
		}
	}
	return nil
}

// What hangs on an object goes with it.

func (n *node) podGone(uid string) {
	n.cache.Release(uid)
	n.tokens.principals.secrets.release(uid)
	n.tokens.principals.assertions.release(uid)
}

// sweepEvery is how often is looked for pods that went while a request of theirs was under way, which noted them again.
const sweepEvery = 5 * time.Minute

// sweep forgets such pods until ctx ends. One that the watch has not heard of yet is noted again by its next request.
func (n *node) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		for _, uid := range append(n.tokens.principals.secrets.pods(), n.tokens.principals.assertions.pods()...) {
			if _, alive := n.watch.pod(uid); !alive {
				n.podGone(uid)
			}
		}
	}
}

func (n *node) identityChanged(old identity.Identity) {
	n.drop(func(p token.Principal) bool { return n.tokens.principals.stands(old, p) })
}

func (n *node) secretChanged(ref token.Ref, revision string) {
	n.drop(func(p token.Principal) bool { return p.Secret == ref && p.Revision == revision })
}

func (n *node) drop(which func(token.Principal) bool) {
	n.cache.Drop(which)
	n.sources.Drop(which)
}

// keepSecretsInMemory keeps what is in this process's memory out of dumps of it, and other processes of the node from
// reading it.
func keepSecretsInMemory() error {
	err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	return errors.Join(err, unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
}
