package mic

import (
	"context"
	"fmt"
	"slices"
	"time"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/azure"
)

// desired is what a pod is to have.
type desired struct {
	assignments []wanted
	// troubles are what stands in the way of more.
	troubles []trouble
}

// wanted is one AzureAssignedIdentity as it is to be.
type wanted struct {
	name     string
	identity *AzureIdentity
	binding  *Binding
	digest   uint64
	resource string // folded resource ID; "" for what needs no machine
	machine  azure.Resource
	key      string // of the machine; "" if there is none
	problem  string // why there is none
}

func (w wanted) want() Key { return Key{w.key, w.resource} }

// trouble is something that somebody has to mend.
type trouble struct {
	reason, text string
	binding      *Binding // whose it is; nil: only the pod's
}

// desired says what follows for a pod from the objects around it. nil is a pod that is gone.
func (c *Controller) desired(p *Pod) desired {
	var d desired
	if p == nil || p.Finished || p.Node == "" || c.drain {
		return d
	}
	n, ok := kube.Get[*Node](c.cluster.nodes, p.Node)
	if !ok {
		return d // what is gone has nothing; what is new is heard of soon
	}
	facts, identities, bindings := c.cluster.Facts(p)
	subject := identity.Pod{Namespace: p.Namespace, Name: p.Name, Labels: map[string]string{v1.BindingLabel: p.Selector}}
	bound, _ := identity.Bound(c.rules, subject, facts)
	for _, i := range bound {
		have := identities[i.Key()]
		b := bindings[slices.IndexFunc(bindings, func(b *Binding) bool {
			return b.Namespace == i.Namespace && b.Value.AzureIdentity == i.Name
		})]
		if problem := i.Problem(); problem != "" {
			d.troubles = append(d.troubles, trouble{reasonInvalid, fmt.Sprintf("AzureIdentity %s cannot work: %s", i.Key(), problem), b})
			continue
		}
		w := wanted{
			name: assignmentName(p, have), identity: have, binding: b, digest: digestOf(have.Full, b.Full),
			resource: have.ResourceID, machine: n.Machine, key: n.MachineKey, problem: n.Problem,
		}
		d.assignments = append(d.assignments, w)
	}
	return d
}

// reconcilePod gives a pod (namespace/name) the assignments that it is to have, and takes away all others.
func (c *Controller) reconcilePod(ctx context.Context, key string) (time.Duration, error) {
	p, ok := kube.Get[*Pod](c.cluster.pods, key)
	if !ok {
		p = nil
	}
	d := c.desired(p)
	c.count(key, d)
	have := c.cluster.AssignmentsOf(key)
	troubles := d.troubles
	settled := map[string]bool{} // identities whose assignment is as it is to be
	for _, w := range d.assignments {
		var a *Assignment
		if i := slices.IndexFunc(have, func(a *Assignment) bool { return a.Namespace == p.Namespace && a.Name == w.name }); i >= 0 {
			a = have[i]
			have = slices.Delete(have, i, i+1)
		}
		state, message, err := c.bring(ctx, p, w, a)
		if err != nil {
			return 0, err
		}
		if state == v1.AssignmentAssigned {
			settled[w.identity.Key()] = true
		}
		if message != "" {
			troubles = append(troubles, trouble{reasonWaiting, message, w.binding})
		}
	}
	for _, a := range have {
		if !settled[a.Identity] && c.serves(p, d, a) {
			continue // its successor comes first, so that the pod is never without
		}
		if err := c.release(ctx, a); err != nil {
			return 0, err
		}
	}
	if p != nil {
		c.tell(p, troubles)
	}
	if len(settled) == len(d.assignments) {
		c.arrivals.end(key, len(settled) > 0, c.metrics.assigned)
	}
	if c.cluster.HasUnobservedWrites(key) {
		return WriteTTL, nil // if the watch never brings them, they were overtaken
	}
	return 0, nil
}

// serves reports whether NMI gives tokens by an assignment of the predecessor as long as there is no other.
func (c *Controller) serves(p *Pod, d desired, a *Assignment) bool {
	usable := p != nil && a.Node == p.Node && a.Legacy() && !a.Deleting && (a.State == v1.AssignmentAssigned || a.State == v1.AssignmentLegacy)
	return usable && slices.ContainsFunc(d.assignments, func(w wanted) bool {
		return w.identity.Key() == a.Identity && w.resource == a.ResourceID && !c.fleet.Absent(w.want())
	})
}

// count enters into the fleet what the pod wants.
func (c *Controller) count(key string, d desired) {
	var now []Demand
	for _, w := range d.assignments {
		if w.resource != "" && w.key != "" && !slices.ContainsFunc(now, func(n Demand) bool { return n.Key == w.want() }) {
			now = append(now, Demand{w.want(), w.machine, w.identity.Value.ResourceID})
		}
	}
	c.fleet.SetDemands(key, now)
}

// bring makes one assignment as it is to be. It returns the state that it is in then, and what is in the way of more.
func (c *Controller) bring(ctx context.Context, p *Pod, w wanted, a *Assignment) (v1.AssignmentState, string, error) {
	var err error
	switch {
	case a == nil && c.cluster.NamespaceTerminating(p.Namespace):
		return "", "", nil // nothing may be made there any more
	case a == nil:
		a, err = c.create(ctx, p, w)
	case a.Deleting:
		return "", "", c.release(ctx, a) // somebody deleted it; when it is gone it is made anew
	case a.Digest != w.digest:
		a, err = c.copyAgain(ctx, w, a)
	}
	if err != nil || a == nil {
		return "", "", err
	}
	state, message := v1.AssignmentAssigned, ""
	switch {
	case w.resource == "":
	case w.key == "":
		state, message = v1.AssignmentCreated, w.problem
	default:
		var how Status
		if how, message = c.fleet.Status(p.Key(), w.want()); how == Missing || how == Unknown && message != "" && a.State != v1.AssignmentAssigned {
			state = v1.AssignmentCreated
		} else if how == Unknown {
			return a.State, message, nil // what is in writing stands until Azure says something else
		}
	}
	if a.State != state || a.Message != message {
		err = c.setState(ctx, a, state, message)
	}
	return state, message, err
}

// release lets an assignment go for which there is no use any more, as soon as nothing hangs on it.
func (c *Controller) release(ctx context.Context, a *Assignment) error {
	n, ok := kube.Get[*Node](c.cluster.nodes, a.Node)
	if !ok || a.ResourceID == "" || n.MachineKey == "" {
		return c.finalize(ctx, a, false)
	}
	w := Key{n.MachineKey, a.ResourceID}
	if a.Legacy() {
		c.fleet.AdoptLegacy(w, n.Machine, a.UID)
	}
	if !c.fleet.MayRelease(a.Pod, w) && !c.cluster.NamespaceTerminating(a.Namespace) {
		return nil
	}
	return c.finalize(ctx, a, c.fleet.Absent(w))
}

// assignmentsGone reports whether no assignment is left; for taking everything away.
func (c *Controller) assignmentsGone() bool {
	return len(c.cluster.assignments.GetIndexer().ListKeys()) == 0
}
