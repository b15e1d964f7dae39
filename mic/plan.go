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

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/cluster"
	"github.com/podidentity/podidentity/mic/ledger"
	"github.com/podidentity/podidentity/mic/usage"
)

// planTimeout bounds the time of a plan: to load the cluster and the ledgers, and to read the machines.
const planTimeout = 2 * time.Minute

// Plan prints what MIC would do now, and why. It reads the cluster, the ledgers and the machines, and changes nothing.
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
	return (&preview{c, out}).print(ctx, cfg.Namespace)
}

// preview prints what a Controller would do. The Controller loads all objects and ledgers. Its queues fill, but no
// worker processes them.
type preview struct {
	*Controller
	out io.Writer
}

func (p *preview) print(ctx context.Context, namespace string) error {
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithTimeout(ctx, planTimeout)
	defer cancel()
	defer p.report.Shutdown()
	defer p.shutDownQueues()
	if err := p.checkDefinitions(ctx); err != nil {
		return err
	}
	if !p.cluster.Run(ctx, &wait) {
		return fmt.Errorf("loading the objects of the cluster: %w (the limit is %s); check that the API server responds, and that this account may list and watch pods, nodes, namespaces and the resources of %s", ctx.Err(), planTimeout, v1.GroupName)
	}
	if p.load(ctx); ctx.Err() != nil {
		return fmt.Errorf("listing the ledgers, ConfigMaps in namespace %s: %w (the limit is %s); check that this account may list ConfigMaps there", namespace, ctx.Err(), planTimeout)
	}
	for _, key := range p.usage.Keys() {
		if err := p.machine(ctx, p.machineReconciler.machine(key)); err != nil {
			return err
		}
	}
	return p.assignments()
}

// machine prints what would be done with a machine.
func (p *preview) machine(ctx context.Context, m *machine) error {
	if err := m.loadLedger(ctx, p.configMaps); err != nil {
		return err
	}
	fmt.Fprintf(p.out, "%s %s (%s)\n", m.resource.Kind, m.resource.Name, m.resource.ID())
	state, err := p.machineReconciler.updater.arm.Get(ctx, m.resource)
	if err != nil {
		fmt.Fprintf(p.out, "  nothing can be planned: %v\n", err)
		return nil
	}
	update := cmp.Or(m.ledger.Update, new(ledger.Update))
	if !update.Started.IsZero() {
		fmt.Fprintf(p.out, "  an update is under way (started %s); the plan below starts from its expected result\n", update.Started.Format(time.RFC3339))
		state = update.Applied(state)
	}
	m.observe(state, p.machineReconciler.interval)
	plan := p.machineReconciler.plan(m)
	for _, add := range update.Add {
		fmt.Fprintf(p.out, "  attaching %s\n         for %s\n", add, cmp.Or(m.usage.Users(azure.Fold(add)), "no pod any more"))
	}
	for _, remove := range update.Remove {
		fmt.Fprintf(p.out, "  detaching %s\n", remove)
	}
	for _, add := range plan.Add {
		fmt.Fprintf(p.out, "  attach %s\n         for %s\n", add, m.usage.Users(azure.Fold(add)))
	}
	for _, remove := range plan.Remove {
		fmt.Fprintf(p.out, "  detach %s\n         MIC attached it, and no living pod on a node of this machine uses it\n", remove)
	}
	p.identities(m, state, slices.Concat(update.Add, plan.Remove))
	p.calls(m, state, plan)
	return nil
}

// identities prints, for each attached identity that is not in printed, why it stays attached or when MIC detaches it.
func (p *preview) identities(m *machine, state azure.State, printed []string) {
	protected := p.machineReconciler.protected()
	for _, id := range slices.Sorted(maps.Keys(state.Identities)) {
		have := state.Identities[id]
		_, inLedger := m.ledger.Attached[id]
		switch users := m.usage.Users(id); {
		case slices.Contains(printed, have.ID):
		case users != "":
			fmt.Fprintf(p.out, "  keep   %s\n         for %s\n", have.ID, users)
		case !inLedger:
			fmt.Fprintf(p.out, "  keep   %s\n         MIC did not attach it\n", have.ID)
		case protected(have):
			fmt.Fprintf(p.out, "  keep   %s\n         MIC never detaches it: --immutable-user-msis or the configuration for Azure names it\n", have.ID)
		default:
			fmt.Fprintf(p.out, "  detach %s\n         after %s (--detach-delay) without a pod that uses it\n", have.ID, p.machineReconciler.detachDelay)
		}
	}
}

// calls prints the updates that MIC would send to Azure Resource Manager.
func (p *preview) calls(m *machine, state azure.State, plan usage.Plan) {
	for len(plan.Add)+len(plan.Remove) > 0 {
		add := plan.Add[:min(len(plan.Add), azure.MaxIdentities)]
		remove := plan.Remove[:min(len(plan.Remove), azure.MaxIdentities-len(add))]
		fmt.Fprintf(p.out, "  %s\n", azure.Describe(m.resource, state, add, remove))
		plan.Add, plan.Remove = plan.Add[len(add):], plan.Remove[len(remove):]
	}
}

// assignments prints which AzureAssignedIdentity objects MIC would create and release, the problems of pods, and the
// number of objects.
func (p *preview) assignments() error {
	var create, release, wait int
	pods := p.cluster.Pods()
	slices.SortFunc(pods, func(a, b *cluster.Pod) int { return cmp.Compare(a.Key(), b.Key()) })
	for _, pod := range pods {
		d := p.cluster.Desired(pod)
		have := p.cluster.AssignmentsOf(pod.Key())
		for _, want := range d.Assignments {
			i := slices.IndexFunc(have, func(a *cluster.Assignment) bool { return a.Name == want.Name })
			switch {
			case i < 0:
				fmt.Fprintf(p.out, "create AzureAssignedIdentity %s/%s: pod %s, AzureIdentity %s, by binding %s\n", pod.Namespace, want.Name, pod.Key(), want.Identity.Key(), want.Binding.Key())
				create++
			case have[i].State != v1.AssignmentAssigned:
				wait++
			}
		}
		for _, problem := range d.Problems {
			fmt.Fprintf(p.out, "pod %s: %s: %s\n", pod.Key(), problem.Reason, problem.Text)
		}
	}
	for _, a := range p.cluster.Assignments() {
		pod := p.cluster.Pod(a.Pod)
		if !slices.ContainsFunc(p.cluster.Desired(pod).Assignments, func(want cluster.DesiredAssignment) bool { return pod.Namespace == a.Namespace && want.Name == a.Name }) {
			fmt.Fprintf(p.out, "release AzureAssignedIdentity %s: pod %s does not need it, because the pod is gone or has ended, AzureIdentity %s is not bound to it any more, or another object replaces this one\n", a.Key(), a.Pod, a.Identity)
			release++
		}
	}
	_, err := fmt.Fprintf(p.out, "AzureAssignedIdentity objects: %d to create, %d to release, %d waiting to be Assigned\n", create, release, wait)
	return err
}
