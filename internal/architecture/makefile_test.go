package architecture

import (
	"go/ast"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func readMakefile(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The Makefile names each package with tests of the module e2e. It runs those of the root module with ./..., and none of
// other modules.
func TestTheMakefileRunsTheTestsOfEachPackage(t *testing.T) {
	var named []string // folders below e2e
	for line := range strings.Lines(readMakefile(t)) {
		if _, args, found := strings.Cut(line, "$(GOTEST) e2e "); found {
			named = append(named, strings.Fields(args)...)
		}
	}
	for _, f := range parseAll(t) {
		folder := path.Dir(f.path)
		below, inE2E := strings.CutPrefix(folder+"/", "e2e/")
		switch {
		case !strings.HasSuffix(f.path, "_test.go"):
		case strings.HasPrefix(folder, "tools"):
			t.Errorf("%s: no target of the Makefile runs the tests of the module tools", f.path)
		case inE2E && below == "" && !slices.Contains(named, "."), inE2E && below != "" && !slices.Contains(named, "./"+strings.TrimSuffix(below, "/")):
			t.Errorf("%s: no target of the Makefile runs the tests of %s", f.path, folder)
		}
	}
}

var fuzzCommand = regexp.MustCompile(`test (\./\S+) -run '\^\$\$' -fuzz '\^(\w+)\$\$'`)

func TestTheMakefileRunsEachFuzzTarget(t *testing.T) {
	run := map[string]bool{}
	for _, match := range fuzzCommand.FindAllStringSubmatch(readMakefile(t), -1) {
		run[match[1]+" "+match[2]] = true
	}
	for _, f := range parseAll(t) {
		for _, declaration := range f.ast.Decls {
			function, ok := declaration.(*ast.FuncDecl)
			if !ok || !strings.HasSuffix(f.path, "_test.go") || !strings.HasPrefix(function.Name.Name, "Fuzz") {
				continue
			}
			target := "./" + path.Dir(f.path) + " " + function.Name.Name
			if !run[target] {
				t.Errorf("make fuzz does not run %s", target)
			}
			delete(run, target)
		}
	}
	for target := range run {
		t.Errorf("make fuzz runs %s, which does not exist", target)
	}
}
