package cluster

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/internal/kube"
)

func TestNamesOfAssignmentsAreValidAndUnique(t *testing.T) {
	long := strings.Repeat("a.b-", 63) + "c"
	meta := func(namespace, name string) kube.Meta { return kube.Meta{Namespace: namespace, Name: name} }
	seen := map[string]string{}
	for _, p := range []Pod{{UID: "1", Meta: meta("n", "a-b")}, {UID: "2", Meta: meta("n", "a")}, {UID: "3", Meta: meta("n", "a")},
		{UID: "4", Meta: meta("n", long)}, {UID: "5", Meta: meta("n", strings.Repeat("a", 99)+".b")}} {
		for _, i := range []AzureIdentity{
			{Meta: meta("n", "c")}, {Meta: meta("n", "b-c")}, {Meta: meta("m", "c")}, {Meta: meta("n", long)},
			{Meta: meta("n", "c"), ResourceID: "/x"}, {Meta: meta("n", "c"), Value: identity.Identity{Kind: identity.Federated}},
		} {
			name, what := assignmentName(&p, &i), p.UID+" "+i.Key()+" "+i.ResourceID+" "+string(rune('0'+i.Value.Kind))
			if problems := validation.IsDNS1123Subdomain(name); len(problems) > 0 {
				t.Errorf("%s: %v", name, problems)
			}
			if other, ok := seen[name]; ok {
				t.Errorf("%s is the name of both %s and %s", name, other, what)
			}
			seen[name] = what
		}
	}
}
