package mic

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/cluster"
	"github.com/podidentity/podidentity/mic/ledger"
	"github.com/podidentity/podidentity/mic/telemetry"
	"github.com/podidentity/podidentity/mic/usage"
)

const (
	// maxSendDelay is the longest time from the start of the write of the ledger until MIC sends the update. If more
	// time has passed, because the process was paused or the write was slow, MIC does not send the update: another
	// process may have become the leader and have assigned to a pod what this update detaches.
	maxSendDelay = 5 * time.Second
	// maxUpdateTime is the age of an update from which MIC does not repeat its wait for the end of the update. If a
	// wait fails at this age or later, MIC takes the state of the machine as the result. One wait takes at most
	// azure.Options.MaxPollTime.
	maxUpdateTime = 20 * time.Minute
)

// updater calls Azure Resource Manager for the reconciles of machines. The order of the steps of an update protects the
// machine: MIC first writes to the ledger everything that the update may leave attached, then sends the update, and
// then writes the token of the operation to the ledger. When MIC knows the end of the update, it writes the result.
type updater struct {
	arm        Machines
	cluster    *cluster.Cluster
	interval   time.Duration // between checks of a machine
	requeuePod func(key string)
	log        *zap.Logger
}

// refresh asks Azure for the state of a machine and records it. If the machine does not exist and has no nodes,
// refresh deletes the ledger of the machine. If the machine does not exist but has nodes, or is being deleted,
// refresh returns an error of class NotFound.
func (u *updater) refresh(ctx context.Context, m *machine) error {
	state, err := u.arm.Get(ctx, m.resource)
	if isClass(err, azure.NotFound) {
		m.observe(azure.State{}, u.interval)
		if len(u.cluster.NodesOf(m.usage.Key)) > 0 {
			return err // it has nodes, so it probably exists, and MIC's credential may be for another tenant or cloud
		}
		return m.writeLedger(ctx, ledger.Entries{Machine: m.resource.ID(), Attached: map[string]string{}})
	}
	if err != nil {
		return err
	}
	if strings.EqualFold(state.ProvisioningState, "Deleting") {
		return &azure.Error{Class: azure.NotFound, Operation: m.resource.Kind.String() + "_get", Message: "Azure is deleting the machine"}
	}
	m.observe(state, u.interval)
	return nil
}

// apply updates a machine as planned. It attaches the identities that Azure refused before (p.Trial) after all
// others, in updates that contain only such identities.
func (u *updater) apply(ctx context.Context, m *machine, p usage.Plan) error {
	m.updatedAt = time.Now()
	m.usage.ResetGather()
	p.Remove = u.confirmUnused(m, p.Remove)
	for len(p.Add)+len(p.Remove) > 0 {
		add := p.Add[:min(len(p.Add), azure.MaxIdentities)]
		remove := p.Remove[:min(len(p.Remove), azure.MaxIdentities-len(add))]
		if err := u.applyBisecting(ctx, m, add, remove); err != nil {
			return err
		}
		p.Add, p.Remove = p.Add[len(add):], p.Remove[len(remove):]
	}
	for trial := range slices.Chunk(p.Trial, azure.MaxIdentities) {
		if err := u.applyBisecting(ctx, m, trial, nil); err != nil {
			return err
		}
	}
	return nil
}

// confirmUnused checks the pods of the machine again before anything is detached: if the Tracker were wrong, a pod
// would lose its identity. It returns the identities of remove that no pod uses. For each other identity of remove it
// requeues a pod that uses the identity.
func (u *updater) confirmUnused(m *machine, remove []string) []string {
	if len(remove) == 0 {
		return nil
	}
	used := map[string]string{}
	for _, n := range u.cluster.NodesOf(m.usage.Key) {
		for _, p := range u.cluster.PodsOn(n.Name) {
			for _, d := range u.cluster.Desired(p).Assignments {
				used[d.ResourceID] = p.Key()
			}
		}
	}
	return slices.DeleteFunc(remove, func(id string) bool {
		pod, isUsed := used[azure.Fold(id)]
		if isUsed {
			u.log.Warn("not detaching the identity: a pod started to use it", zap.String(telemetry.KeyMachine, m.resource.ID()), zap.String(telemetry.KeyIdentity, id), zap.String(telemetry.KeyPod, pod))
			u.requeuePod(pod)
		}
		return isUsed
	})
}

// applyBisecting updates a machine. If Azure refuses the update because of some of its identities and names them,
// applyBisecting sets these identities aside and sends the others. If Azure names none and the update has one identity,
// applyBisecting sets this identity aside. If Azure names none of several identities, applyBisecting splits the update
// in two: additions and removals, or two halves if there are only additions or only removals.
func (u *updater) applyBisecting(ctx context.Context, m *machine, add, remove []string) error {
	for len(add)+len(remove) > 0 {
		err := u.patch(ctx, m, add, remove)
		if !isClass(err, azure.BadIdentity) {
			return err
		}
		var e *azure.Error
		errors.As(err, &e)
		refused := func(id string) bool { return slices.Contains(e.Identities, azure.Fold(id)) }
		switch {
		case slices.ContainsFunc(add, refused) || slices.ContainsFunc(remove, refused):
			for _, id := range slices.Concat(add, remove) {
				if refused(id) {
					u.setAside(m, id, e)
				}
			}
			add, remove = slices.DeleteFunc(slices.Clone(add), refused), slices.DeleteFunc(slices.Clone(remove), refused)
		case len(add)+len(remove) == 1:
			u.setAside(m, slices.Concat(add, remove)[0], e)
			return nil
		default:
			firstAdd, firstRemove := add, []string(nil)
			if len(remove) == 0 {
				firstAdd = add[:len(add)/2]
			} else if len(add) == 0 {
				firstRemove = remove[:len(remove)/2]
			}
			if err := u.applyBisecting(ctx, m, firstAdd, firstRemove); err != nil {
				return err
			}
			add, remove = add[len(firstAdd):], remove[len(firstRemove):]
		}
	}
	return nil
}

// setAside records that Azure refused to attach or detach an identity. MIC retries after a delay. If the identity must
// be attached, MIC uses a separate update, which contains only identities that are set aside. If the identity must be
// detached, MIC does so in the regular update of the machine, together with the other changes.
func (u *updater) setAside(m *machine, id string, e *azure.Error) {
	message := explainRefused(m.resource, id, e)
	retryAfter, times := m.usage.SetAside(azure.Fold(id), message)
	u.log.Warn("Azure refuses an identity; MIC sets it aside and retries it later", zap.String(telemetry.KeyMachine, m.resource.ID()), zap.String(telemetry.KeyIdentity, id),
		zap.String(telemetry.KeyDetail, message), zap.Int("times", times), zap.Time("next_try", retryAfter))
}

// patch does one update of a machine: it writes the ledger, sends the update to Azure, and handles the result.
func (u *updater) patch(ctx context.Context, m *machine, add, remove []string) error {
	remove = m.usage.StartDetaching(remove) // omits the identities that a pod started to use
	if len(add)+len(remove) == 0 {
		return nil
	}
	before := m.ledger.Clone()
	next := m.ledger.Begin(time.Now(), add, remove)
	if err := m.writeLedger(ctx, next); err != nil {
		m.usage.MarkUnknown()
		return err
	}
	if delay := time.Since(next.Update.Started); delay > maxSendDelay {
		m.usage.MarkUnknown()
		return fmt.Errorf("MIC did not send the update of %s: the write of the ledger took %s, more than %s, and another process may have become the leader; MIC reads the state of the machine again and retries",
			m.resource.ID(), delay.Round(time.Millisecond), maxSendDelay)
	}
	u.log.Info("updating the identities of a machine", zap.String(telemetry.KeyMachine, m.resource.ID()), zap.Strings("attach", add), zap.Strings("detach", remove))
	op, err := u.arm.Begin(ctx, m.resource, m.azure, add, remove)
	if err == nil {
		if token := op.Token(); token != "" {
			next.Update.Token = token
			if err := m.writeLedger(ctx, next); err != nil {
				m.usage.MarkUnknown()
				return err
			}
		}
		var state azure.State
		if state, err = op.Wait(ctx); err == nil {
			return u.handleSuccess(ctx, m, state)
		}
	}
	m.usage.MarkUnknown()
	return u.handleFailure(ctx, m, op, before, err)
}

// handleSuccess records a finished update. Operation.Wait also succeeds for an operation that Azure does not know any
// more, whose update may still be in progress. So handleSuccess first compares the state of the machine with the
// update.
func (u *updater) handleSuccess(ctx context.Context, m *machine, state azure.State) error {
	m.observe(state, u.interval)
	update := m.ledger.Update
	present := func(id string) bool { _, ok := state.Identities[azure.Fold(id)]; return ok }
	missing := func(id string) bool { return !present(id) }
	if m.updating() && (slices.ContainsFunc(update.Add, missing) || slices.ContainsFunc(update.Remove, present)) {
		m.usage.MarkUnknown()
		return fmt.Errorf("the update of %s is not complete: Azure is still updating the machine, and some identities are not attached or detached yet; MIC reads the state of the machine again", m.resource.ID())
	}
	u.log.Info("updated the identities of a machine", zap.String(telemetry.KeyMachine, m.resource.ID()), zap.Duration("took", time.Since(update.Started)))
	return m.recordOutcome(ctx)
}

// handleFailure records a failed update. It returns err, or the error with which it failed to write the ledger or to
// read the machine. If Azure refused the request, Azure changed nothing, and handleFailure writes the ledger as it was
// before. If an operation began and failed, handleFailure reads the state of the machine and records which identities
// of the update the machine has. An update that may still be in progress stays in the ledger, so that the next
// reconcile first waits for its end.
func (u *updater) handleFailure(ctx context.Context, m *machine, op *azure.Operation, before ledger.Entries, err error) error {
	if op != nil && op.Token() != "" || op == nil && mayHaveBegun(err) {
		return err
	}
	if op == nil {
		before.Update = nil
		if failed := m.writeLedger(ctx, before); failed != nil {
			return failed
		}
		if isClass(err, azure.Throttled) {
			return err
		}
	}
	if failed := u.refresh(ctx, m); failed != nil {
		return failed
	}
	if op == nil {
		return err
	}
	if m.updating() {
		m.usage.MarkUnknown() // Azure may still perform the update, although it reported a failure
		return err
	}
	if failed := m.recordOutcome(ctx); failed != nil {
		return failed
	}
	return err
}

// mayHaveBegun reports whether Azure may have accepted an update although sending it failed.
func mayHaveBegun(err error) bool {
	var e *azure.Error
	return !errors.As(err, &e) || e.Class == azure.Unavailable
}

// resume waits for the end of the update in the ledger, if any: another process started it, or this process did not
// learn its result. A delay above zero means that the update may still be in progress.
func (u *updater) resume(ctx context.Context, m *machine) (time.Duration, error) {
	update := m.ledger.Update
	if update == nil {
		return 0, nil
	}
	m.usage.MarkUnknown()
	if update.Token != "" {
		u.log.Info("waiting for the end of an update that is in the ledger", zap.String(telemetry.KeyMachine, m.resource.ID()), zap.Time("began", update.Started))
		op, err := u.arm.Resume(ctx, m.resource, update.Token)
		if err == nil {
			_, err = op.Wait(ctx)
		}
		// If the operation has ended or its token is unusable, the state of the machine shows the result. After
		// maxUpdateTime MIC reads the state even if the operation is still in progress.
		inProgress := op == nil && !isClass(err, azure.Invalid) || op != nil && op.Token() != ""
		if inProgress && (ctx.Err() != nil || time.Since(update.Started) < maxUpdateTime) {
			return 0, err
		}
	}
	if err := u.refresh(ctx, m); err != nil {
		return 0, err
	}
	if m.updating() && time.Since(update.Started) < maxUpdateTime {
		m.usage.MarkUnknown()
		return pause / 2, nil
	}
	return 0, m.recordOutcome(ctx)
}
