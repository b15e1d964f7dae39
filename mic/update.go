package mic

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/internal/text"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/ledger"
)

// carryOut changes the machine. Identities that Azure refused before are tried by themselves, after the others.
func (c *Controller) carryOut(ctx context.Context, key string, m *Machine, p plan) error {
	m.state.patched = time.Now()
	c.fleet.ResetGather(key)
	p.Remove = c.confirmUnused(key, m, p.Remove)
	for len(p.Add)+len(p.Remove) > 0 {
		add := p.Add[:min(len(p.Add), azure.MaxIdentities)]
		remove := p.Remove[:min(len(p.Remove), azure.MaxIdentities-len(add))]
		if err := c.change(ctx, key, m, add, remove); err != nil {
			return err
		}
		p.Add, p.Remove = p.Add[len(add):], p.Remove[len(remove):]
	}
	for trial := range slices.Chunk(p.Trial, azure.MaxIdentities) {
		if err := c.change(ctx, key, m, trial, nil); err != nil {
			return err
		}
	}
	return nil
}

// confirmUnused looks through the pods of the machine before something is taken from it. That the fleet counted wrong
// would be a fault of ours; a pod that loses its identity is not to be how it is found out.
func (c *Controller) confirmUnused(key string, m *Machine, remove []string) []string {
	if len(remove) == 0 {
		return nil
	}
	used := map[string]string{}
	for _, n := range kube.ByIndex[*Node](c.cluster.nodes, byMachine, key) {
		for _, p := range kube.ByIndex[*Pod](c.cluster.pods, byNode, n.Name) {
			for _, d := range c.desired(p).assignments {
				used[d.resource] = p.Key()
			}
		}
	}
	return slices.DeleteFunc(remove, func(id string) bool {
		pod, isUsed := used[azure.Fold(id)]
		if isUsed {
			c.log.Warn("an identity is not detached: a pod has come to want it", zap.String(keyMachine, m.resource.ID()), zap.String(keyIdentity, id), zap.String(keyPod, pod))
			c.wakePod(pod)
		}
		return isUsed
	})
}

// change sends updates until all that can be done is done: without those identities that Azure refuses. If it does not
// say which it refuses, halves are tried.
func (c *Controller) change(ctx context.Context, key string, m *Machine, add, remove []string) error {
	for len(add)+len(remove) > 0 {
		err := c.patch(ctx, key, m, add, remove)
		if !isClass(err, azure.BadIdentity) {
			return err
		}
		var e *azure.Error
		errors.As(err, &e)
		named := func(id string) bool { return slices.Contains(e.Identities, azure.Fold(id)) }
		switch {
		case slices.ContainsFunc(add, named) || slices.ContainsFunc(remove, named):
			for _, id := range slices.Concat(add, remove) {
				if named(id) {
					c.setAside(key, m, id, e)
				}
			}
			add, remove = slices.DeleteFunc(slices.Clone(add), named), slices.DeleteFunc(slices.Clone(remove), named)
		case len(add)+len(remove) == 1:
			c.setAside(key, m, slices.Concat(add, remove)[0], e)
			return nil
		default:
			firstAdd, firstRemove := add, []string(nil)
			if len(remove) == 0 {
				firstAdd = add[:len(add)/2]
			} else if len(add) == 0 {
				firstRemove = remove[:len(remove)/2]
			}
			if err := c.change(ctx, key, m, firstAdd, firstRemove); err != nil {
				return err
			}
			add, remove = add[len(firstAdd):], remove[len(firstRemove):]
		}
	}
	return nil
}

// setAside notes that Azure refuses an identity.
func (c *Controller) setAside(key string, m *Machine, id string, e *azure.Error) {
	message := explainRefused(m.resource, id, e)
	until, times := c.fleet.SetAside(key, azure.Fold(id), message)
	c.log.Warn("Azure refuses an identity; it is set aside", zap.String(keyMachine, m.resource.ID()), zap.String(keyIdentity, id),
		zap.String(keyDetail, message), zap.Int("times", times), zap.Time("next_try", until))
}

// patch is one update of the machine, from the note in the ledger to its end.
func (c *Controller) patch(ctx context.Context, key string, m *Machine, add, remove []string) error {
	s := &m.state
	remove = c.fleet.StartDetaching(key, remove) // without those that a pod has come to want
	if len(add)+len(remove) == 0 {
		return nil
	}
	before := s.ledger.Clone()
	next := s.ledger.Clone()
	// Without the monotonic clock, which a machine that is suspended may stop.
	next.Update = &ledger.Update{Started: time.Now().Round(0), Add: add, Remove: remove}
	for _, id := range add {
		next.Attached[azure.Fold(id)] = id
	}
	if err := c.note(ctx, key, m, next); err != nil {
		c.fleet.MarkUnknown(key)
		return err
	}
	if time.Since(next.Update.Started) > standstill {
		c.fleet.MarkUnknown(key)
		return fmt.Errorf("this process stood still for %s while it was about to change %s; it looks anew", time.Since(next.Update.Started), m.resource.ID())
	}
	c.log.Info("changing the identities of a machine", zap.String(keyMachine, m.resource.ID()), zap.Strings("attach", add), zap.Strings("detach", remove))
	op, err := c.arm.Begin(ctx, m.resource, s.azure, add, remove)
	if err == nil {
		if token := op.Token(); token != "" {
			next.Update.Token = token
			if err := c.note(ctx, key, m, next); err != nil {
				c.fleet.MarkUnknown(key)
				return err
			}
		}
		var state azure.State
		if state, err = op.Wait(ctx); err == nil {
			return c.endWell(ctx, key, m, state)
		}
	}
	c.fleet.MarkUnknown(key)
	return c.endBadly(ctx, key, m, op, before, err)
}

// endWell is what follows from an update that Azure has under way no more, as it says. It says so too of one that it has
// lost sight of, which may go on all the same.
func (c *Controller) endWell(ctx context.Context, key string, m *Machine, state azure.State) error {
	c.saw(key, m, state)
	u := m.state.ledger.Update
	there := func(id string) bool { _, ok := state.Identities[azure.Fold(id)]; return ok }
	missing := func(id string) bool { return !there(id) }
	if busy(&m.state) && (slices.ContainsFunc(u.Add, missing) || slices.ContainsFunc(u.Remove, there)) {
		c.fleet.MarkUnknown(key)
		return fmt.Errorf("the update of %s is still going on, though Azure knows nothing of it any more", m.resource.ID())
	}
	c.log.Info("changed the identities of a machine", zap.String(keyMachine, m.resource.ID()), zap.Duration("took", time.Since(u.Started)))
	return c.settle(ctx, key, m)
}

// endBadly is what follows from an update that failed. What Azure refused at once did not happen, and the ledger says
// again what it said before; how one ended that was under way the machine shows. Of what may be going on still the note
// stays, so that the next look begins with it.
func (c *Controller) endBadly(ctx context.Context, key string, m *Machine, op *azure.Operation, before ledger.Entries, err error) error {
	if op != nil && op.Token() != "" || op == nil && open(err) {
		return err
	}
	if op == nil {
		before.Update = nil
		if failed := c.note(ctx, key, m, before); failed != nil {
			return failed
		}
		if isClass(err, azure.Throttled) {
			return err
		}
	}
	if failed := c.look(ctx, key, m); failed != nil {
		return failed
	}
	if op == nil {
		return err
	}
	if busy(&m.state) {
		c.fleet.MarkUnknown(key) // whatever was said, Azure may still be at it
		return err
	}
	if failed := c.settle(ctx, key, m); failed != nil {
		return failed
	}
	return err
}

// open reports whether an update that could not be sent without a failure may have been carried out all the same.
func open(err error) bool {
	var e *azure.Error
	return !errors.As(err, &e) || e.Class == azure.Unavailable
}

// settle writes down how an update ended, when it is known how the machine is.
func (c *Controller) settle(ctx context.Context, key string, m *Machine) error {
	s := &m.state
	next := s.ledger.Clone()
	if u := next.Update; u != nil {
		for _, id := range slices.Concat(u.Add, u.Remove) {
			if _, there := s.azure.Identities[azure.Fold(id)]; !there {
				delete(next.Attached, azure.Fold(id))
			}
		}
	}
	next.Update = nil
	return c.note(ctx, key, m, next)
}

// finishUpdate sees an update to its end that this process does not know of, or of which it lost sight.
func (c *Controller) finishUpdate(ctx context.Context, key string, m *Machine) (time.Duration, error) {
	u := m.state.ledger.Update
	if u == nil {
		return 0, nil
	}
	c.fleet.MarkUnknown(key)
	if u.Token != "" {
		c.log.Info("waiting for the end of an update that began earlier", zap.String(keyMachine, m.resource.ID()), zap.Time("began", u.Started))
		op, err := c.arm.Resume(ctx, m.resource, u.Token)
		if err == nil {
			_, err = op.Wait(ctx)
		}
		// How it ended is what the machine will show; one of which nobody can say for so long has, too.
		unended := op == nil && !isClass(err, azure.Invalid) || op != nil && op.Token() != ""
		if unended && (ctx.Err() != nil || time.Since(u.Started) < unclearFor) {
			return 0, err
		}
	}
	if err := c.look(ctx, key, m); err != nil {
		return 0, err
	}
	if busy(&m.state) && time.Since(u.Started) < unclearFor {
		c.fleet.MarkUnknown(key)
		return pause / 2, nil
	}
	return 0, c.settle(ctx, key, m)
}

// explainRefused says what to grant to whom, or what is wrong with the identity.
func explainRefused(r azure.Resource, id string, e *azure.Error) string {
	advice := "see that the managed identity exists and that spec.resourceID of the AzureIdentity is right"
	if e.Code == "LinkedAuthorizationFailed" {
		advice = "grant MIC's identity the role Managed Identity Operator on the managed identity"
	}
	return text.OneLine(fmt.Sprintf("Azure refuses to change %s on %s %s; %s (%s: %s)", id, r.Kind, r.Name, advice, e.Code, e.Message), maxText)
}
