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
	for _, p := range []pod{{uid: "1", object: object{"n", "a-b", ""}}, {uid: "2", object: object{"n", "a", ""}}, {uid: "3", object: object{"n", "a", ""}},
		{uid: "4", object: object{"n", long, ""}}, {uid: "5", object: object{"n", strings.Repeat("a", 99) + ".b", ""}}} {
		for _, i := range []azureIdentity{
			{object: object{"n", "c", ""}}, {object: object{"n", "b-c", ""}}, {object: object{"m", "c", ""}}, {object: object{"n", long, ""}},
			{object: object{"n", "c", ""}, resource: "/x"}, {object: object{"n", "c", ""}, value: identity.Identity{Kind: identity.Federated}},
		} {
			name, what := assignmentName(&p, &i), p.uid+" "+i.key()+" "+i.resource+" "+string(rune('0'+i.value.Kind))
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
