package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"
)

// chartValues lists the values in the order of the schema, with the defaults of values.yaml.
func chartValues(root string) ([]byte, error) {
	chart := filepath.Join(root, "deploy/podidentity")
	schema, err := readYAML(filepath.Join(chart, "values.schema.json")) // JSON is YAML, and this parser keeps the order
	if err != nil {
		return nil, err
	}
	defaults, err := readYAML(filepath.Join(chart, "values.yaml"))
	if err != nil {
		return nil, err
	}
	d := newDocument("Values of the chart", "deploy/podidentity/values.schema.json and values.yaml")
	d.paragraph("The chart refuses a value that is not listed here, and a value out of range. Durations are written as in Go: `500ms`, `10s`, `1m30s`. " +
		"[Values of AAD Pod Identity's chart](../migrate-from-aad-pod-identity.md#values-of-the-old-chart) lists old names.")
	var rows [][]string
	err = valueRows("", schema, defaults, func(row []string) { rows = append(rows, row) })
	if err != nil {
		return nil, err
	}
	d.table([]string{"Value", "Default", "Description"}, rows)
	return d.Bytes(), nil
}

func readYAML(path string) (*yaml.Node, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var document yaml.Node
	if err := yaml.Unmarshal(text, &document); err != nil {
		return nil, fmt.Errorf("parsing %s: %w", path, err)
	}
	return document.Content[0], nil
}

// valueRows calls add with the table row of each value below the schema. A value that contains other values has a row
// of its own only if values.yaml sets none of the contained values. valueRows returns an error for a value without a
// description, because the row would say nothing.
func valueRows(path string, schema, defaults *yaml.Node, add func([]string)) error {
	return eachPair(get(schema, "properties"), func(name string, s *yaml.Node) error {
		valuePath := strings.TrimPrefix(path+"."+name, ".")
		description := get(s, "description")
		if description == nil || strings.TrimSpace(description.Value) == "" {
			return fmt.Errorf("the value %s has no description in values.schema.json", valuePath)
		}
		value := get(defaults, name)
		inner := withProperties(s)
		if inner == nil || value == nil || value.Kind != yaml.MappingNode || len(value.Content) == 0 {
			text, err := defaultText(value)
			if err != nil {
				return fmt.Errorf("reading the default of the value %s: %w", valuePath, err)
			}
			add([]string{code(valuePath), text, plain(description.Value) + "." + constraint(s)})
		}
		if inner != nil {
			return valueRows(valuePath, inner, value, add)
		}
		if entry := get(s, "additionalProperties"); get(entry, "properties") != nil {
			return valueRows(valuePath+".NAME", entry, nil, add)
		}
		return nil
	})
}

// withProperties returns the schema itself if it lists properties, else the first of its alternatives (anyOf) that
// lists properties, else nil.
func withProperties(schema *yaml.Node) *yaml.Node {
	if get(schema, "properties") != nil {
		return schema
	}
	if alternatives := get(schema, "anyOf"); alternatives != nil {
		for _, one := range alternatives.Content {
			if get(one, "properties") != nil {
				return one
			}
		}
	}
	return nil
}

// defaultText returns the default in one line as Markdown, or "" if value is nil.
func defaultText(value *yaml.Node) (string, error) {
	if value == nil {
		return "", nil
	}
	if value.Kind == yaml.ScalarNode && value.Value != "" {
		return code(value.Value), nil
	}
	var decoded any
	if err := value.Decode(&decoded); err != nil {
		return "", err
	}
	text, err := json.Marshal(decoded)
	return code(string(text)), err
}

// constraint returns a sentence with the values that the schema allows. It returns "" for a boolean, and for a schema
// that has neither a list of values nor both a minimum and a maximum.
func constraint(schema *yaml.Node) string {
	if enum := get(schema, "enum"); enum != nil {
		var all []string
		for _, one := range enum.Content {
			if one.Tag == "!!bool" || one.Value == "true" || one.Value == "false" {
				continue // a reader knows that true and false are valid
			}
			all = append(all, code(one.Value))
		}
		if len(all) > 0 {
			return " One of " + strings.Join(all, ", ") + "."
		}
	}
	minimum, maximum := get(schema, "minimum"), get(schema, "maximum")
	if minimum != nil && maximum != nil {
		return fmt.Sprintf(" %s to %s.", minimum.Value, maximum.Value)
	}
	return ""
}

// get returns the value of a key, or nil.
func get(mapping *yaml.Node, key string) *yaml.Node {
	var found *yaml.Node
	_ = eachPair(mapping, func(name string, value *yaml.Node) error {
		if name == key {
			found = value
		}
		return nil
	})
	return found
}

func eachPair(mapping *yaml.Node, do func(key string, value *yaml.Node) error) error {
	if mapping == nil || mapping.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if err := do(mapping.Content[i].Value, mapping.Content[i+1]); err != nil {
			return err
		}
	}
	return nil
}
