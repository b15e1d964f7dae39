package architecture

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	module = "github.com/podidentity/podidentity"

	maxFileLines     = 500
	maxFunctionLines = 60
	maxMethods       = 20
)

// file is one parsed Go file of the root module or of the module e2e.
type file struct {
	path      string // below the root of the repository
	lines     int
	generated bool
	ast       *ast.File
	set       *token.FileSet
}

// pkg is the import path of the folder that holds the file.
func (f file) pkg() string { return path.Join(module, path.Dir(f.path)) }

// imports are the packages of this repository that the file imports.
func (f file) imports() []string {
	var found []string
	for _, spec := range f.ast.Imports {
		if name, err := strconv.Unquote(spec.Path.Value); err == nil && strings.HasPrefix(name, module+"/") {
			found = append(found, name)
		}
	}
	return found
}

func parseAll(t *testing.T) []file {
	t.Helper()
	root := filepath.Join("..", "..")
	var files []file
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && name != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "node_modules") {
			return filepath.SkipDir
		}
		if d.IsDir() || filepath.Ext(name) != ".go" {
			return nil
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f := file{lines: bytes.Count(text, []byte("\n")), set: token.NewFileSet()}
		if f.path, err = filepath.Rel(root, name); err != nil {
			return err
		}
		f.path = filepath.ToSlash(f.path)
		f.ast, err = parser.ParseFile(f.set, name, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		f.generated = ast.IsGenerated(f.ast)
		files = append(files, f)
		return nil
	})
	if err != nil {
		t.Fatalf("parsing the repository: %v", err)
	}
	if len(files) < 100 {
		t.Fatalf("only %d Go files were found below %s", len(files), root)
	}
	return files
}

func TestNoPackageImportsItsParent(t *testing.T) {
	for _, f := range parseAll(t) {
		for _, imported := range f.imports() {
			if strings.HasPrefix(f.pkg(), imported+"/") {
				t.Errorf("%s: imports %s, a parent of its own package", f.path, imported)
			}
		}
	}
}

// The compiler refuses a cycle of packages. This test refuses a cycle of top-level folders: if nmi/token imports
// mic/azure and mic imports nmi, no package is in a cycle, and still neither program can be understood without the
// other.
func TestTopLevelFoldersImportEachOtherInOneDirection(t *testing.T) {
	imports := map[string]map[string]string{} // importing folder → imported folder → one of the importing files
	for _, f := range parseAll(t) {
		from := topFolder(f.pkg())
		for _, imported := range f.imports() {
			if to := topFolder(imported); to != from {
				if imports[from] == nil {
					imports[from] = map[string]string{}
				}
				imports[from][to] = f.path
			}
		}
	}
	if cycle := findCycle(imports); cycle != nil {
		t.Errorf("imports between top-level folders form a cycle: %s", strings.Join(cycle, " -> "))
		for i := 1; i < len(cycle); i++ {
			t.Logf("%s imports %s", imports[cycle[i-1]][cycle[i]], cycle[i])
		}
	}
}

func topFolder(pkg string) string {
	folder, _, _ := strings.Cut(strings.TrimPrefix(pkg, module+"/"), "/")
	return folder
}

// findCycle returns the nodes of a cycle, the first one again at the end, or nil.
func findCycle(edges map[string]map[string]string) []string {
	finished := map[string]bool{}
	var path []string
	var visit func(node string) []string
	visit = func(node string) []string {
		if i := slices.Index(path, node); i >= 0 {
			return append(slices.Clone(path[i:]), node)
		}
		if finished[node] {
			return nil
		}
		path = append(path, node)
		for _, next := range slices.Sorted(maps.Keys(edges[node])) {
			if cycle := visit(next); cycle != nil {
				return cycle
			}
		}
		path = path[:len(path)-1]
		finished[node] = true
		return nil
	}
	for _, node := range slices.Sorted(maps.Keys(edges)) {
		if cycle := visit(node); cycle != nil {
			return cycle
		}
	}
	return nil
}

func TestNoPackageOfTheProductImportsTestCode(t *testing.T) {
	for _, f := range parseAll(t) {
		for _, imported := range f.imports() {
			forTests := strings.HasSuffix(imported, "/nmitest") && !strings.HasSuffix(f.path, "_test.go")
			if forTests || topFolder(imported) == "e2e" && topFolder(f.pkg()) != "e2e" {
				t.Errorf("%s: imports %s, which is test code", f.path, imported)
			}
		}
	}
}

func TestNoFileIsTooLong(t *testing.T) {
	for _, f := range parseAll(t) {
		if f.lines > maxFileLines && !f.generated {
			t.Errorf("%s: has %d lines, more than %d", f.path, f.lines, maxFileLines)
		}
	}
}

// The lines of a function are those between the braces of its body, as funlen counts them.
func TestNoFunctionIsTooLong(t *testing.T) {
	for _, f := range parseAll(t) {
		if f.generated {
			continue
		}
		for _, decl := range f.ast.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}
			lines := f.set.Position(fn.Body.Rbrace).Line - f.set.Position(fn.Body.Lbrace).Line - 1
			if lines > maxFunctionLines {
				t.Errorf("%s: function %s has %d lines, more than %d", f.path, fn.Name.Name, lines, maxFunctionLines)
			}
		}
	}
}

func TestNoTypeHasTooManyMethods(t *testing.T) {
	methods := map[string]int{}
	for _, f := range parseAll(t) {
		if f.generated {
			continue
		}
		for _, decl := range f.ast.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv != nil {
				methods[path.Dir(f.path)+"."+receiverType(fn.Recv.List[0].Type)]++
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(methods)) {
		if n := methods[name]; n > maxMethods {
			t.Errorf("%s: has %d methods, more than %d", name, n, maxMethods)
		}
	}
}

func receiverType(expr ast.Expr) string {
	switch e := expr.(type) {
	case *ast.StarExpr:
		return receiverType(e.X)
	case *ast.IndexExpr: // a type parameter
		return receiverType(e.X)
	case *ast.IndexListExpr:
		return receiverType(e.X)
	case *ast.Ident:
		return e.Name
	}
	return "unknown"
}

// If the root module and the module e2e require different versions of one module, Go compiles all packages that depend
// on this module once for each version. The module tools is not compared.
func TestModulesRequireTheSameVersions(t *testing.T) {
	required := map[string]string{} // module → version, from the go.mod files read so far
	for _, folder := range []string{".", "e2e"} {
		text, err := os.ReadFile(filepath.Join("..", "..", folder, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(text), "\n") {
			fields := strings.Fields(strings.TrimPrefix(line, "require "))
			if len(fields) < 2 || !strings.HasPrefix(fields[1], "v") || strings.Contains(line, "=>") {
				continue
			}
			if version, ok := required[fields[0]]; ok && version != fields[1] {
				t.Errorf("%s/go.mod requires %s %s, but the go.mod of another module of this repository requires %s; run go get %[2]s@VERSION in one of the two folders", folder, fields[0], fields[1], version)
			}
			required[fields[0]] = fields[1]
		}
	}
}
