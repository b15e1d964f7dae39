package mic

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/internal/retry"
	"github.com/podidentity/podidentity/internal/text"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/ledger"
)

// machineState belongs to the reconcile of the machine, of which there is one at a time.
type machineState struct {
	ledger   *ledger.Ledger
	azure    azure.State // as Azure said last
	due      time.Time   // when it is to be asked again at the latest
	patched  time.Time   // when the last update began
	failures int         // in a row
}

const (
	// pause is from the beginning of an update to that of the next. Azure takes 10 to 60 s for one, so this delays
	// nothing there; it makes two updates of a burst of pods that goes on for some seconds, and keeps well within the
	// twelve that Azure allows in a row and the four a minute after that.
	pause = 10 * time.Second
	// conflicts is how often a plan is made anew in one go because the machine was changed by somebody else.
	conflicts = 4
	// standstill is the longest time from the beginning of the note in the ledger to the update. A process that is stopped
	// in between may have been followed by another leader, who has promised to a pod what was to be detached.
	standstill = 5 * time.Second
	// unclearFor is how long an update that was sent, and of which nothing is known, may still be going on.
	unclearFor = 20 * time.Minute
	// maxText bounds a text for an Event or a status: the API server accepts 1024 bytes in an Event.
	maxText = 900
)

// Backoff after failures that pass by themselves, after conflicts, and after those that somebody has to correct.
var (
	transientBackoff = retry.Backoff{Initial: 2 * time.Second, Max: time.Minute}
	conflictBackoff  = retry.Backoff{Initial: pause / 2, Max: time.Minute}
	deniedBackoff    = retry.Backoff{Initial: 30 * time.Second, Max: 10 * time.Minute}
)

// reconcileMachine makes Azure's machine have what the pods on it want. It returns when it is to be called again at the
// latest.
func (c *Controller) reconcileMachine(ctx context.Context, key string) (time.Duration, error) {
	m := c.fleet.Machine(key)
	if m == nil {
		return 0, nil
	}
	if left := c.fleet.RetryDelay(key); left > 0 {
		return left, nil
	}
	start := time.Now()
	defer func() { c.metrics.cycle(time.Since(start)) }()
	again, err := c.bringUp(ctx, key, m)
	s := &m.state
	if err == nil {
		s.failures = 0
		c.said(key, nil)
		if c.fleet.Drop(key) {
			return 0, nil
		}
		return min(cmp.Or(again, c.cfg.ReconcileInterval), c.cfg.ReconcileInterval), nil
	}
	if ctx.Err() != nil {
		return 0, nil
	}
	s.failures++
	rest := c.failed(key, m, err)
	c.fleet.SetRetryAfter(key, rest)
	return rest, nil
}

// failed sorts a failure: what the waiting pods are told, and when it is tried again.
func (c *Controller) failed(key string, m *Machine, err error) time.Duration {
	c.said(key, err)
	n := m.state.failures
	var e *azure.Error
	if !errors.As(err, &e) {
		return transientBackoff.After(n) // the API server
	}
	switch e.Class {
	case azure.Throttled:
		return retry.Jitter(max(e.RetryAfter, time.Second))
	case azure.Conflict:
		return conflictBackoff.After(n)
	case azure.Unavailable:
		if n >= 3 {
			c.fleet.SetProblem(key, explain(m.resource, e))
		}
		return max(transientBackoff.After(n), e.RetryAfter)
	case azure.NotFound:
		c.fleet.SetProblem(key, explain(m.resource, e))
		return c.cfg.ReconcileInterval
	}
	c.fleet.SetProblem(key, explain(m.resource, e))
	return max(deniedBackoff.After(n), e.RetryAfter)
}

// bringUp is one look at a machine, and what follows from it.
func (c *Controller) bringUp(ctx context.Context, key string, m *Machine) (time.Duration, error) {
	s := &m.state
	if s.ledger == nil {
		l, err := ledger.Read(ctx, c.configMaps, key, m.resource.ID())
		if err != nil {
			return 0, err
		}
		s.ledger = l
		c.fleet.SetLedger(key, l.Attached)
	}
	if again, err := c.finishUpdate(ctx, key, m); err != nil || again > 0 {
		return again, err
	}
	if err := c.writeAdopted(ctx, key, m); err != nil {
		return 0, err
	}
	if !c.fleet.Known(key) || busy(s) || !time.Now().Before(s.due) {
		if err := c.look(ctx, key, m); err != nil {
			return 0, err
		}
	}
	var err error
	for i := range conflicts {
		p := c.plan(key, m)
		if err := c.strike(ctx, key, m, p.Prune); err != nil {
			return 0, err
		}
		if p.Empty() {
			c.fleet.ResetGather(key)
			return c.untilNext(p, s), nil
		}
		if rest := max(pause-time.Since(s.patched), c.fleet.GatherDelay(key)); i == 0 && rest > 0 {
			return rest, nil
		}
		// What is changed is changed on the ground of how things are now.
		if err := c.look(ctx, key, m); err != nil {
			return 0, err
		}
		if p = c.plan(key, m); p.Empty() {
			continue
		}
		if err = c.carryOut(ctx, key, m, p); !isClass(err, azure.Conflict) {
			if err != nil {
				return 0, err
			}
			return time.Millisecond, nil // what came in meanwhile
		}
		if busy(s) || s.ledger.Update != nil || !c.fleet.Known(key) {
			break // it has to be seen first how that ended
		}
	}
	return 0, err
}

// busy reports whether Azure is changing the machine, whoever asked for that.
func busy(s *machineState) bool { return strings.EqualFold(s.azure.ProvisioningState, "Updating") }

func (c *Controller) untilNext(p plan, s *machineState) time.Duration {
	next := s.due
	if busy(s) {
		next = time.Now().Add(pause)
	}
	if !p.Next.IsZero() && p.Next.Before(next) {
		next = p.Next
	}
	return max(time.Until(next), time.Millisecond)
}

// plan decides on the ground of what is known.
func (c *Controller) plan(key string, m *Machine) plan {
	v := c.fleet.View(key)
	v.Attached = m.state.azure.Identities
	v.Now, v.DetachDelay, v.Protected = time.Now(), c.cfg.DetachDelay, c.spared()
	v.InLedger = m.state.ledger.Attached
	p := Decide(v)
	if len(p.Remove) > 0 && !c.drain && c.cluster.Behind() {
		// A pod may have come that needs it, and nobody has told.
		p.Remove, p.Next = nil, v.Now.Add(CatchUpTime)
	}
	return p
}

// spared says which identities are left on machines whoever attached them: those of the settings, and MIC's own.
func (c *Controller) spared() func(azure.Identity) bool {
	list := slices.Concat(c.cfg.Immutable, c.arm.OwnIdentities())
	return func(i azure.Identity) bool {
		return slices.ContainsFunc(list, func(id string) bool {
			return strings.EqualFold(id, i.ClientID) || azure.Fold(id) == azure.Fold(i.ID)
		})
	}
}

// look asks Azure how the machine is.
func (c *Controller) look(ctx context.Context, key string, m *Machine) error {
	state, err := c.arm.Get(ctx, m.resource)
	if isClass(err, azure.NotFound) {
		c.saw(key, m, azure.State{})
		if len(kube.ByIndex[*Node](c.cluster.nodes, byMachine, key)) > 0 {
			return err // Azure may be asked with the wrong account, or about the wrong cloud
		}
		return c.note(ctx, key, m, ledger.Entries{Machine: m.resource.ID(), Attached: map[string]string{}})
	}
	if err != nil {
		return err
	}
	if strings.EqualFold(state.ProvisioningState, "Deleting") {
		return &azure.Error{Class: azure.NotFound, Message: "it is being deleted"}
	}
	c.saw(key, m, state)
	return nil
}

func (c *Controller) saw(key string, m *Machine, state azure.State) {
	// A little early, each machine at its own time, so that not all are asked at once.
	early := time.Duration(rand.Int64N(int64(c.cfg.ReconcileInterval / 10)))
	m.state.azure, m.state.due = state, time.Now().Add(c.cfg.ReconcileInterval-early)
	c.fleet.Observe(key, state.Identities, busy(&m.state))
}

// note writes the ledger if it changes.
func (c *Controller) note(ctx context.Context, key string, m *Machine, next ledger.Entries) error {
	l := m.state.ledger
	if l.Same(next) {
		return nil
	}
	if err := l.Write(ctx, next); err != nil {
		if errors.Is(err, ledger.ErrOvertaken) {
			m.state.ledger = nil
		}
		return err
	}
	c.fleet.SetLedger(key, l.Attached)
	return nil
}

// strike removes entries from the ledger.
func (c *Controller) strike(ctx context.Context, key string, m *Machine, entries []string) error {
	next := m.state.ledger.Clone()
	for _, id := range entries {
		delete(next.Attached, id)
	}
	return c.note(ctx, key, m, next)
}

// writeAdopted enters into the ledger what assignments of the predecessor stand for.
func (c *Controller) writeAdopted(ctx context.Context, key string, m *Machine) error {
	adopted := c.fleet.Adopted(key)
	if len(adopted) == 0 {
		return nil
	}
	next := m.state.ledger.Clone()
	for id, spelled := range adopted {
		next.Attached[id] = spelled
	}
	return c.note(ctx, key, m, next)
}

func isClass(err error, class azure.Class) bool {
	var e *azure.Error
	return errors.As(err, &e) && e.Class == class
}

// explain says to an operator why Azure does nothing for a machine.
func explain(r azure.Resource, e *azure.Error) string {
	what := fmt.Sprintf("Azure does not let MIC change the identities of %s %s: ", r.Kind, r.Name)
	switch e.Class {
	case azure.Denied:
		role := "Virtual Machine Contributor"
		return text.OneLine(fmt.Sprintf("%s%s. Grant MIC's identity the role %s on resource group %s of subscription %s", what, e.Message, role, r.ResourceGroup, r.SubscriptionID), maxText)
	case azure.NotFound:
		return text.OneLine(fmt.Sprintf("%s %s is not in resource group %s of subscription %s: %s", r.Kind, r.Name, r.ResourceGroup, r.SubscriptionID, e.Message), maxText)
	case azure.Unavailable:
		return text.OneLine(fmt.Sprintf("Azure does not answer about %s %s; it is asked again: %s", r.Kind, r.Name, cmp.Or(e.Message, e.Error())), maxText)
	case azure.Unconfigured:
		return text.OneLine("MIC cannot ask Azure: "+cmp.Or(e.Message, e.Error()), maxText)
	}
	return text.OneLine(what+cmp.Or(e.Message, e.Error()), maxText)
}
