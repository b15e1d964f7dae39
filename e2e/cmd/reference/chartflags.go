package main

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// What valuesOfFlags recognizes in the chart's templates.
var (
	templateAction  = regexp.MustCompile(`\{\{-? *(\S+) *(.*?) *-?\}\}`)
	reference       = regexp.MustCompile(`\$\w+|include "[^"]+"`) // to a variable or a helper
	helperCondition = regexp.MustCompile(`(?m)^\{\{- if .*$`)
	chartValue      = regexp.MustCompile(`\.Values\.[\w.]+`)
	argument        = regexp.MustCompile(`^\s*- (?:\{\{ printf ")?--([a-z-]+)(.*)`)
)

// valuesOfFlags returns the chart value that sets each flag, by the name of the flag. It reads them from a template of
// the chart: the first value in the argument, else the first value in the condition of the block around the argument,
// such as "with .Values.customUserAgent". It returns "" for a flag that the chart sets from no value.
func valuesOfFlags(root, template string) (map[string]string, error) {
	folder := filepath.Join(root, "deploy/podidentity/templates")
	helpers, helpersErr := os.ReadFile(filepath.Join(folder, "_helpers.tpl"))
	text, textErr := os.ReadFile(filepath.Join(folder, template))
	if err := errors.Join(helpersErr, textErr); err != nil {
		return nil, err
	}
	definitions := map[string]string{} // what references stand for; a helper stands for what it may print
	for _, helper := range strings.Split(helperCondition.ReplaceAllString(string(helpers), ""), "{{- define ")[1:] {
		name, body, _ := strings.Cut(helper, " ")
		definitions["include "+name] = body
	}
	expand := func(expression string) string {
		return reference.ReplaceAllStringFunc(expression, func(s string) string { return definitions[s] })
	}
	firstValue := func(expression string) string {
		return strings.TrimPrefix(chartValue.FindString(expand(expression)), ".Values.")
	}
	values := map[string]string{}
	blocks := []string{""} // the value in the condition of each open block; the first block is the whole template
	for line := range strings.Lines(string(text)) {
		if m := templateAction.FindStringSubmatch(line); m != nil {
			switch word, expression := m[1], m[2]; {
			case word == "if" || word == "with" || word == "range":
				blocks = append(blocks, firstValue(expression))
			case word == "else":
				blocks[len(blocks)-1] = ""
			case word == "end":
				blocks = blocks[:len(blocks)-1]
			case strings.HasPrefix(expression, ":= "):
				definitions[word] = expand(expression)
			}
		}
		if m := argument.FindStringSubmatch(line); m != nil {
			values[m[1]] = cmp.Or(firstValue(m[2]), blocks[len(blocks)-1])
		}
	}
	return values, nil
}
