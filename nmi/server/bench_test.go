package server

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// bench is a server for nmitest.Pods.
type bench struct {
	*Server
	azure *nmitest.TokenSource
	lines *observer.ObservedLogs
	facts identity.Facts
}

func newBench(t *testing.T) *bench {
	t.Helper()
	pods := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cluster.PodIndexers())
	for _, p := range nmitest.Pods() {
		if err := pods.Add(p); err != nil {
			t.Fatal(err)
		}
	}
	core, lines := observer.New(zap.InfoLevel)
	b := &bench{azure: &nmitest.TokenSource{}, lines: lines, facts: nmitest.Facts()}
	m := telemetry.NewMetrics()
	c, err := token.NewCache(b.azure, 100, func(string, token.Principal) bool { return true }, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	noPods := func(context.Context) ([]*corev1.Pod, error) { return nil, nil }
	kubernetes := nmitest.NewKubernetes(t)
	requests, err := request.New(request.Config{
		Rules:            identity.Rules{Mode: identity.Managed},
		Pods:             cluster.NewPodFinder(pods, &cluster.Broadcast{}, noPods, 50*time.Millisecond),
		PodLookupTimeout: 50 * time.Millisecond,
		Cluster:          b,
		Principals:       credentials.New(t.Context(), credentials.Config{Authority: "https://login.example", Secrets: kubernetes, OnSecretChange: kubernetes.OnSecretChange, Tokens: kubernetes, Pods: kubernetes}),
		Cache:            c,
		Metrics:          m,
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{TenantID: "the-tenant", IMDS: netip.MustParseAddrPort("127.0.0.1:1")}
	b.Server = New(cfg, requests, m, telemetry.Loggers{Main: zap.New(core), Audit: zap.NewNop()}, nil)
	return b
}

func (b *bench) Facts(*corev1.Pod) (identity.Facts, error)       { return nmitest.CopyOf(b.facts), nil }
func (b *bench) Latest(p *corev1.Pod) *corev1.Pod                { return p }
func (b *bench) WaitSynced(context.Context, time.Duration) error { return nil }
func (b *bench) StaleWatch() string                              { return "" }

func (b *bench) ask(source, target string, headers ...string) (int, map[string]string) {
	r := httptest.NewRequest(http.MethodGet, target, nil)
	r.RemoteAddr = source + ":40000"
	for _, h := range append(headers, "Metadata: true") {
		k, v, _ := strings.Cut(h, ": ")
		r.Header.Set(k, v)
	}
	w := httptest.NewRecorder()
	b.ServeHTTP(w, r)
	body := map[string]string{}
	_ = json.Unmarshal(w.Body.Bytes(), &body)
	body["Retry-After"] = w.Header().Get("Retry-After")
	return w.Code, body
}
