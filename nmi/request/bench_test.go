package request

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/metadata"
	"github.com/podidentity/podidentity/nmi/cluster"
	"github.com/podidentity/podidentity/nmi/credentials"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// bench processes the token requests of nmitest.Pods. It implements http.Handler in place of package server, and
// Cluster in place of the caches.
type bench struct {
	processor  *Processor
	metrics    *telemetry.Metrics
	azure      *nmitest.TokenSource
	facts      identity.Facts
	staleWatch string
	notSynced  error
	pods       cache.Indexer
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{azure: &nmitest.TokenSource{}, facts: nmitest.Facts(), metrics: telemetry.NewMetrics(), pods: cache.NewIndexer(cache.MetaNamespaceKeyFunc, cluster.PodIndexers())}
	for _, p := range nmitest.Pods() {
		if err := b.pods.Add(p); err != nil {
			t.Fatal(err)
		}
	}
	c, err := token.NewCache(b.azure, 100, func(string, token.Principal) bool { return true }, b.metrics)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	noPods := func(context.Context) ([]*corev1.Pod, error) { return nil, nil }
	kubernetes := nmitest.NewKubernetes(t)
	b.processor, err = New(Config{
		Rules:            identity.Rules{Mode: identity.Managed},
		Pods:             cluster.NewPodFinder(b.pods, &cluster.Broadcast{}, noPods, 50*time.Millisecond),
		PodLookupTimeout: 50 * time.Millisecond,
		Cluster:          b,
		Principals:       credentials.New(t.Context(), credentials.Config{Authority: "https://login.example", Secrets: kubernetes, OnSecretChange: kubernetes.OnSecretChange, Tokens: kubernetes, Pods: kubernetes}),
		Cache:            c,
		Metrics:          b.metrics,
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) Facts(*corev1.Pod) (identity.Facts, error)       { return nmitest.CopyOf(b.facts), nil }
func (b *bench) Latest(p *corev1.Pod) *corev1.Pod                { return p }
func (b *bench) WaitSynced(context.Context, time.Duration) error { return b.notSynced }
func (b *bench) StaleWatch() string                              { return b.staleWatch }

func (b *bench) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var tokens []metadata.TokenResponse
	req, refusal := metadata.Parse(r, metadata.Rules{})
	if refusal == nil {
		tokens, refusal = b.processor.ForCaller(r.Context(), &Record{}, Caller{Address: netip.MustParseAddrPort(r.RemoteAddr).Addr()}, req)
	}
	switch {
	case refusal != nil:
		refusal.Write(w)
	case len(tokens) > 1:
		metadata.WriteTokens(w, tokens, time.Now())
	default:
		tokens[0].Write(w, time.Now())
	}
}

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

func (b *bench) podOf(ip string) *corev1.Pod {
	found, err := b.pods.ByIndex("ip", ip)
	if err != nil || len(found) != 1 {
		panic(fmt.Sprintf("%d pods with address %s: %v", len(found), ip, err))
	}
	return found[0].(*corev1.Pod)
}
