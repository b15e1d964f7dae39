package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// mostCold is how many newcomers of each source there are pods for, but for the one that comes last.
var mostCold = (pods - 1) / len(sources)

// coldPause is the time between two first tokens. In it the API server gets around to counting what it was asked, and
// the gate before IMDS lets the next one pass at once.
const coldPause = 100 * time.Millisecond

// first is what the first token of one identity took.
type first struct {
	took time.Duration
	cost calls
}

// cold measures the first token of n identities of each source: none is in NMI's cache, no credential is made, no Secret
// read and nothing known about the tenant for it, and the pod has never asked for it. One is asked for at a time, and
// the sources take turns, so that noise meets all alike.
func (r *rig) cold(ctx context.Context, n int) (map[string][]first, error) {
	k, err := newClients(r.cluster)
	if err != nil {
		return nil, err
	}
	newcomers, err := r.admitAll(ctx, k, n)
	if err != nil {
		return nil, err
	}
	before, err := r.calls(ctx, k)
	if err != nil {
		return nil, err
	}
	all := map[string][]first{}
	for _, one := range newcomers {
		took, err := r.askFirst(ctx, one)
		if err != nil {
			return nil, fmt.Errorf("first token of %s (%s): %w", one.name(), one.source, err)
		}
		time.Sleep(coldPause)
		after, err := r.calls(ctx, k)
		if err != nil {
			return nil, err
		}
		all[one.source] = append(all[one.source], first{took, after.minus(before)})
		before = after
	}
	return all, nil
}

// admitAll makes the newcomers, and returns when NMI knows of all of them, though it was asked for none of their tokens:
// of each kind of object it hears in the order of changes, so it is enough that it knows one more that came last.
func (r *rig) admitAll(ctx context.Context, k clients, n int) ([]newcomer, error) {
	p, err := r.newProofs(ctx)
	if err != nil {
		return nil, err
	}
	var newcomers []newcomer
	for i := range n * len(sources) {
		newcomers = append(newcomers, p.newcomer(sources[i%len(sources)], i))
	}
	if err := inParallel(len(newcomers), func(i int) error { return r.admit(ctx, k, newcomers[i]) }); err != nil {
		return nil, err
	}
	last := p.newcomer(managed, len(newcomers))
	if err := r.admit(ctx, k, last); err != nil {
		return nil, err
	}
	for range 300 {
		if _, err = r.askFirst(ctx, last); err == nil {
			return newcomers, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil, fmt.Errorf("NMI does not know of the new identities after half a minute: %w", err)
}

// askFirst asks for the newcomer's token, over a new connection, and says how long that took.
func (r *rig) askFirst(ctx context.Context, n newcomer) (time.Duration, error) {
	client := r.nmi.client(n.pod)
	defer client.http.CloseIdleConnections()
	began := time.Now()
	body, err := client.once(ctx)
	took := time.Since(began)
	if err != nil {
		return 0, err
	}
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return 0, err
	}
	claims, err := r.azure.Verify(answer.AccessToken)
	if err != nil {
		return 0, err
	}
	if !strings.EqualFold(claims.AppID, n.id.ClientID) {
		return 0, fmt.Errorf("the token is one of %s, not of %s", claims.AppID, n.id.ClientID)
	}
	return took, nil
}

// tellCold prints and notes what the first tokens took. Of so few the p99 is the slowest but one.
func tellCold(figures map[string]float64, all map[string][]first) {
	say("\ncold token, the first of an identity; %d of each source, one at a time, and the calls that one costs\n", len(all[managed]))
	say("%12s  %8s %8s   %19s   %14s   %5s", "", "", "", "API server", "Entra ID", "")
	say("%12s  %8s %8s   %7s %11s   %6s %7s   %5s", "source", "p50", "p99", "Secrets", "its tokens", "tenant", "tokens", "IMDS")
	for _, source := range sources {
		var took []time.Duration
		var cost calls
		for _, f := range all[source] {
			took, cost = append(took, f.took), cost.plus(f.cost)
		}
		slices.Sort(took)
		p50, p99 := quantile(took, .5), quantile(took, .99)
		each := func(n int) float64 { return float64(n) / float64(len(took)) }
		say("%12s  %8s %8s   %7.2f %11.2f   %6.2f %7.2f   %5.2f", source, p50, p99,
			each(cost.secrets), each(cost.assertions), each(cost.documents), each(cost.tokens), each(cost.imds))
		key := "token.cold." + source
		figures[key+".p50_ms"] = float64(p50.Microseconds()) / 1000
		figures[key+".p99_ms"] = float64(p99.Microseconds()) / 1000
		figures[key+".api_calls"] = each(cost.secrets + cost.assertions)
		figures[key+".entra_calls"] = each(cost.documents + cost.tokens + cost.otherEntra)
		figures[key+".imds_calls"] = each(cost.imds)
	}
}
