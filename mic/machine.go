package mic

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"time"

	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/ledger"
	"github.com/podidentity/podidentity/mic/usage"
)

// machine is the state that the reconcile of one VM or VMSS keeps for the next reconcile. One worker at a time
// reconciles a machine, and preview uses it without workers, so it needs no lock.
type machine struct {
	usage    *usage.Machine
	resource azure.Resource
	ledger   *ledger.Ledger // nil if it must be read: at first, and after a write failed with ErrOvertaken
	azure    azure.State    // as Azure reported it last
	// refreshAt is when the state must be read from Azure again, at the latest.
	refreshAt time.Time
	updatedAt time.Time // when a reconcile last began to send updates
	failures  int       // consecutive failed reconciles
}

// loadLedger reads the ledger unless it is known.
func (m *machine) loadLedger(ctx context.Context, store typedcorev1.ConfigMapInterface) error {
	if m.ledger != nil {
		return nil
	}
	l, err := ledger.Read(ctx, store, m.usage.Key, m.resource.ID())
	if err != nil {
		return err
	}
	m.ledger = l
	m.usage.SetLedger(l.Attached)
	return nil
}

// writeLedger writes next to the ledger, unless that would change nothing. If the error is ledger.ErrOvertaken, the
// next reconcile reads the ledger again.
func (m *machine) writeLedger(ctx context.Context, next ledger.Entries) error {
	l := m.ledger
	if l.Same(next) {
		return nil
	}
	if err := l.Write(ctx, next); err != nil {
		if errors.Is(err, ledger.ErrOvertaken) {
			m.ledger = nil
		}
		return err
	}
	m.usage.SetLedger(l.Attached)
	return nil
}

// recordOutcome removes from the ledger the update, and each identity of the update that the machine does not have. The
// caller must have observed the state of the machine after the end of the update, or after maxUpdateTime.
func (m *machine) recordOutcome(ctx context.Context) error {
	return m.writeLedger(ctx, m.ledger.End(m.azure.Identities))
}

// observe records the state that Azure reported. The next check of the machine is due after the interval or up to a
// tenth earlier, at random, so that not all machines are checked at the same time.
func (m *machine) observe(state azure.State, interval time.Duration) {
	early := time.Duration(rand.Int64N(int64(interval / 10)))
	m.azure, m.refreshAt = state, time.Now().Add(interval-early)
	m.usage.Observe(state.Identities, m.updating())
}

// updating reports whether Azure is updating the machine, for MIC or for somebody else.
func (m *machine) updating() bool { return strings.EqualFold(m.azure.ProvisioningState, "Updating") }

// requeueAfter returns the delay until the next reconcile of a machine that needs no update now.
func (m *machine) requeueAfter(p usage.Plan) time.Duration {
	next := m.refreshAt
	if m.updating() {
		next = time.Now().Add(pause)
	}
	if !p.Next.IsZero() && p.Next.Before(next) {
		next = p.Next
	}
	return max(time.Until(next), time.Millisecond)
}
