// Command reference writes the pages of docs/reference, the section of reason codes of docs/troubleshooting.md and the
// packages of docs/architecture.md. It generates them from the code, the chart's schema, values and templates, and the
// custom resource definitions. With -check it writes nothing and fails if a page is not up to date.
//
// It prevents differences between these documents and the product: nobody edits the generated text by hand.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// page is one generated file. Its content may depend on the current content of the file, if only a part is generated.
type page struct {
	path   string // below the root of the repository
	render func(root string, current []byte) ([]byte, error)
}

var pages = []page{
	{"docs/reference/chart-values.md", whole(chartValues)},
	{"docs/reference/crds.md", whole(customResources)},
	{"docs/reference/metrics.md", whole(metrics)},
	{"docs/reference/mic-flags.md", whole(micFlags)},
	{"docs/reference/nmi-flags.md", whole(nmiFlags)},
	{"docs/reference/reason-codes.md", whole(reasonCodes)},
	{"docs/architecture.md", packageSections},
	{"docs/troubleshooting.md", reasonSections},
}

func whole(render func(root string) ([]byte, error)) func(string, []byte) ([]byte, error) {
	return func(root string, _ []byte) ([]byte, error) { return render(root) }
}

func main() {
	root := flag.String("root", "..", "`folder` of the repository")
	check := flag.Bool("check", false, "write nothing, and fail if a page is not up to date")
	flag.Parse()
	if err := run(*root, *check); err != nil {
		fmt.Fprintln(os.Stderr, "reference:", err)
		os.Exit(1)
	}
}

func run(root string, check bool) error {
	var outdated []error
	for _, p := range pages {
		path := filepath.Join(root, p.path)
		current, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		text, err := p.render(root, current)
		if err != nil {
			return fmt.Errorf("rendering %s: %w", p.path, err)
		}
		if bytes.Equal(text, current) {
			continue
		}
		if check {
			outdated = append(outdated, fmt.Errorf("%s is not up to date; run make generate and commit", p.path))
			continue
		}
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return err
		}
	}
	return errors.Join(outdated...)
}
