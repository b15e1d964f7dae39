package mic

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// Names of the objects. There are few names, so that several actions change the same object.
var (
	namespaces    = []string{"blue", "green", "red"}
	podNames      = []string{"p0", "p1", "p2", "p3"}
	selectors     = []string{"s0", "s1", "s2"}
	identityNames = []string{"i0", "i1", "i2"} // of AzureIdentities
)

var actions = []action{
	{12, createPod},
	{3, schedulePod},
	{6, deletePod},
	{3, replacePod},
	{3, finishPod},
	{4, relabelPod},
	{4, createBinding},
	{4, deleteBinding},
	{3, editBinding},
	{3, createIdentity},
	{3, deleteIdentity},
	{5, editIdentity},
	{2, deleteNode},
	{2, createNode},
	{1, deleteNamespace},
	{2, deleteAssignment},
	{3, changeDelay},
	{7, failARMRequests},
	{4, makeIdentityRefused},
	{2, makeIdentityAccepted},
	{3, detachManually},
	{2, attachManually},
	{1, setMachineState},
	{3, failAPIRequests},
	{2, makeAPIUnavailable},
	{2, expireWatches},
	{2, delayWatch},
	{6, crashLeader},
	{2, changeLeader},
}

func key(o metav1.Object) string { return o.GetNamespace() + "/" + o.GetName() }

// anyOf picks one of the objects of a kind that satisfy a condition; nil if there is none.
func anyOf[T any](s *sequence, r *rand.Rand, which func(*T) bool) *T {
	found := slices.DeleteFunc(listObjects[T](s.api), func(o *T) bool { return !which(o) })
	if len(found) == 0 {
		return nil
	}
	return found[r.IntN(len(found))]
}

func anyNode(s *sequence, r *rand.Rand) string {
	n := anyOf(s, r, func(*corev1.Node) bool { return true })
	if n == nil || r.IntN(12) == 0 {
		return ""
	}
	return n.Name
}

func createPod(s *sequence, r *rand.Rand) string {
	selector := pick(r, append(selectors, "")...)
	p, err := createObject(s.api, newPod(pick(r, namespaces...), pick(r, podNames...), anyNode(s, r), selector))
	if err != nil {
		return ""
	}
	return fmt.Sprintf("pod %s (%s) with %q on %q", key(p), p.UID, selector, p.Spec.NodeName)
}

func schedulePod(s *sequence, r *rand.Rand) string {
	p := anyOf(s, r, func(p *corev1.Pod) bool { return p.Spec.NodeName == "" })
	node := anyNode(s, r)
	if p == nil || node == "" {
		return ""
	}
	editObject(s.api, p.Namespace, p.Name, func(p *corev1.Pod) { p.Spec.NodeName, p.Status.Phase = node, corev1.PodRunning })
	return fmt.Sprintf("pod %s is scheduled to %s", key(p), node)
}

func deletePod(s *sequence, r *rand.Rand) string {
	p := anyOf(s, r, func(p *corev1.Pod) bool { return p.DeletionTimestamp == nil })
	if p == nil {
		return ""
	}
	if r.IntN(3) == 0 {
		deleteObject[corev1.Pod](s.api, p.Namespace, p.Name, 0)
		return fmt.Sprintf("pod %s is deleted with grace period 0", key(p))
	}
	deleteObject[corev1.Pod](s.api, p.Namespace, p.Name)
	return fmt.Sprintf("pod %s is deleted", key(p))
}

// replacePod replaces a pod as a StatefulSet does: another pod of the same name follows at once, possibly on another
// node.
func replacePod(s *sequence, r *rand.Rand) string {
	p := anyOf(s, r, func(*corev1.Pod) bool { return true })
	if p == nil {
		return ""
	}
	selector := p.Labels[v1.BindingLabel]
	if r.IntN(3) == 0 {
		selector = pick(r, selectors...)
	}
	deleteObject[corev1.Pod](s.api, p.Namespace, p.Name, 0)
	again, err := createObject(s.api, newPod(p.Namespace, p.Name, anyNode(s, r), selector))
	if err != nil {
		return fmt.Sprintf("pod %s is deleted with grace period 0", key(p))
	}
	return fmt.Sprintf("pod %s is replaced by %s with %q on %q", key(p), again.UID, selector, again.Spec.NodeName)
}

func finishPod(s *sequence, r *rand.Rand) string {
	p := anyOf(s, r, func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodRunning })
	if p == nil {
		return ""
	}
	phase := pick(r, corev1.PodSucceeded, corev1.PodFailed)
	editObject(s.api, p.Namespace, p.Name, func(p *corev1.Pod) { p.Status.Phase = phase })
	return fmt.Sprintf("pod %s has phase %s", key(p), phase)
}

func relabelPod(s *sequence, r *rand.Rand) string {
	p := anyOf(s, r, func(*corev1.Pod) bool { return true })
	if p == nil {
		return ""
	}
	selector := pick(r, append(selectors, "")...)
	editObject(s.api, p.Namespace, p.Name, func(p *corev1.Pod) {
		if p.Labels = map[string]string{v1.BindingLabel: selector}; selector == "" {
			p.Labels = nil
		}
	})
	return fmt.Sprintf("pod %s has label %q now", key(p), selector)
}

func createBinding(s *sequence, r *rand.Rand) string {
	namespace, name, selector := pick(r, namespaces...), pick(r, identityNames...), pick(r, selectors...)
	b, err := createObject(s.api, &v1.AzureIdentityBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("%s-%s", name, selector)},
		Spec:       v1.AzureIdentityBindingSpec{AzureIdentity: name, Selector: selector},
	})
	if err != nil {
		return ""
	}
	return fmt.Sprintf("binding %s: %s for %q", key(b), name, selector)
}

func deleteBinding(s *sequence, r *rand.Rand) string {
	b := anyOf(s, r, func(*v1.AzureIdentityBinding) bool { return true })
	if b == nil {
		return ""
	}
	deleteObject[v1.AzureIdentityBinding](s.api, b.Namespace, b.Name)
	if r.IntN(3) > 0 {
		return fmt.Sprintf("binding %s is deleted", key(b))
	}
	s.schedule(randomDuration(r, 0, 3*time.Minute), func() {
		if _, err := createObject(s.api, &v1.AzureIdentityBinding{ObjectMeta: metav1.ObjectMeta{Namespace: b.Namespace, Name: b.Name}, Spec: b.Spec}); err == nil {
			s.logf("   binding %s is created again", key(b))
		}
	})
	return fmt.Sprintf("binding %s is deleted for a while", key(b))
}

func editBinding(s *sequence, r *rand.Rand) string {
	b := anyOf(s, r, func(*v1.AzureIdentityBinding) bool { return true })
	if b == nil {
		return ""
	}
	name, selector := b.Spec.AzureIdentity, b.Spec.Selector
	if r.IntN(2) == 0 {
		name = pick(r, identityNames...)
	} else {
		selector = pick(r, selectors...)
	}
	editObject(s.api, b.Namespace, b.Name, func(b *v1.AzureIdentityBinding) { b.Spec.AzureIdentity, b.Spec.Selector = name, selector })
	return fmt.Sprintf("binding %s is for %s and %q now", key(b), name, selector)
}

// randomIdentity returns the spec of an AzureIdentity: mostly a managed identity, with its ID in random letter case.
func randomIdentity(r *rand.Rand) v1.AzureIdentitySpec {
	switch r.IntN(20) {
	case 0:
		return v1.AzureIdentitySpec{Type: v1.ServicePrincipal, TenantID: "contoso.example", ClientID: clientID("sp"), ClientPassword: corev1.SecretReference{Name: "secret"}}
	case 1:
		return v1.AzureIdentitySpec{Type: v1.ServicePrincipalCertificate, TenantID: "contoso.example", ClientID: clientID("spc"), ClientPassword: corev1.SecretReference{Name: "secret"}}
	case 2:
		return v1.AzureIdentitySpec{Type: v1.Federated, TenantID: "contoso.example", ClientID: clientID("fed")}
	case 3:
		return v1.AzureIdentitySpec{ResourceID: subscription + "/resourceGroups/Identities", ClientID: clientID("none")}
	}
	name := pick(r, managedNames...)
	id := identityID(name)
	switch r.IntN(4) {
	case 0:
		id = strings.ToLower(id)
	case 1:
		id = strings.ToUpper(id)
	}
	return v1.AzureIdentitySpec{ResourceID: id, ClientID: clientID(name)}
}

func describeSpec(i v1.AzureIdentitySpec) string {
	return fmt.Sprintf("type %d %s", i.Type, i.ResourceID[strings.LastIndex(i.ResourceID, "/")+1:])
}

func createIdentity(s *sequence, r *rand.Rand) string {
	i := &v1.AzureIdentity{ObjectMeta: metav1.ObjectMeta{Namespace: pick(r, namespaces...), Name: pick(r, identityNames...)}, Spec: randomIdentity(r)}
	if _, err := createObject(s.api, i); err != nil {
		return ""
	}
	return fmt.Sprintf("identity %s: %s", key(i), describeSpec(i.Spec))
}

func deleteIdentity(s *sequence, r *rand.Rand) string {
	i := anyOf(s, r, func(*v1.AzureIdentity) bool { return true })
	if i == nil {
		return ""
	}
	deleteObject[v1.AzureIdentity](s.api, i.Namespace, i.Name)
	if r.IntN(3) > 0 {
		return fmt.Sprintf("identity %s is deleted", key(i))
	}
	s.schedule(randomDuration(r, 0, 3*time.Minute), func() {
		if _, err := createObject(s.api, &v1.AzureIdentity{ObjectMeta: metav1.ObjectMeta{Namespace: i.Namespace, Name: i.Name}, Spec: i.Spec}); err == nil {
			s.logf("   identity %s is created again", key(i))
		}
	})
	return fmt.Sprintf("identity %s is deleted for a while", key(i))
}

func editIdentity(s *sequence, r *rand.Rand) string {
	i := anyOf(s, r, func(*v1.AzureIdentity) bool { return true })
	if i == nil {
		return ""
	}
	text := ""
	switch spec := randomIdentity(r); r.IntN(4) {
	case 0:
		editObject(s.api, i.Namespace, i.Name, func(i *v1.AzureIdentity) { i.Spec.ClientID = clientID(fmt.Sprint(r.IntN(100))) })
		text = "another client ID"
	case 1:
		editObject(s.api, i.Namespace, i.Name, func(i *v1.AzureIdentity) {
			if _, ok := i.Annotations[v1.BehaviorAnnotation]; ok {
				i.Annotations = nil
				text = "no annotation"
				return
			}
			i.Annotations = map[string]string{v1.BehaviorAnnotation: v1.BehaviorNamespaced}
			text = "the annotation that restricts it to its namespace"
		})
	default:
		editObject(s.api, i.Namespace, i.Name, func(i *v1.AzureIdentity) { i.Spec = spec })
		text = describeSpec(spec)
	}
	return fmt.Sprintf("identity %s has %s now", key(i), text)
}

// deleteNode deletes a node, possibly also its machine, and some time later the pods of the node. It does not delete a
// node with assignments of AAD Pod Identity: only the node tells which machine these assignments belong to.
func deleteNode(s *sequence, r *rand.Rand) string {
	n := anyOf(s, r, func(*corev1.Node) bool { return true })
	if n == nil || anyOf(s, r, func(a *v1.AzureAssignedIdentity) bool { return ownerPodUID(a) == "" && a.Spec.NodeName == n.Name }) != nil {
		return ""
	}
	deleteObject[corev1.Node](s.api, "", n.Name)
	text := fmt.Sprintf("node %s is deleted", n.Name)
	if id := machineOfProviderID(n.Spec.ProviderID); strings.Contains(id, "/virtualmachines/") && r.IntN(2) == 0 {
		s.deleteMachine(id)
		text += " and its machine too"
	}
	s.schedule(randomDuration(r, 0, time.Minute), func() { s.deletePodsOf(n.Name) })
	return text
}

func (s *sequence) deletePodsOf(node string) {
	for _, n := range listObjects[corev1.Node](s.api) {
		if n.Name == node {
			return // the node exists again
		}
	}
	for _, p := range listObjects[corev1.Pod](s.api) {
		if p.Spec.NodeName == node {
			deleteObject[corev1.Pod](s.api, p.Namespace, p.Name, 0)
		}
	}
}

// createNode creates a missing node, at first possibly without a provider ID.
func createNode(s *sequence, r *rand.Rand) string {
	for name, providerID := range sorted(nodeProviders) {
		if _, ok := getObject[corev1.Node](s.api, "", name); ok {
			continue
		}
		s.deletePodsOf(name)
		first := providerID
		if r.IntN(3) == 0 {
			first = ""
			s.schedule(randomDuration(r, 0, 30*time.Second), func() {
				editObject(s.api, "", name, func(n *corev1.Node) { n.Spec.ProviderID = providerID })
			})
		}
		s.addMachine(machineOfProviderID(providerID))
		s.addNode(name, first)
		return fmt.Sprintf("node %s (provider ID %q at first)", name, lastSegment(first))
	}
	return ""
}

// deleteNamespace deletes a namespace, and schedules the creation of an empty namespace of the same name.
func deleteNamespace(s *sequence, r *rand.Rand) string {
	name := pick(r, namespaces...)
	if !deleteObject[corev1.Namespace](s.api, "", name) {
		return ""
	}
	s.schedule(3*time.Minute, func() { s.restoreNamespace(name) })
	return fmt.Sprintf("namespace %s is deleted", name)
}

func (s *sequence) restoreNamespace(name string) {
	if _, there := getObject[corev1.Namespace](s.api, "", name); !there {
		s.addNamespace(name)
	}
}

// deleteAssignment deletes an assignment as a user would, possibly after removing its finalizer. Assignments of AAD Pod
// Identity keep their finalizer, because nothing else records what AAD Pod Identity attached.
func deleteAssignment(s *sequence, r *rand.Rand) string {
	a := anyOf(s, r, func(*v1.AzureAssignedIdentity) bool { return true })
	if a == nil {
		return ""
	}
	text := fmt.Sprintf("%s is deleted by a user", describeAssignment(a))
	if r.IntN(3) == 0 && ownerPodUID(a) != "" {
		editObject(s.api, a.Namespace, a.Name, func(a *v1.AzureAssignedIdentity) { a.Finalizers = nil })
		text += ", after removing its finalizer"
	}
	deleteObject[v1.AzureAssignedIdentity](s.api, a.Namespace, a.Name)
	return text
}
