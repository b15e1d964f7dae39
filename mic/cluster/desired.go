package cluster

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/azure"
	"github.com/podidentity/podidentity/mic/telemetry"
)

// DesiredState is the assignments that a pod should have.
type DesiredState struct {
	Assignments []DesiredAssignment
	// Problems are the reasons why identities that are bound to the pod have no assignment.
	Problems []telemetry.Problem
}

// DesiredAssignment is one AzureAssignedIdentity that a pod should have.
type DesiredAssignment struct {
	Name       string
	Identity   *AzureIdentity
	Binding    *Binding
	Digest     uint64 // of Identity and Binding, see digestOf
	ResourceID string // folded resource ID; "" for an identity that needs no machine
	Machine    azure.Resource
	MachineKey string // "" if there is no machine
	Problem    string // why there is no machine
}

// Desired computes the desired state of a pod from the pod, its node, and the bindings and identities in the caches. p
// is nil if the pod is gone; the result is then empty.
func (c *Cluster) Desired(p *Pod) DesiredState {
	var d DesiredState
	if p == nil || p.Finished || p.Node == "" || c.options.Drain {
		return d
	}
	n := c.Node(p.Node)
	if n == nil {
		return d // the node was deleted, or the event that adds it has yet to come and then requeues the pod
	}
	facts, identities, bindings := c.facts(p)
	subject := identity.Pod{Namespace: p.Namespace, Name: p.Name, Labels: map[string]string{v1.BindingLabel: p.Selector}}
	bound, _ := identity.Bound(c.options.Rules, subject, facts)
	for _, i := range bound {
		have := identities[i.Key()]
		b := bindings[slices.IndexFunc(bindings, func(b *Binding) bool {
			return b.Namespace == i.Namespace && b.Value.AzureIdentity == i.Name
		})]
		if problem := i.Problem(); problem != "" {
			d.Problems = append(d.Problems, telemetry.Problem{Reason: telemetry.ReasonInvalid, Text: fmt.Sprintf("AzureIdentity %s cannot work: %s", i.Key(), problem), Binding: b.Reference()})
			continue
		}
		d.Assignments = append(d.Assignments, DesiredAssignment{
			Name: assignmentName(p, have), Identity: have, Binding: b, Digest: digestOf(have.Full, b.Full),
			ResourceID: have.ResourceID, Machine: n.Machine, MachineKey: n.MachineKey, Problem: n.Problem,
		})
	}
	return d
}

// facts returns the input of identity.Bound for a pod, and the cached identities (by key) and bindings from which
// the input is made.
func (c *Cluster) facts(p *Pod) (identity.Facts, map[string]*AzureIdentity, []*Binding) {
	var facts identity.Facts
	identities := map[string]*AzureIdentity{}
	bindings := kube.ByIndex[*Binding](c.bindings, bySelector, p.Selector)
	slices.SortFunc(bindings, func(a, b *Binding) int { return cmp.Compare(a.Key(), b.Key()) })
	for _, b := range bindings {
		facts.Bindings = append(facts.Bindings, b.Value)
		key := kube.Key(b.Namespace, b.Value.AzureIdentity)
		if i, ok := kube.Get[*AzureIdentity](c.identities, key); ok && identities[key] == nil {
			identities[key] = i
			facts.Identities = append(facts.Identities, i.Value)
		}
	}
	return facts, identities, bindings
}

// assignmentName names the assignment of an identity to a pod. The hash covers everything that distinguishes
// assignments: the UID of the pod, and the namespace, name, kind and resource ID of the AzureIdentity. Because of the
// UID, a later pod of the same name has another assignment. The part before the hash is for people. It is truncated,
// because the API server accepts names of at most 253 bytes.
func assignmentName(p *Pod, i *AzureIdentity) string {
	const maxPart = 100
	sum := sha256.Sum256([]byte(strings.Join([]string{p.UID, i.Namespace, i.Name, fmt.Sprint(int(i.Value.Kind)), i.ResourceID}, "\x00")))
	readable := func(s string) string { return strings.TrimRight(s[:min(len(s), maxPart)], ".-") }
	return readable(p.Name) + "-" + readable(i.Name) + "-" + hex.EncodeToString(sum[:8])
}
