package docs

import (
	"path"
	"strings"
	"testing"

	"github.com/podidentity/podidentity/identity"
)

func TestLinksLeadToFilesAndHeadings(t *testing.T) {
	pages := readPages(t)
	for _, page := range pages {
		for _, link := range page.links {
			if p := problem(pages, page.path, link); p != "" {
				t.Errorf("%s: the link %q %s", page.path, link, p)
			}
		}
	}
}

func TestABrokenLinkIsFound(t *testing.T) {
	pages := map[string]markdownPage{"README.md": parsePage("README.md", []byte("# One `two_three`\n\n## Again\n\n## Again\n"))}
	for link, broken := range map[string]bool{
		"#one-two_three":              false,
		"#again":                      false,
		"#again-1":                    false,
		"#again-2":                    true,
		"README.md#again":             false,
		blobURL + "README.md#again":   false,
		blobURL + "README.md#missing": true,
		"no-such-file.md":             true,
		"Makefile#help":               true,
		"https://example.com/a#b":     false,
		"https:///a":                  true,
		"ftp://example.com":           true,
		"%zz":                         true,
	} {
		if p := problem(pages, "README.md", link); (p != "") != broken {
			t.Errorf("link %q: got problem %q, want broken = %v", link, p, broken)
		}
	}
}

func TestEachReasonHasItsAnchor(t *testing.T) {
	pages := readPages(t)
	for _, e := range identity.Explanations() {
		if p := problem(pages, "README.md", e.Reason.URL()); p != "" {
			t.Errorf("reason code %s: its address %s %s", e.Reason, e.Reason.URL(), p)
		}
		if !strings.HasSuffix(e.Reason.URL(), "docs/troubleshooting.md#"+string(e.Reason)) {
			t.Errorf("reason code %s: want an address that ends in docs/troubleshooting.md# and the code, got %s",
				e.Reason, e.Reason.URL())
		}
	}
}

func TestEachDocumentIsReachableFromREADME(t *testing.T) {
	pages := readPages(t)
	reached := map[string]bool{"README.md": true}
	for queue := []string{"README.md"}; len(queue) > 0; queue = queue[1:] {
		from := pages[queue[0]]
		for _, link := range from.links {
			file, _, _ := strings.Cut(link, "#")
			if target := path.Join(path.Dir(from.path), file); !reached[target] && pages[target].path != "" {
				reached[target] = true
				queue = append(queue, target)
			}
		}
	}
	for file := range pages {
		if strings.HasPrefix(file, "docs/") && !reached[file] {
			t.Errorf("no links lead from README.md to %s", file)
		}
	}
}

func TestShortPagesStayShort(t *testing.T) {
	pages := readPages(t)
	if n := pages["README.md"].lines; n >= 200 {
		t.Errorf("README.md has %d lines, want fewer than 200; move details to docs/", n)
	}
	terms := len(pages["docs/glossary.md"].anchors) - 1 // without the title
	if terms < 1 || terms > 20 {
		t.Errorf("the glossary has %d terms, each a heading; want 1 to 20", terms)
	}
}
