package identity

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
	"testing"
)

func TestEachReasonIsExplainedOnce(t *testing.T) {
	explained := map[Reason]int{}
	for _, e := range Explanations() {
		explained[e.Reason]++
		if e.Cause == "" || e.Remedy == "" {
			t.Errorf("%s has no cause or no remedy", e.Reason)
		}
		if text := e.Cause + e.Remedy + e.Command; strings.ContainsAny(text, "\n") {
			t.Errorf("%s: a text has more than one line", e.Reason)
		}
	}
	for _, r := range declaredReasons(t) {
		if explained[r] != 1 {
			t.Errorf("%s is explained %d times", r, explained[r])
		}
		delete(explained, r)
	}
	for r := range explained {
		t.Errorf("%s is explained, but not declared in reason.go", r)
	}
}

// declaredReasons reads the constants of reason.go, since Go cannot list them.
func declaredReasons(t *testing.T) []Reason {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "reason.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var all []Reason
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if kind, ok := spec.Type.(*ast.Ident); !ok || kind.Name != "Reason" {
			t.Errorf("a constant of reason.go is no Reason: %s", spec.Names[0].Name)
			return true
		}
		for _, value := range spec.Values {
			text, err := strconv.Unquote(value.(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, Reason(text))
		}
		return true
	})
	if len(all) < 30 {
		t.Fatalf("only %d reasons found in reason.go", len(all))
	}
	return all
}
