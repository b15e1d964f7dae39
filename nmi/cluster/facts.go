package cluster

import (
	"hash/maphash"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
)

// bySelector is the index of bindings, see bindingBucket.
const bySelector = "selector"

// bindingBuckets is the number of values of the index bySelector. client-go needs some 500 bytes per value. With
// thousands of selectors, one value for each selector would take a quarter of the heap. So selectors share values, and
// Facts compares the selector of each binding that it finds under a value.
const bindingBuckets = 1024

// Facts returns the objects that the decision about the pod needs.
func (c *Cache) Facts(pod *corev1.Pod) (identity.Facts, error) {
	var facts identity.Facts
	exceptions, err := c.exceptions.GetIndexer().ByIndex(cache.NamespaceIndex, pod.Namespace)
	if err != nil {
		return facts, err
	}
	for _, o := range exceptions {
		facts.Exceptions = append(facts.Exceptions, o.(*trimmed[identity.Exception]).value)
	}
	label := pod.Labels[v1.BindingLabel]
	bindings, err := c.bindings.GetIndexer().ByIndex(bySelector, c.bindingBucket(pod.Namespace, label))
	if err != nil {
		return facts, err
	}
	for _, o := range bindings {
		b := o.(*trimmed[identity.Binding]).value
		if b.Selector != label || b.Namespace != pod.Namespace && !c.crossesNamespaces() {
			continue
		}
		facts.Bindings = append(facts.Bindings, b)
		found, ok, err := c.identities.GetIndexer().GetByKey(kube.Key(b.Namespace, b.AzureIdentity))
		if err != nil {
			return facts, err
		}
		if ok {
			facts.Identities = append(facts.Identities, found.(*trimmed[identity.Identity]).value)
		}
	}
	if c.assignments == nil {
		return facts, nil
	}
	assignments, err := c.assignmentsOf(pod)
	for _, o := range assignments {
		facts.Assignments = append(facts.Assignments, o.(*trimmed[assignment]).value.Assignment)
	}
	return facts, err
}

// bindingSelector is the index function of bindings.
func (c *Cache) bindingSelector(o any) ([]string, error) {
	b, ok := o.(*trimmed[identity.Binding])
	if !ok {
		return nil, nil
	}
	return []string{c.bindingBucket(b.value.Namespace, b.value.Selector)}, nil
}

// bindingBucket returns the value, in the index bySelector, of bindings with this selector. It is a hash of the
// selector. If bindings match only pods of their own namespace, the hash also includes the namespace. The seed is
// random in each process, so that nobody can choose selectors that all get the same index value.
func (c *Cache) bindingBucket(namespace, selector string) string {
	var h maphash.Hash
	h.SetSeed(c.seed)
	if !c.crossesNamespaces() {
		_, _ = h.WriteString(namespace) // never fails
		_ = h.WriteByte('/')
	}
	_, _ = h.WriteString(selector)
	return strconv.FormatUint(h.Sum64()%bindingBuckets, 10)
}

// crossesNamespaces reports whether bindings match pods of other namespaces.
func (c *Cache) crossesNamespaces() bool {
	return c.cfg.Rules.Mode == identity.Standard && !c.cfg.Rules.ForceNamespaced
}
