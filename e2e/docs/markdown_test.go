// Package docs checks the documents of the repository: that links and anchors exist, that each reason code has an
// anchor, that links lead from README.md to each document, and that the pages that must be short are short. It sends
// nothing: of an external address it checks only the syntax.
package docs

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/text"
)

const (
	root = "../.."
	// blobURL is the beginning of a link to a file on GitHub. The path of the file follows.
	blobURL = "https://github.com/podidentity/podidentity/blob/main/"
)

// markdownPage is a Markdown file: the anchors that links can name, and its own links.
type markdownPage struct {
	path    string // below the root
	anchors map[string]bool
	links   []string
	lines   int
}

// readPages reads the Markdown files of the repository, by path. It skips hidden folders, each folder node_modules, and
// the folder bin of the root.
func readPages(t *testing.T) map[string]markdownPage {
	t.Helper()
	pages := map[string]markdownPage{}
	err := fs.WalkDir(os.DirFS(root), ".", func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() {
			if name := entry.Name(); file != "." && strings.HasPrefix(name, ".") || name == "node_modules" || file == "bin" {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(file) != ".md" {
			return nil
		}
		source, err := os.ReadFile(filepath.Join(root, file))
		pages[file] = parsePage(file, source)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(pages) == 0 {
		t.Fatal("no Markdown file found")
	}
	return pages
}

func parsePage(file string, source []byte) markdownPage {
	p := markdownPage{path: file, anchors: map[string]bool{}, lines: bytes.Count(source, []byte("\n"))}
	tree := goldmark.New(goldmark.WithExtensions(extension.GFM)).Parser().Parse(text.NewReader(source))
	_ = ast.Walk(tree, func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		if !entering {
			return ast.WalkContinue, nil
		}
		switch n := n.(type) {
		case *ast.Heading:
			p.addAnchor(anchorOf(plainText(n, source)))
		case *ast.Link:
			p.links = append(p.links, string(n.Destination))
		case *ast.Image:
			p.links = append(p.links, string(n.Destination))
		case *ast.AutoLink:
			p.links = append(p.links, string(n.URL(source)))
		}
		return ast.WalkContinue, nil
	})
	return p
}

// addAnchor adds the anchor of a heading. It appends a number to a repeated anchor, as GitHub does.
func (p markdownPage) addAnchor(anchor string) {
	unique := anchor
	for i := 1; p.anchors[unique]; i++ {
		unique = fmt.Sprintf("%s-%d", anchor, i)
	}
	p.anchors[unique] = true
}

// anchorOf returns GitHub's anchor of a heading: lower case, hyphens for spaces, no punctuation but hyphen and
// underscore.
func anchorOf(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsNumber(r):
			return unicode.ToLower(r)
		}
		return -1
	}, strings.TrimSpace(heading))
}

func plainText(n ast.Node, source []byte) string {
	var b strings.Builder
	_ = ast.Walk(n, func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		if t, ok := n.(*ast.Text); ok && entering {
			b.Write(t.Value(source))
		}
		return ast.WalkContinue, nil
	})
	return b.String()
}

// problem returns what is wrong with a link on the page with the path from, or "" if nothing is wrong.
func problem(pages map[string]markdownPage, from, link string) string {
	u, err := url.Parse(link)
	if err != nil {
		return "is malformed: " + err.Error()
	}
	var target string
	switch {
	case strings.HasPrefix(link, blobURL):
		target = strings.TrimPrefix(u.Path, "/podidentity/podidentity/blob/main/")
	case u.Scheme == "mailto":
		return ""
	case u.Scheme != "":
		if u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
			return "is neither a file nor a web address"
		}
		return ""
	case u.Path == "":
		target = from
	default:
		target = path.Join(path.Dir(from), u.Path)
	}
	if _, err := os.Stat(filepath.Join(root, target)); err != nil {
		return "names a file or folder that does not exist"
	}
	if u.Fragment == "" {
		return ""
	}
	page, ok := pages[target]
	if !ok {
		return "has an anchor, but the file is not Markdown"
	}
	if !page.anchors[u.Fragment] {
		return "names a heading that does not exist"
	}
	return ""
}
