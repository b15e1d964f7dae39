package usage

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/podidentity/podidentity/mic/azure"
)

func TestOnlyWhatMICAttachedAndNobodyUsesIsDetached(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	const delay = 2 * time.Minute
	attached := func(ids ...string) map[string]azure.Identity {
		m := map[string]azure.Identity{}
		for _, id := range ids {
			m[id] = azure.Identity{ID: "As/Azure/spells/" + id, ClientID: "client-" + id}
		}
		return m
	}
	ledger := func(ids ...string) map[string]string {
		m := map[string]string{}
		for _, id := range ids {
			m[id] = id
		}
		return m
	}
	used := IdentityView{ID: "/A", Users: 1}
	since := func(ago time.Duration) IdentityView { return IdentityView{ID: "/A", UnusedSince: now.Add(-ago)} }
	refusedUntil := func(u IdentityView, until time.Time) IdentityView {
		u.Refusal = &Refusal{RetryAfter: until}
		return u
	}
	cases := map[string]struct {
		attached map[string]azure.Identity
		ours     map[string]string
		uses     map[string]IdentityView
		want     Plan
	}{
		"needed and missing":                      {nil, nil, map[string]IdentityView{"a": used}, Plan{Add: []string{"/A"}}},
		"needed and attached":                     {attached("a"), nil, map[string]IdentityView{"a": used}, Plan{}},
		"detached by somebody else":               {nil, ledger("a"), map[string]IdentityView{"a": used}, Plan{Add: []string{"/A"}}},
		"attached by somebody else":               {attached("a"), nil, map[string]IdentityView{"a": since(time.Hour)}, Plan{}},
		"attached by somebody else, never needed": {attached("a"), nil, nil, Plan{}},
		"unused for a long time":                  {attached("a"), ledger("a"), map[string]IdentityView{"a": since(time.Hour)}, Plan{Remove: []string{"As/Azure/spells/a"}}},
		"unused for exactly the delay":            {attached("a"), ledger("a"), map[string]IdentityView{"a": since(delay)}, Plan{Remove: []string{"As/Azure/spells/a"}}},
		"unused for less than the delay":          {attached("a"), ledger("a"), map[string]IdentityView{"a": since(time.Second)}, Plan{Next: now.Add(delay - time.Second)}},
		"unused, since an unknown time":           {attached("a"), ledger("a"), nil, Plan{Next: now.Add(delay)}},
		"unused and not attached":                 {nil, ledger("a"), map[string]IdentityView{"a": since(0)}, Plan{Prune: []string{"a"}}},
		"unused and protected":                    {attached("kubelet"), ledger("kubelet"), nil, Plan{Prune: []string{"kubelet"}}},
		"refused, the delay has not passed":       {nil, nil, map[string]IdentityView{"a": refusedUntil(used, now.Add(time.Second))}, Plan{Next: now.Add(time.Second)}},
		"refused, the delay has passed":           {nil, nil, map[string]IdentityView{"a": refusedUntil(used, now)}, Plan{Trial: []string{"/A"}}},
		"refused, another is needed":              {nil, nil, map[string]IdentityView{"a": refusedUntil(used, now.Add(time.Hour)), "b": {ID: "/B", Users: 3}}, Plan{Add: []string{"/B"}, Next: now.Add(time.Hour)}},
		"Azure refused to detach it":              {attached("a"), ledger("a"), map[string]IdentityView{"a": refusedUntil(since(time.Hour), now.Add(time.Minute))}, Plan{Next: now.Add(time.Minute)}},
		"two due later: Next is the earlier":      {attached("a", "b"), ledger("a", "b"), map[string]IdentityView{"a": since(time.Second), "b": since(time.Minute)}, Plan{Next: now.Add(time.Minute)}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got := Decide(View{Now: now, Attached: c.attached, InLedger: c.ours, Identities: c.uses, DetachDelay: delay,
				Protected: func(i azure.Identity) bool { return i.ClientID == "client-kubelet" }})
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(Plan{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}
