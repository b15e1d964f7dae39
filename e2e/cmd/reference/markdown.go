package main

import (
	"bytes"
	"fmt"
	"strings"
)

// document builds a page of Markdown.
type document struct{ bytes.Buffer }

func newDocument(title, source string) *document {
	d := &document{}
	fmt.Fprintf(d, "# %s\n\n<!-- Generated from %s by `make generate`. Do not edit. -->\n", title, source)
	return d
}

func (d *document) heading(level int, text string) {
	fmt.Fprintf(d, "\n%s %s\n", strings.Repeat("#", level), text)
}

func (d *document) paragraph(text string) { fmt.Fprintf(d, "\n%s\n", text) }

// table writes rows of cells, which are Markdown.
func (d *document) table(header []string, rows [][]string) {
	d.WriteString("\n| " + strings.Join(header, " | ") + " |\n|" + strings.Repeat("---|", len(header)) + "\n")
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, cell := range row {
			cells[i] = tableCell(cell)
		}
		d.WriteString("| " + strings.Join(cells, " | ") + " |\n")
	}
}

// tableCell keeps text from ending its cell or its row.
func tableCell(text string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(text), " "), "|", `\|`)
}

// plain is text of a comment or a schema as Markdown: what could be read as an HTML tag is escaped.
func plain(text string) string {
	return strings.NewReplacer("<", "&lt;", "*", `\*`).Replace(text)
}

func code(text string) string { return "`" + text + "`" }
