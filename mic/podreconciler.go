package mic

import (
	"context"
	"slices"
	"time"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/mic/cluster"
	"github.com/podidentity/podidentity/mic/telemetry"
	"github.com/podidentity/podidentity/mic/usage"
)

// podReconciler creates, updates and deletes the AzureAssignedIdentity objects of each pod. Nothing else in MIC writes
// these objects, and one worker at a time reconciles a pod.
type podReconciler struct {
	cluster *cluster.Cluster
	usage   *usage.Tracker
	writer  *cluster.Writer
	report  *telemetry.Reporter
	timer   *telemetry.AssignmentTimer
	metrics *telemetry.Metrics
}

// reconcile creates and updates the desired assignments of a pod. It releases the other assignments of the pod, except
// those of AAD Pod Identity that the pod still needs. key is the namespace/name of the pod. reconcile returns the delay
// until the next reconcile, or 0 if only an event or an error requires one.
func (r *podReconciler) reconcile(ctx context.Context, key string) (time.Duration, error) {
	p := r.cluster.Pod(key)
	d := r.cluster.Desired(p)
	r.setDemands(key, d)
	have := r.cluster.AssignmentsOf(key)
	problems := d.Problems
	assigned := map[string]bool{} // by AzureIdentity
	for _, want := range d.Assignments {
		var a *cluster.Assignment
		if i := slices.IndexFunc(have, func(a *cluster.Assignment) bool { return a.Namespace == p.Namespace && a.Name == want.Name }); i >= 0 {
			a = have[i]
			have = slices.Delete(have, i, i+1)
		}
		state, message, err := r.ensureAssignment(ctx, p, want, a)
		if err != nil {
			return 0, err
		}
		if state == v1.AssignmentAssigned {
			assigned[want.Identity.Key()] = true
		}
		if message != "" {
			problems = append(problems, telemetry.Problem{Reason: telemetry.ReasonFailed, Text: message, Binding: want.Binding.Reference()})
		}
	}
	for _, a := range have {
		if !assigned[a.Identity] && r.serves(p, d, a) {
			continue // a stays until MIC's own assignment is Assigned, so that the pod gets tokens without a gap
		}
		if err := r.release(ctx, a); err != nil {
			return 0, err
		}
	}
	if p != nil {
		r.report.PodProblems(p.Reference(), problems)
	}
	if len(assigned) == len(d.Assignments) {
		r.timer.Done(key, len(assigned) > 0, r.metrics.Assigned)
	}
	if r.cluster.HasUnobservedWrites(key) {
		return cluster.WriteTTL, nil // after this time AssignmentsOf ignores these writes: it returns what the watch delivered
	}
	return 0, nil
}

// setDemands records in the Tracker what the pod needs.
func (r *podReconciler) setDemands(key string, d cluster.DesiredState) {
	var demands []usage.Demand
	for _, want := range d.Assignments {
		if want.ResourceID != "" && want.MachineKey != "" && !slices.ContainsFunc(demands, func(d usage.Demand) bool { return d.Key == usageKey(want) }) {
			demands = append(demands, usage.Demand{Key: usageKey(want), Resource: want.Machine, ID: want.Identity.Value.ResourceID})
		}
	}
	r.usage.SetDemands(key, demands)
}

func usageKey(d cluster.DesiredAssignment) usage.Key {
	return usage.Key{Machine: d.MachineKey, Identity: d.ResourceID}
}

// serves reports whether a is an assignment of AAD Pod Identity with which NMI still issues tokens to the pod. The pod
// needs such an assignment until MIC's own assignment of the same identity is Assigned. serves returns false if the
// identity is known not to be attached.
func (r *podReconciler) serves(p *cluster.Pod, d cluster.DesiredState, a *cluster.Assignment) bool {
	usable := p != nil && a.Node == p.Node && a.Legacy() && !a.Deleting && (a.State == v1.AssignmentAssigned || a.State == v1.AssignmentLegacy)
	return usable && slices.ContainsFunc(d.Assignments, func(want cluster.DesiredAssignment) bool {
		return want.Identity.Key() == a.Identity && want.ResourceID == a.ResourceID && !r.usage.Absent(usageKey(want))
	})
}

// ensureAssignment creates or updates one assignment; a is nil if there is none yet. It returns the resulting state of
// the assignment, and the problem that prevents its identity from being attached, if any. The state is "" if the
// assignment has no state yet, or if there is no usable assignment: it cannot be created now, it is being deleted or
// was deleted, or it exists and is not in the cache yet.
func (r *podReconciler) ensureAssignment(ctx context.Context, p *cluster.Pod, want cluster.DesiredAssignment, a *cluster.Assignment) (v1.AssignmentState, string, error) {
	var err error
	switch {
	case a == nil && r.cluster.NamespaceTerminating(p.Namespace):
		return "", "", nil // the API server accepts no new object there
	case a == nil:
		a, err = r.writer.Create(ctx, p, want)
	case a.Deleting:
		return "", "", r.release(ctx, a) // it is being deleted; MIC creates it again once it is gone
	case a.Digest != want.Digest:
		a, err = r.writer.UpdateCopies(ctx, want, a)
	}
	if err != nil || a == nil {
		return "", "", err
	}
	state, message := v1.AssignmentAssigned, ""
	switch {
	case want.ResourceID == "":
	case want.MachineKey == "":
		state, message = v1.AssignmentCreated, want.Problem
	default:
		var status usage.Status
		if status, message = r.usage.Status(p.Key(), usageKey(want)); status == usage.Missing || status == usage.Unknown && message != "" && a.State != v1.AssignmentAssigned {
			state = v1.AssignmentCreated
		} else if status == usage.Unknown {
			return a.State, message, nil // the assignment keeps its state until the state of the machine is known
		}
	}
	if a.State != state || a.Message != message {
		err = r.writer.SetState(ctx, a, state, message)
	}
	return state, message, err
}

// release deletes an assignment that its pod no longer needs or that is being deleted already. The last assignment of
// an identity that MIC attached, or may have attached, stays until the identity is detached, unless the node of the
// assignment is gone or the namespace of the assignment is being deleted. If the assignment stays, the Tracker requeues
// the pod when that may change.
func (r *podReconciler) release(ctx context.Context, a *cluster.Assignment) error {
	n := r.cluster.Node(a.Node)
	if n == nil || a.ResourceID == "" || n.MachineKey == "" {
		return r.writer.Delete(ctx, a, false)
	}
	k := usage.Key{Machine: n.MachineKey, Identity: a.ResourceID}
	if a.Legacy() {
		r.usage.AdoptLegacy(k, n.Machine, a.UID)
	}
	if !r.usage.MayRelease(a.Pod, k) && !r.cluster.NamespaceTerminating(a.Namespace) {
		return nil
	}
	return r.writer.Delete(ctx, a, r.usage.Absent(k))
}
