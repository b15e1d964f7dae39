package nmi

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	lru "github.com/hashicorp/golang-lru/v2"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/outbound"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/health"
	"github.com/podidentity/podidentity/nmi/limit"
	"github.com/podidentity/podidentity/nmi/links"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/server"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// connect creates the parts and connects them. When ctx ends, requests stop waiting for assignments. When the context
// watching ends, the watches of Secrets and the writing of Events stop.
func (a *agent) connect(ctx, watching context.Context, api *rest.Config) error {
	var err error
	if a.client, err = cluster.NewClient(api, a.cfg.Node, a.onAPIFailure); err != nil {
		return fmt.Errorf("creating the client of the API server: %w", err)
	}
	callbacks := cluster.Callbacks{PodGone: a.releasePod, IdentityChanged: a.dropIdentity}
	if a.cfg.capturesHostNetwork() {
		callbacks.HostPodsChanged = a.onHostPodsChanged
	}
	a.objects, err = cluster.NewCache(a.client, cluster.Config{
		Node: a.cfg.Node, Rules: a.cfg.rules(), Health: a.health, Log: a.logs.Main, Callbacks: callbacks,
	})
	if err != nil {
		return fmt.Errorf("creating the caches of the cluster's objects: %w", err)
	}
	a.metrics.AddStaleWatches(a.client.StaleWatches)
	if err := a.createTokenCache(watching); err != nil {
		return err
	}
	if a.moved, err = lru.New[movedAddress, struct{}](maxMovedAddresses); err != nil {
		return err
	}
	a.pods = a.objects.PodFinder(a.cfg.PodLookupTimeout)
	if a.cfg.confirmsAddresses() {
		a.links = links.New(links.Config{File: a.cfg.linksFile(), Log: a.logs.Main, OnChange: a.pods.Recheck, OnState: a.setLinksState})
	}
	if a.requests, err = request.New(a.requestConfig(ctx)); err != nil {
		return err
	}
	if a.cfg.Events {
		if a.events, err = telemetry.NewEvents(a.cfg.Node, a.client.WriteEvent); err != nil {
			return err
		}
		go a.events.Run(watching)
	}
	return nil
}

// createTokenCache creates the token cache with its sources and their credentials.
func (a *agent) createTokenCache(watching context.Context) error {
	roots, err := outbound.RootCAs(a.cfg.CABundle)
	if err != nil {
		return err
	}
	authority, err := identity.ParseAuthority(a.cfg.Authority)
	if err != nil {
		return err
	}
	a.principals = credentials.New(watching, credentials.Config{
		Authority:      authority,
		ByResourceID:   a.cfg.ManagedIdentityBy == ByResourceID,
		Secrets:        a.client,
		OnSecretChange: a.dropSecret,
		Tokens:         a.client,
		Pods:           a.objects,
	})
	managed, err := token.NewManagedIdentities(a.cfg.imds(), a.cfg.UserAgent)
	if err != nil {
		return err
	}
	entra, err := token.NewEntra(token.EntraConfig{RootCAs: roots, UserAgent: a.cfg.UserAgent, Secrets: a.principals.Secrets, Assertions: a.principals.Assertions})
	if err != nil {
		return err
	}
	a.sources = &token.Sources{ManagedIdentities: managed, Entra: entra}
	mayRenew := func(uid string, principal token.Principal) bool {
		pod, ok := a.objects.PodByUID(uid)
		return ok && a.requests.MayRenew(pod, principal)
	}
	if a.tokens, err = token.NewCache(a.sources, token.DefaultSize, mayRenew, a.metrics); err != nil {
		return err
	}
	a.metrics.AddCacheSize(a.tokens.Len)
	return nil
}

// requestConfig returns the settings of package request. When ctx ends, requests stop waiting for assignments.
func (a *agent) requestConfig(ctx context.Context) request.Config {
	c := request.Config{
		Rules:            a.cfg.rules(),
		Cluster:          a.objects,
		Pods:             a.pods,
		PodLookupTimeout: a.cfg.PodLookupTimeout,
		PodVerification:  request.PodVerification(a.cfg.PodVerification),
		OnMoved:          a.reportMovedAddress,
		Principals:       a.principals,
		Cache:            a.tokens,
		Metrics:          a.metrics,
	}
	if a.links != nil {
		c.Confirmer = a.links
	}
	if a.cfg.standard() {
		c.Wait = &request.WaitConfig{
			MaxWait:       a.cfg.AssignmentWait,
			Notifier:      a.objects.Notifier(),
			AssignedSince: a.objects.AssignedSince,
			Stopping:      ctx.Done(),
			Limiter:       limit.New(limit.MaxWaits, limit.MaxWaitsPerSource),
			Observe:       a.metrics.AddAssignmentWaits(),
		}
	}
	return c
}

// reportMovedAddress counts and logs a request of a pod from an address that the API server does not report as its own.
func (a *agent) reportMovedAddress(caller request.Caller, pod *corev1.Pod) {
	a.metrics.MovedAddresses.Inc()
	if known, _ := a.moved.ContainsOrAdd(movedAddress{caller.PodUID, caller.Address}, struct{}{}); known {
		return
	}
	a.logs.Main.Warn("a pod, known by its cgroup, sent a request from an address that the API server does not report as its own",
		zap.Stringer(telemetry.KeyAddress, caller.Address), zap.String(telemetry.KeyNamespace, pod.Namespace), zap.String(telemetry.KeyPod, pod.Name),
		zap.Strings(telemetry.KeyOtherPods, a.objects.PodsWithAddress(caller.Address)))
}

// movedAddress is an address from which a pod sent a request although the API server does not report it as the pod's.
type movedAddress struct {
	podUID  string
	address netip.Addr
}

// maxMovedAddresses bounds the movedAddress values that are logged only once.
const maxMovedAddresses = 1024

// setLinksState records whether NMI can confirm addresses. Where it captures by cgroup, it does not need that for most pods.
func (a *agent) setLinksState(err error) {
	if !a.capture.identifies.Load() {
		a.health.Set(health.Links, err)
	}
}

// serverConfig returns the settings of package server.
func (a *agent) serverConfig() server.Config {
	c := a.cfg.server()
	if a.capture.bpf != nil {
		c.Identified, c.IdentifyCaller = a.cfg.listenIdentified(), a.capture.identify
	}
	return c
}

func (a *agent) newServer() *server.Server {
	var onRefused func(*corev1.Pod, *metadata.Error)
	if a.events != nil {
		onRefused = a.events.Refused
	}
	return server.New(a.serverConfig(), a.requests, a.metrics, a.logs, onRefused)
}

// disableMemoryDumps prevents core dumps of this process, and access to its memory by processes without CAP_SYS_PTRACE:
// the memory contains tokens and secrets.
func disableMemoryDumps() error {
	err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	return errors.Join(err, unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
}
