package mic

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/podidentity/podidentity/internal/retry"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/cluster"
	"github.com/podidentity/podidentity/mic/telemetry"
	"github.com/podidentity/podidentity/mic/usage"
)

const (
	// pause is the minimum time between two reconciles that update the same machine, counted from when each begins to
	// send updates. An update takes Azure 10 to 60 s, so the pause rarely delays the next update. After a shorter
	// update, the pause makes sure that a burst of pods that lasts some seconds takes only two updates. Azure allows
	// twelve updates of a machine in a row, and four a minute after that. With one update for each reconcile MIC sends
	// at most six a minute, so Azure throttles MIC only after several minutes of continuous updates.
	//
	// If a reconcile succeeds while Azure is updating the machine, the next one starts after pause at the latest.
	pause = 10 * time.Second
	// maxConflicts is the maximum number of times that one reconcile plans updates and sends them. The reconcile plans
	// again after an error of class Conflict.
	maxConflicts = 4
	// maxText is the maximum length in bytes of a text for an Event or a status: the API server accepts 1024 bytes in an
	// Event.
	maxText = 900
)

// The delays after consecutive failures of a reconcile. transientBackoff is for class Unavailable and for failures
// outside of Azure, most of them of the API server. conflictBackoff is for class Conflict. deniedBackoff is for the
// classes for which handleError has no case, such as Denied. An operator has to correct most of their causes.
var (
	transientBackoff = retry.Backoff{Initial: 2 * time.Second, Max: time.Minute}
	conflictBackoff  = retry.Backoff{Initial: pause / 2, Max: time.Minute}
	deniedBackoff    = retry.Backoff{Initial: 30 * time.Second, Max: 10 * time.Minute}
)

// machineReconciler attaches to each VM or VMSS what the pods on it need, and detaches what MIC attached and no pod
// there needs.
type machineReconciler struct {
	interval    time.Duration // between checks of a machine
	detachDelay time.Duration
	immutable   []string // client IDs of identities that are never detached
	drain       bool     // detach without waiting for disconnected watches; see Uninstall

	usage   *usage.Tracker
	ledgers typedcorev1.ConfigMapInterface
	cluster *cluster.Cluster
	updater *updater
	report  *telemetry.Reporter
	metrics *telemetry.Metrics

	mu       sync.Mutex
	machines map[string]*machine // by key; mu guards the map, but not the machines in it
}

// machine returns the state of a machine, or nil if the Tracker does not know it.
func (r *machineReconciler) machine(key string) *machine {
	u := r.usage.Machine(key)
	if u == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.machines[key]
	if m == nil {
		m = &machine{usage: u, resource: u.Resource}
		r.machines[key] = m
	}
	return m
}

func (r *machineReconciler) forget(key string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.machines, key)
}

// reconcile reconciles one machine. It returns the delay after which it must be called again at the latest, or 0 if
// there is nothing to do for the machine any more or ctx has ended. Its error is always nil.
func (r *machineReconciler) reconcile(ctx context.Context, key string) (time.Duration, error) {
	m := r.machine(key)
	if m == nil {
		return 0, nil
	}
	if delay := m.usage.RetryDelay(); delay > 0 {
		return delay, nil
	}
	start := time.Now()
	defer func() { r.metrics.Reconciled(time.Since(start)) }()
	requeueAfter, err := r.ensureIdentities(ctx, m)
	if err == nil {
		m.failures = 0
		r.report.MachineResult(key, nil)
		if m.usage.Drop(m.ledger == nil || m.ledger.Stored()) {
			r.forget(key)
			return 0, nil
		}
		return min(cmp.Or(requeueAfter, r.interval), r.interval), nil
	}
	if ctx.Err() != nil {
		return 0, nil
	}
	m.failures++
	delay := r.handleError(m, err)
	m.usage.SetRetryAfter(delay)
	return delay, nil
}

// handleError returns the delay until the next attempt after a failed reconcile. It logs the error if it differs from
// the last one. If somebody may have to correct the cause, handleError also reports the cause to the pods that wait.
func (r *machineReconciler) handleError(m *machine, err error) time.Duration {
	r.report.MachineResult(m.usage.Key, err)
	var e *azure.Error
	if !errors.As(err, &e) {
		return transientBackoff.After(m.failures) // the error is not from Azure; most such errors are from the API server
	}
	switch e.Class {
	case azure.Throttled:
		return retry.Jitter(max(e.RetryAfter, time.Second))
	case azure.Conflict:
		return conflictBackoff.After(m.failures)
	case azure.Unavailable:
		if m.failures >= 3 {
			m.usage.SetProblem(explain(m.resource, e))
		}
		return max(transientBackoff.After(m.failures), e.RetryAfter)
	case azure.NotFound:
		m.usage.SetProblem(explain(m.resource, e))
		return r.interval
	}
	m.usage.SetProblem(explain(m.resource, e))
	return max(deniedBackoff.After(m.failures), e.RetryAfter)
}

// ensureIdentities plans the updates of a machine and sends them. After a conflict it plans and sends again, at most
// maxConflicts times in all. It returns the delay until the next reconcile; 0 means the interval between checks.
func (r *machineReconciler) ensureIdentities(ctx context.Context, m *machine) (time.Duration, error) {
	if err := m.loadLedger(ctx, r.ledgers); err != nil {
		return 0, err
	}
	if requeueAfter, err := r.updater.resume(ctx, m); err != nil || requeueAfter > 0 {
		return requeueAfter, err
	}
	if adopted := m.usage.Adopted(); len(adopted) > 0 { // from assignments of AAD Pod Identity
		if err := m.writeLedger(ctx, m.ledger.With(adopted)); err != nil {
			return 0, err
		}
	}
	if !m.usage.Known() || m.updating() || !time.Now().Before(m.refreshAt) {
		if err := r.updater.refresh(ctx, m); err != nil {
			return 0, err
		}
	}
	var err error
	for i := range maxConflicts {
		p := r.plan(m)
		if err := m.writeLedger(ctx, m.ledger.Without(p.Prune)); err != nil {
			return 0, err
		}
		if p.Empty() {
			m.usage.ResetGather()
			return m.requeueAfter(p), nil
		}
		if delay := max(pause-time.Since(m.updatedAt), m.usage.GatherDelay()); i == 0 && delay > 0 {
			return delay, nil
		}
		// The update must be planned from the current state.
		if err := r.updater.refresh(ctx, m); err != nil {
			return 0, err
		}
		if p = r.plan(m); p.Empty() {
			continue
		}
		if err = r.updater.apply(ctx, m, p); !isClass(err, azure.Conflict) {
			if err != nil {
				return 0, err
			}
			return time.Millisecond, nil // demands may have come during the update
		}
		if m.updating() || m.ledger.Update != nil || !m.usage.Known() {
			break // an update is in progress, or the state is not known: the next reconcile first reads the state
		}
	}
	return 0, err
}

func (r *machineReconciler) plan(m *machine) usage.Plan {
	v := m.usage.View()
	v.Attached = m.azure.Identities
	v.Now, v.DetachDelay, v.Protected = time.Now(), r.detachDelay, r.protected()
	v.InLedger = m.ledger.Attached
	p := usage.Decide(v)
	if len(p.Remove) > 0 && !r.drain && r.cluster.Behind() {
		// The caches may lack a new pod that needs one of these identities.
		p.Remove, p.Next = nil, v.Now.Add(cluster.CatchUpTime)
	}
	return p
}

// protected returns a function that reports whether an identity is protected: MIC must never detach it, no matter who
// attached it. --immutable-user-msis and the configuration for Azure name the protected identities.
func (r *machineReconciler) protected() func(azure.Identity) bool {
	list := slices.Concat(r.immutable, r.updater.arm.OwnIdentities())
	return func(i azure.Identity) bool {
		return slices.ContainsFunc(list, func(id string) bool {
			return strings.EqualFold(id, i.ClientID) || azure.Fold(id) == azure.Fold(i.ID)
		})
	}
}

func isClass(err error, class azure.Class) bool {
	var e *azure.Error
	return errors.As(err, &e) && e.Class == class
}
