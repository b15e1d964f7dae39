package identity

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestEachReasonIsExplainedOnce(t *testing.T) {
	explained := map[Reason]int{}
	for _, e := range Explanations() {
		explained[e.Reason]++
		if strings.TrimSpace(e.Cause) == "" || strings.TrimSpace(e.Remedy) == "" {
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
		t.Errorf("%s is explained, but not declared", r)
	}
}

// declaredReasons reads the constants of the package, since Go cannot list them.
func declaredReasons(t *testing.T) []Reason {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var all []Reason
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		found, others := reasonConstants(t, name, string(text))
		if name == "reason.go" && len(others) > 0 {
			t.Errorf("constants of reason.go are no Reasons: %v", others)
		}
		all = append(all, found...)
	}
	if len(all) < 30 {
		t.Fatalf("only %d reasons found in the package", len(all))
	}
	return all
}

// reasonConstants returns the values of the constants of type Reason in a file, and the names of its other constants.
// The type stands before the value, or converts it: Reason("x").
func reasonConstants(t *testing.T, name, text string) (reasons []Reason, others []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), name, text, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	isReason := func(e ast.Expr) bool {
		id, ok := e.(*ast.Ident)
		return ok && id.Name == "Reason"
	}
	addConstant := func(spec *ast.ValueSpec, i int) {
		if i >= len(spec.Values) { // repeats the expression of the constant above, such as iota
			others = append(others, spec.Names[i].Name)
			return
		}
		value, typed := spec.Values[i], isReason(spec.Type)
		if call, ok := value.(*ast.CallExpr); ok && isReason(call.Fun) && len(call.Args) == 1 {
			value, typed = call.Args[0], true
		}
		if !typed {
			others = append(others, spec.Names[i].Name)
			return
		}
		literal, ok := value.(*ast.BasicLit)
		if !ok {
			t.Fatalf("%s: the value of %s is not a literal", name, spec.Names[i].Name)
		}
		reason, err := strconv.Unquote(literal.Value)
		if err != nil {
			t.Fatal(err)
		}
		reasons = append(reasons, Reason(reason))
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if group, ok := n.(*ast.GenDecl); ok && group.Tok == token.CONST {
			for _, spec := range group.Specs {
				for i := range spec.(*ast.ValueSpec).Names {
					addConstant(spec.(*ast.ValueSpec), i)
				}
			}
		}
		return true
	})
	return reasons, others
}

func TestReasonsAreFoundInBothFormsOfDeclaration(t *testing.T) {
	reasons, others := reasonConstants(t, "x.go", `package identity
const (
	A    Reason = "a"
	B, C        = Reason("b"), "c"
	D, E Reason = "d", "e"
)
var F Reason = "f"
`)
	if want := []Reason{"a", "b", "d", "e"}; !slices.Equal(reasons, want) || !slices.Equal(others, []string{"C"}) {
		t.Errorf("got the reasons %v and the others %v, want %v and C", reasons, others, want)
	}
}
