package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/doc/comment"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

const modulePath = "github.com/podidentity/podidentity/"

// goPackage is a package of the main module.
type goPackage struct {
	path    string   // below the module
	comment string   // the first paragraph of its comment, as Markdown
	imports []string // packages of the module that it imports
}

// packageSections replaces the generated part of the architecture page: a diagram of the imports, and the first
// paragraph of each package's comment.
func packageSections(root string, current []byte) ([]byte, error) {
	packages, err := readPackages(root)
	if err != nil {
		return nil, err
	}
	d := &document{}
	d.paragraph("```mermaid\n" + importDiagram(packages) + "```")
	var rows [][]string
	for _, p := range slices.SortedFunc(maps.Values(packages), func(a, b goPackage) int { return cmp.Compare(a.path, b.path) }) {
		rows = append(rows, []string{fmt.Sprintf("[%s](../%s)", code(p.path), p.path), p.comment})
	}
	d.table([]string{"Package", "What it is"}, rows)
	d.WriteString("\n")
	return replaceGenerated(current, "the packages", d.Bytes())
}

// readPackages returns the packages of the main module by path: the commands, and the packages that another package
// imports outside of its tests.
func readPackages(root string) (map[string]goPackage, error) {
	packages := map[string]goPackage{}
	err := fs.WalkDir(os.DirFS(root), ".", func(file string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return err
		}
		if file != "." {
			_, notAModule := os.Stat(filepath.Join(root, file, "go.mod"))
			if notAModule == nil || strings.HasPrefix(path.Base(file), ".") || file == "bin" || path.Base(file) == "testdata" {
				return fs.SkipDir
			}
		}
		p, ok, err := readPackage(root, file)
		if ok {
			packages[file] = p
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	imported := map[string]bool{}
	for _, p := range packages {
		for _, i := range p.imports {
			imported[i] = true
		}
	}
	maps.DeleteFunc(packages, func(name string, _ goPackage) bool { return !imported[name] && !strings.HasPrefix(name, "cmd/") })
	return packages, nil
}

func readPackage(root, folder string) (p goPackage, ok bool, err error) {
	files, err := filepath.Glob(filepath.Join(root, folder, "*.go"))
	if err != nil {
		return p, false, err
	}
	imports := map[string]bool{}
	p.path = folder
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return p, false, err
		}
		ok = true
		for _, i := range file.Imports {
			if inner, ours := strings.CutPrefix(strings.Trim(i.Path.Value, `"`), modulePath); ours {
				imports[inner] = true
			}
		}
		if file.Doc != nil {
			p.comment = firstParagraph(file.Doc)
		}
	}
	p.imports = slices.Sorted(maps.Keys(imports))
	return p, ok, nil
}

// firstParagraph returns the first paragraph of a comment as Markdown in one line.
func firstParagraph(group *ast.CommentGroup) string {
	doc := new(comment.Parser).Parse(group.Text())
	if len(doc.Content) == 0 {
		return ""
	}
	doc.Content = doc.Content[:1]
	printer := comment.Printer{DocLinkURL: func(*comment.DocLink) string { return "" }}
	return strings.Join(strings.Fields(string(printer.Markdown(doc))), " ")
}

// importDiagram returns a Mermaid diagram of the imports. It leaves out an import of a package that is also imported
// indirectly, and the packages below internal, which most packages import.
func importDiagram(packages map[string]goPackage) string {
	var b strings.Builder
	b.WriteString("flowchart TD\n")
	for _, name := range slices.Sorted(maps.Keys(packages)) {
		if strings.HasPrefix(name, "internal/") {
			continue
		}
		fmt.Fprintf(&b, "  %s[%s]\n", nodeID(name), name)
		for _, target := range packages[name].imports {
			if !strings.HasPrefix(target, "internal/") && !reachable(packages, name, target, target) {
				fmt.Fprintf(&b, "  %s --> %s\n", nodeID(name), nodeID(target))
			}
		}
	}
	return b.String()
}

func nodeID(name string) string { return strings.NewReplacer("/", "_", "-", "_").Replace(name) }

// reachable reports whether from imports target directly or indirectly. It ignores the direct import of skip by from.
func reachable(packages map[string]goPackage, from, target, skip string) bool {
	for _, next := range packages[from].imports {
		if next == skip {
			continue
		}
		if next == target || reachable(packages, next, target, "") {
			return true
		}
	}
	return false
}
