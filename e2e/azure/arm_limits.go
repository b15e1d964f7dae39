package azure

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// armLimits are the token buckets of Azure's compute throttling by name: one for each
// machine and policy, and one for each subscription and policy. In Azure, a subscription
// has a bucket for each policy and region; the fake ARM has only one region. Each full
// minute after the first use of a bucket adds tokens to it. A throttled request takes no
// token.
type armLimits map[string]*bucket

type bucket struct {
	rate, capacity int // tokens added each minute, and maximum of tokens
	tokens         int
	filled         time.Time
}

// armPolicy is one row of Azure's table of limits.
type armPolicy struct {
	name                 string
	rate, capacity       int // of one machine
	rateAll, capacityAll int // of the subscription
}

// Azure's table has no row for polls of a scale set's operations. The fake ARM uses
// the row for polls of a virtual machine's operations.
var armPolicies = map[string]map[string]armPolicy{
	KindVM: {
		OpPatch: {"UpdateVM", 4, 12, 500, 1500},
		OpGet:   {"LowCostGetVM", 12, 36, 8000, 24000},
		OpPoll:  {"GetOperation", 15, 45, 5000, 15000},
	},
	KindVMSS: {
		OpPatch: {"UpdateVMScaleSet", 4, 12, 500, 1500},
		OpGet:   {"LowCostGetVMScaleSet", 12, 36, 800, 2400},
		OpPoll:  {"GetOperation", 15, 45, 5000, 15000},
	},
}

func (l armLimits) bucket(name string, rate, capacity int, now time.Time) *bucket {
	b, ok := l[name]
	if !ok {
		b = &bucket{rate: rate, capacity: capacity, tokens: capacity, filled: now}
		l[name] = b
	}
	if minutes := int(now.Sub(b.filled) / time.Minute); minutes > 0 {
		b.tokens = min(b.capacity, b.tokens+minutes*b.rate)
		b.filled = b.filled.Add(time.Duration(minutes) * time.Minute)
	}
	return b
}

type throttling struct {
	armError
	retryAfter string
}

// admit takes one token from the bucket of the request's machine and one from the bucket
// of its subscription. It takes tokens also while limits are not enforced, so that the
// buckets are right when a test enables the limits later. It returns the numbers of
// remaining tokens, for the response header, or the refusal. For an unknown machine it
// takes no tokens and returns "" and nil. The caller holds a.mu.
func (a *ARM) admit(x *armRequestContext) (remaining string, refused *throttling) {
	if _, exists := a.machines[x.machine.key()]; !exists {
		return "", nil
	}
	now, p := a.o.Now(), armPolicies[x.machine.kind][x.entry.Operation]
	buckets := []*bucket{
		a.limits.bucket(p.name+" "+x.machine.key(), p.rate, p.capacity, now),
		a.limits.bucket(p.name+" "+strings.ToLower(x.machine.subscription), p.rateAll, p.capacityAll, now),
	}
	for i, b := range buckets {
		if b.tokens <= 0 && a.settings.Limits {
			return "", refusal429(p.name, []string{"resource", "subscription"}[i], b, now)
		}
	}
	for _, b := range buckets {
		b.tokens = max(0, b.tokens-1)
	}
	return fmt.Sprintf("Microsoft.Compute/%[1]sResource;%[2]d,Microsoft.Compute/%[1]sSubscription;%[3]d",
		p.name, buckets[0].tokens, buckets[1].tokens), nil
}

func refusal429(policy, scope string, b *bucket, now time.Time) *throttling {
	next := b.filled.Add(time.Minute)
	seconds := max(1, int((next.Sub(now)+time.Second-1)/time.Second))
	about := encode(map[string]any{
		"operationGroup": policy, "startTime": b.filled.UTC().Format(armTime), "endTime": next.UTC().Format(armTime), "allowedRequestCount": b.capacity,
	})
	return &throttling{retryAfter: strconv.Itoa(seconds), armError: armError{
		Status: http.StatusTooManyRequests, Code: "OperationNotAllowed",
		Message: "The server rejected the request because too many requests have been received for this " + scope + ".",
		Details: []armError{{Code: "TooManyRequests", Target: policy, Message: string(about)}},
	}}
}
