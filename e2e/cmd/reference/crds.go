package main

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"
)

func customResources(root string) ([]byte, error) {
	files, err := filepath.Glob(filepath.Join(root, "deploy/podidentity/crds/*.yaml"))
	if err != nil {
		return nil, err
	}
	d := newDocument("Custom resources", "api/v1 and the custom resource definitions")
	d.paragraph("Group `aadpodidentity.k8s.io`, version `v1`. All kinds are namespaced. [Identities](../identities.md) says which fields an identity of each type needs.")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var crd apiextensions.CustomResourceDefinition
		if err := yaml.UnmarshalStrict(text, &crd); err != nil {
			return nil, fmt.Errorf("parsing %s: %w", file, err)
		}
		if err := addResource(d, crd); err != nil {
			return nil, fmt.Errorf("%s: %w", crd.Spec.Names.Kind, err)
		}
	}
	return d.Bytes(), nil
}

func addResource(d *document, crd apiextensions.CustomResourceDefinition) error {
	version := crd.Spec.Versions[0]
	schema := *version.Schema.OpenAPIV3Schema
	d.heading(2, crd.Spec.Names.Kind)
	d.paragraph(plain(oneLine(schema.Description)))
	var columns []string
	for _, c := range version.AdditionalPrinterColumns {
		columns = append(columns, code(c.Name)+" ("+code(strings.TrimPrefix(c.JSONPath, "."))+")")
	}
	d.paragraph("Columns of `kubectl get " + crd.Spec.Names.Plural + "`: " + strings.Join(columns, ", ") + ".")
	var rows [][]string
	for _, top := range []string{"spec", "status"} {
		if p, ok := schema.Properties[top]; ok {
			fields, err := fieldRows(top, p)
			if err != nil {
				return err
			}
			rows = append(rows, fields...)
		}
	}
	d.table([]string{"Field", "Type", "Description"}, rows)
	if rules := validationRules(schema); len(rules) > 0 {
		d.paragraph("The API server refuses an object that breaks one of these rules, with this message:")
		d.table([]string{"Field", "Message"}, rules)
	}
	return nil
}

// fieldRows returns the table rows of the fields of an object, including nested fields. It leaves out the fields of
// object metadata and of embedded objects, which are copies of whole objects of other kinds. It returns an error for a
// field without a description.
func fieldRows(path string, p apiextensions.JSONSchemaProps) ([][]string, error) {
	var rows [][]string
	for _, name := range slices.Sorted(maps.Keys(p.Properties)) {
		field := p.Properties[name]
		fieldPath := path + "." + name
		if oneLine(field.Description) == "" {
			return nil, fmt.Errorf("the field %s has no description", fieldPath)
		}
		rows = append(rows, []string{code(fieldPath), fieldType(field), plain(oneLine(field.Description)) + limits(field)})
		if name != "metadata" && !field.XEmbeddedResource {
			inner, err := fieldRows(fieldPath, field)
			if err != nil {
				return nil, err
			}
			rows = append(rows, inner...)
		}
	}
	return rows, nil
}

func fieldType(p apiextensions.JSONSchemaProps) string {
	switch {
	case p.Type == "array" && p.Items != nil && p.Items.Schema != nil:
		return "array of " + fieldType(*p.Items.Schema)
	case p.Type == "object" && p.AdditionalProperties != nil && p.AdditionalProperties.Schema != nil:
		return "map of " + fieldType(*p.AdditionalProperties.Schema)
	}
	return cmp.Or(p.Type, "any")
}

func limits(p apiextensions.JSONSchemaProps) string {
	if p.MaxLength != nil {
		return " At most " + strconv.FormatInt(*p.MaxLength, 10) + " characters."
	}
	return ""
}

func validationRules(schema apiextensions.JSONSchemaProps) [][]string {
	var rows [][]string
	add := func(path string, p apiextensions.JSONSchemaProps) {
		for _, rule := range p.XValidations {
			rows = append(rows, []string{code(path + rule.FieldPath), plain(rule.Message)})
		}
	}
	spec := schema
	spec.XValidations = slices.DeleteFunc(slices.Clone(schema.XValidations), func(r apiextensions.ValidationRule) bool { return r.Message == "" })
	add("spec", spec)
	add("spec", schema.Properties["spec"])
	return rows
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
