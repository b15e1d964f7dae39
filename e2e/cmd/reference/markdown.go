package main

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// document builds a page of Markdown.
type document struct{ bytes.Buffer }

func newDocument(title, source string) *document {
	d := &document{}
	fmt.Fprintf(d, "# %s\n\n%s", title, generatedBegin(source))
	return d
}

func (d *document) heading(level int, text string) {
	fmt.Fprintf(d, "\n%s %s\n", strings.Repeat("#", level), text)
}

func (d *document) paragraph(text string) { fmt.Fprintf(d, "\n%s\n", text) }

// In a page that is otherwise written by hand, the generated part stands between the line of generatedBegin and the
// line generatedEnd.
const generatedEnd = "<!-- End of the generated part. -->\n"

func generatedBegin(source string) string {
	return "<!-- Generated from " + source + " by `make generate`. Do not edit. -->\n"
}

// replaceGenerated replaces the text between the two lines that mark the generated part. It returns an error if the
// page does not contain the line of generatedBegin and, below it, the line generatedEnd.
func replaceGenerated(current []byte, source string, text []byte) ([]byte, error) {
	begin := []byte(generatedBegin(source))
	before, rest, hasBegin := bytes.Cut(current, begin)
	_, after, hasEnd := bytes.Cut(rest, []byte(generatedEnd))
	if !hasBegin || !hasEnd {
		return nil, fmt.Errorf("the page must contain the line %q and, below it, the line %q; the generated text goes between them", strings.TrimSpace(generatedBegin(source)), strings.TrimSpace(generatedEnd))
	}
	return slices.Concat(before, begin, text, []byte(generatedEnd), after), nil
}

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

// tableCell returns the text in one line and with each | escaped: a line break would end the row, and a | would end the
// cell.
func tableCell(text string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(text), " "), "|", `\|`)
}

// plain returns text of a comment or a schema as Markdown: characters that could begin an HTML tag or emphasis are
// escaped.
func plain(text string) string {
	return strings.NewReplacer("<", "&lt;", "*", `\*`).Replace(text)
}

func code(text string) string { return "`" + text + "`" }
