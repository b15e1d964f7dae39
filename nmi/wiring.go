package nmi

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/outbound"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/limit"
	"github.com/podidentity/podidentity/nmi/request"
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
	n.principals = &credentials.Principals{
		Authority:    authority,
		ByResourceID: n.cfg.ManagedIdentityBy == ByResourceID,
		Secrets:      credentials.NewSecrets(watching, n.watch.Secret, n.watch.ReadSecret, n.secretChanged),
		Assertions:   credentials.NewAssertions(n.watch.RequestToken, n.watch.Pod),
	}
	managed, err := token.NewManagedIdentities(n.cfg.imds(), n.cfg.UserAgent)
	if err != nil {
		return err
	}
	entra, err := token.NewEntra(token.EntraConfig{RootCAs: roots, UserAgent: n.cfg.UserAgent, Secrets: n.principals.Secrets, Assertions: n.principals.Assertions})
	if err != nil {
		return err
	}
	n.sources = &token.Sources{ManagedIdentities: managed, Entra: entra}
	allowed := func(uid string, p token.Principal) bool {
		pod, alive := n.watch.Pod(uid)
		return alive && n.requests.MayRenew(pod, p)
	}
	if n.cache, err = token.NewCache(n.sources, token.DefaultSize, allowed, n.metrics); err != nil {
		return err
	}
	n.requests, err = request.New(n.request(ctx))
	return err
}

// request says what a token request needs. Requests wait for assignments until ctx ends.
func (n *node) request(ctx context.Context) request.Config {
	c := request.Config{
		Rules:            n.cfg.rules(),
		Pods:             n.watch.PodFinder(n.cfg.PodLookupTimeout),
		PodLookupTimeout: n.cfg.PodLookupTimeout,
		Cluster:          n.watch,
		Ready:            n.watch.WaitSynced,
		Principals:       n.principals,
		Cache:            n.cache,
		Metrics:          n.metrics,
	}
	if n.cfg.standard() {
		c.Wait = &request.WaitConfig{
			MaxWait:       n.cfg.AssignmentWait,
			Notifier:      &n.watch.Notifier,
			AssignedSince: n.watch.AssignedSince,
			Stopping:      ctx.Done(),
			Limiter:       limit.New(limit.MaxWaits, limit.MaxWaitsPerSource),
			Observe:       n.metrics.AddAssignmentWaits(),
		}
	}
	return c
}

// What hangs on an object goes with it.

func (n *node) podGone(uid string) {
	n.cache.Release(uid)
	n.principals.Secrets.Release(uid)
	n.principals.Assertions.Release(uid)
}

// releaseInterval is how often is looked for pods that went while a request of theirs was under way, which noted them again.
const releaseInterval = 5 * time.Minute

// releaseDeletedPods forgets such pods until ctx ends. One that the watch has not heard of yet is noted again by its next request.
func (n *node) releaseDeletedPods(ctx context.Context) {
	ticker := time.NewTicker(releaseInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		for _, uid := range append(n.principals.Secrets.Pods(), n.principals.Assertions.Pods()...) {
			if _, alive := n.watch.Pod(uid); !alive {
				n.podGone(uid)
			}
		}
	}
}

func (n *node) identityChanged(old identity.Identity) {
	n.dropTokens(func(p token.Principal) bool { return n.principals.Matches(old, p) })
}

func (n *node) secretChanged(ref token.Ref, revision string) {
	n.dropTokens(func(p token.Principal) bool { return p.Secret == ref && p.Revision == revision })
}

func (n *node) dropTokens(which func(token.Principal) bool) {
	n.cache.Drop(which)
	n.sources.Drop(which)
}

// disableMemoryDumps keeps what is in this process's memory out of dumps of it, and other processes of the node from
// reading it.
func disableMemoryDumps() error {
	err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	return errors.Join(err, unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
}
