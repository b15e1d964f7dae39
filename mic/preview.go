package mic

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

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
	return c.preview(ctx, out)
}

// preview prints the plan. Queues fill meanwhile and are never worked off.
func (c *Controller) preview(ctx context.Context, out io.Writer) error {
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithTimeout(ctx, planTimeout)
	defer cancel()
	defer c.events.Shutdown()
	defer c.shutDownQueues()
	if err := c.checkDefinitions(ctx); err != nil {
		return err
	}
	if !c.cluster.Run(ctx, &wait) {
		return fmt.Errorf("the cluster's objects could not be loaded within %s; is the API server there, and may this account list pods, nodes, namespaces and %s?", planTimeout, v1.GroupName)
	}
	if c.load(ctx); ctx.Err() != nil {
		return fmt.Errorf("what MIC has attached could not be read from namespace %s within %s", c.cfg.Namespace, planTimeout)
	}
	for _, key := range c.fleet.Keys() {
		if err := c.previewMachine(ctx, out, key); err != nil {
			return err
		}
	}
	return c.previewAssignments(out)
}

func (c *Controller) previewMachine(ctx context.Context, out io.Writer, key string) error {
	m := c.fleet.Machine(key)
	id := m.resource.ID()
	var err error
	if m.state.ledger, err = ledger.Read(ctx, c.configMaps, key, id); err != nil {
		return err
	}
	c.fleet.SetLedger(key, m.state.ledger.Attached)
	fmt.Fprintf(out, "%s %s (%s)\n", m.resource.Kind, m.resource.Name, id)
	state, err := c.arm.Get(ctx, m.resource)
	if err != nil {
		fmt.Fprintf(out, "  nothing can be planned: %v\n", err)
		return nil
	}
	u := cmp.Or(m.state.ledger.Update, new(ledger.Update))
	if !u.Started.IsZero() {
		fmt.Fprintf(out, "  an update is under way since %s; the rest is for when it has ended\n", u.Started.Format(time.RFC3339))
		state = applied(u, state)
	}
	c.saw(key, m, state)
	p := c.plan(key, m)
	for _, add := range u.Add {
		fmt.Fprintf(out, "  attaching %s\n         for %s\n", add, cmp.Or(c.fleet.Users(key, azure.Fold(add)), "no pod any more"))
	}
	for _, gone := range u.Remove {
		fmt.Fprintf(out, "  detaching %s\n", gone)
	}
	for _, add := range p.Add {
		fmt.Fprintf(out, "  attach %s\n         for %s\n", add, c.fleet.Users(key, azure.Fold(add)))
	}
	for _, gone := range p.Remove {
		fmt.Fprintf(out, "  detach %s\n         MIC attached it, and no living pod on a node of this machine uses it\n", gone)
	}
	for _, id := range slices.Sorted(maps.Keys(state.Identities)) {
		have := state.Identities[id]
		_, ours := m.state.ledger.Attached[id]
		switch users := c.fleet.Users(key, id); {
		case slices.Contains(u.Add, have.ID) || slices.Contains(p.Remove, have.ID):
			// said above
		case users != "":
			fmt.Fprintf(out, "  keep   %s\n         for %s\n", have.ID, users)
		case !ours:
			fmt.Fprintf(out, "  keep   %s\n         MIC did not attach it\n", have.ID)
		case c.spared()(have):
			fmt.Fprintf(out, "  keep   %s\n         it is never detached (--immutable-user-msis, or the cluster's own)\n", have.ID)
		default:
			fmt.Fprintf(out, "  detach %s\n         after %s (--detach-delay) without a pod that uses it\n", have.ID, c.cfg.DetachDelay)
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

// usersOf lists pods that want an identity, some of them if they are many.
func (f *Tracker) Users(machine, identity string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	u := f.machines[machine].identities[identity]
	if u == nil || len(u.users) == 0 {
		return ""
	}
	var pods []string
	for pod := range u.users {
		pods = append(pods, pod)
	}
	slices.Sort(pods)
	const most = 5
	if n := len(pods); n > most {
		return fmt.Sprintf("pods %s and %d more", strings.Join(pods[:most], ", "), n-most)
	}
	return "pod " + strings.Join(pods, ", ")
}

// previewAssignments prints which AzureAssignedIdentity objects would come and go, and what stands in the way of pods.
func (c *Controller) previewAssignments(out io.Writer) error {
	var create, release, wait int
	for _, key := range slices.Sorted(slices.Values(c.cluster.pods.GetIndexer().ListKeys())) {
		p, ok := kube.Get[*Pod](c.cluster.pods, key)
		if !ok {
			continue
		}
		d := c.desired(p)
		have := c.cluster.AssignmentsOf(key)
		for _, w := range d.assignments {
			i := slices.IndexFunc(have, func(a *Assignment) bool { return a.Name == w.name })
			switch {
			case i < 0:
				fmt.Fprintf(out, "create AzureAssignedIdentity %s/%s: pod %s, AzureIdentity %s, by binding %s\n", p.Namespace, w.name, key, w.identity.Key(), w.binding.Key())
				create++
			case have[i].State != v1.AssignmentAssigned:
				wait++
			}
		}
		for _, t := range d.troubles {
			fmt.Fprintf(out, "pod %s: %s: %s\n", key, t.reason, t.text)
		}
	}
	for _, o := range c.cluster.assignments.GetIndexer().List() {
		a := o.(*Assignment)
		p, _ := kube.Get[*Pod](c.cluster.pods, a.Pod)
		if !slices.ContainsFunc(c.desired(p).assignments, func(w wanted) bool { return p.Namespace == a.Namespace && w.name == a.Name }) {
			fmt.Fprintf(out, "release AzureAssignedIdentity %s: nothing binds AzureIdentity %s to a living pod %s any more\n", a.Key(), a.Identity, a.Pod)
			release++
		}
	}
	_, err := fmt.Fprintf(out, "AzureAssignedIdentity objects: %d to create, %d to release, %d waiting to be Assigned\n", create, release, wait)
	return err
}
