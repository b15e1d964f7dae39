package mic

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/podidentity/podidentity/mic/cluster"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/ledger"
)

// planTimeout bounds the loading of what a plan is made from.
const planTimeout = 2 * time.Minute

// Plan prints what MIC would do with the cluster as it is now, and why. It reads the cluster, the ledgers and the
// machines, and changes nothing.
func Plan(ctx context.Context, cfg Config, log *zap.Logger, out io.Writer) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	config, err := kube.Config(cfg.Kubeconfig, userAgent)
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	arm, err := newMachines(cfg, log.WithOptions(zap.IncreaseLevel(zap.WarnLevel)), registry, func() {})
	if err != nil {
		return err
	}
	c, err := New(cfg, Deps{Kube: config, Machines: arm, Log: zap.NewNop(), Registry: registry})
	if err != nil {
		return err
	}
	return c.preview(ctx, cfg.Namespace, out)
}

// preview prints the plan. Queues fill meanwhile and are never worked off.
func (c *Controller) preview(ctx context.Context, namespace string, out io.Writer) error {
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithTimeout(ctx, planTimeout)
	defer cancel()
	defer c.report.Shutdown()
	defer c.shutDownQueues()
	if err := c.checkDefinitions(ctx); err != nil {
		return err
	}
	if !c.cluster.Run(ctx, &wait) {
		return fmt.Errorf("the cluster's objects could not be loaded within %s; is the API server there, and may this account list pods, nodes, namespaces and %s?", planTimeout, v1.GroupName)
	}
	if c.load(ctx); ctx.Err() != nil {
		return fmt.Errorf("what MIC has attached could not be read from namespace %s within %s", namespace, planTimeout)
	}
	for _, key := range c.usage.Keys() {
		if err := c.previewMachine(ctx, out, key); err != nil {
			return err
		}
	}
	return c.previewAssignments(out)
}

func (c *Controller) previewMachine(ctx context.Context, out io.Writer, key string) error {
	m := c.machineReconciler.machine(key)
	id := m.resource.ID()
	if err := m.loadLedger(ctx, c.configMaps); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s %s (%s)\n", m.resource.Kind, m.resource.Name, id)
	state, err := c.machineReconciler.updater.arm.Get(ctx, m.resource)
	if err != nil {
		fmt.Fprintf(out, "  nothing can be planned: %v\n", err)
		return nil
	}
	protected := c.machineReconciler.protected()
	u := cmp.Or(m.ledger.Update, new(ledger.Update))
	if !u.Started.IsZero() {
		fmt.Fprintf(out, "  an update is under way since %s; the rest is for when it has ended\n", u.Started.Format(time.RFC3339))
		state = applied(u, state)
	}
	m.observe(state, c.machineReconciler.interval)
	p := c.machineReconciler.plan(m)
	for _, add := range u.Add {
		fmt.Fprintf(out, "  attaching %s\n         for %s\n", add, cmp.Or(m.usage.Users(azure.Fold(add)), "no pod any more"))
	}
	for _, gone := range u.Remove {
		fmt.Fprintf(out, "  detaching %s\n", gone)
	}
	for _, add := range p.Add {
		fmt.Fprintf(out, "  attach %s\n         for %s\n", add, m.usage.Users(azure.Fold(add)))
	}
	for _, gone := range p.Remove {
		fmt.Fprintf(out, "  detach %s\n         MIC attached it, and no living pod on a node of this machine uses it\n", gone)
	}
	for _, id := range slices.Sorted(maps.Keys(state.Identities)) {
		have := state.Identities[id]
		_, ours := m.ledger.Attached[id]
		switch users := m.usage.Users(id); {
		case slices.Contains(u.Add, have.ID) || slices.Contains(p.Remove, have.ID):
			// said above
		case users != "":
			fmt.Fprintf(out, "  keep   %s\n         for %s\n", have.ID, users)
		case !ours:
			fmt.Fprintf(out, "  keep   %s\n         MIC did not attach it\n", have.ID)
		case protected(have):
			fmt.Fprintf(out, "  keep   %s\n         it is never detached (--immutable-user-msis, or the cluster's own)\n", have.ID)
		default:
			fmt.Fprintf(out, "  detach %s\n         after %s (--detach-delay) without a pod that uses it\n", have.ID, c.machineReconciler.detachDelay)
		}
	}
	for len(p.Add)+len(p.Remove) > 0 {
		add := p.Add[:min(len(p.Add), azure.MaxIdentities)]
		remove := p.Remove[:min(len(p.Remove), azure.MaxIdentities-len(add))]
		fmt.Fprintf(out, "  %s\n", azure.Describe(m.resource, state, add, remove))
		p.Add, p.Remove = p.Add[len(add):], p.Remove[len(remove):]
	}
	return nil
}

// applied is the state of the machine once Azure has carried the update out.
func applied(u *ledger.Update, state azure.State) azure.State {
	state.Identities = maps.Clone(state.Identities)
	for _, id := range u.Remove {
		delete(state.Identities, azure.Fold(id))
	}
	for _, id := range u.Add {
		if state.Identities == nil {
			state.Identities = map[string]azure.Identity{}
		}
		state.Identities[azure.Fold(id)] = azure.Identity{ID: id}
	}
	return state
}

// previewAssignments prints which AzureAssignedIdentity objects would be created and released, and the problems of pods.
func (c *Controller) previewAssignments(out io.Writer) error {
	var create, release, wait int
	pods := c.cluster.Pods()
	slices.SortFunc(pods, func(a, b *cluster.Pod) int { return cmp.Compare(a.Key(), b.Key()) })
	for _, p := range pods {
		d := c.cluster.Desired(p)
		have := c.cluster.AssignmentsOf(p.Key())
		for _, want := range d.Assignments {
			i := slices.IndexFunc(have, func(a *cluster.Assignment) bool { return a.Name == want.Name })
			switch {
			case i < 0:
				fmt.Fprintf(out, "create AzureAssignedIdentity %s/%s: pod %s, AzureIdentity %s, by binding %s\n", p.Namespace, want.Name, p.Key(), want.Identity.Key(), want.Binding.Key())
				create++
			case have[i].State != v1.AssignmentAssigned:
				wait++
			}
		}
		for _, problem := range d.Problems {
			fmt.Fprintf(out, "pod %s: %s: %s\n", p.Key(), problem.Reason, problem.Text)
		}
	}
	for _, a := range c.cluster.Assignments() {
		p := c.cluster.Pod(a.Pod)
		if !slices.ContainsFunc(c.cluster.Desired(p).Assignments, func(want cluster.DesiredAssignment) bool { return p.Namespace == a.Namespace && want.Name == a.Name }) {
			fmt.Fprintf(out, "release AzureAssignedIdentity %s: nothing binds AzureIdentity %s to a living pod %s any more\n", a.Key(), a.Identity, a.Pod)
			release++
		}
	}
	_, err := fmt.Fprintf(out, "AzureAssignedIdentity objects: %d to create, %d to release, %d waiting to be Assigned\n", create, release, wait)
	return err
}
