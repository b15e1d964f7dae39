package cluster

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/identity"
)

// There are three times as many selectors as index values, so bindings with different selectors share an index value.
func TestAPodGetsOnlyItsOwnBindingsOfASharedIndexValue(t *testing.T) {
	for _, c := range []struct {
		rules identity.Rules
		want  int
	}{
		{identity.Rules{Mode: identity.Managed}, 1},
		{identity.Rules{Mode: identity.Standard}, 2},
		{identity.Rules{Mode: identity.Standard, ForceNamespaced: true}, 1},
	} {
		client, err := NewClient(&rest.Config{Host: "http://127.0.0.1:1"}, "node1", nil)
		if err != nil {
			t.Fatal(err)
		}
		w, err := NewCache(client, Config{Node: "node1", Rules: c.rules})
		if err != nil {
			t.Fatal(err)
		}
		const selectors = 3 * bindingBuckets
		for i := range selectors {
			for _, namespace := range []string{"red", "blue"} {
				o, err := trim(&v1.AzureIdentityBinding{
					ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint(i)},
					Spec:       v1.AzureIdentityBindingSpec{AzureIdentity: fmt.Sprint(i), Selector: fmt.Sprint("app-", i)},
				})
				if err != nil {
					t.Fatal(err)
				}
				if err := w.bindings.GetIndexer().Add(o); err != nil {
					t.Fatal(err)
				}
			}
		}
		if n := len(w.bindings.GetIndexer().ListIndexFuncValues(bySelector)); n > bindingBuckets {
			t.Errorf("the index bySelector has %d values, more than bindingBuckets", n)
		}
		for i := range selectors {
			label := fmt.Sprint("app-", i)
			facts, err := w.Facts(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "red", Name: "p", Labels: map[string]string{v1.BindingLabel: label}}})
			if err != nil {
				t.Fatal(err)
			}
			own := false
			for _, b := range facts.Bindings {
				own = own || b.Namespace == "red"
				if b.Selector != label {
					t.Fatalf("%+v: Facts of a pod with the label %s has a binding with another selector: %+v", c.rules, label, b)
				}
			}
			if len(facts.Bindings) != c.want || !own {
				t.Fatalf("%+v: Facts of the pod has the bindings %+v; want %d, one of them in the namespace of the pod", c.rules, facts.Bindings, c.want)
			}
		}
	}
}
