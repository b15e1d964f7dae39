package mic

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/podidentity/podidentity/identity"
)

func TestNamesOfAssignmentsAreValidAndNeverMeet(t *testing.T) {
	long := strings.Repeat("a.b-", 63) + "c"
	seen := map[string]string{}
	for _, p := range []Pod{{UID: "1", Object: Object{"n", "a-b", ""}}, {UID: "2", Object: Object{"n", "a", ""}}, {UID: "3", Object: Object{"n", "a", ""}},
		{UID: "4", Object: Object{"n", long, ""}}, {UID: "5", Object: Object{"n", strings.Repeat("a", 99) + ".b", ""}}} {
		for _, i := range []AzureIdentity{
			{Object: Object{"n", "c", ""}}, {Object: Object{"n", "b-c", ""}}, {Object: Object{"m", "c", ""}}, {Object: Object{"n", long, ""}},
			{Object: Object{"n", "c", ""}, ResourceID: "/x"}, {Object: Object{"n", "c", ""}, Value: identity.Identity{Kind: identity.Federated}},
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
