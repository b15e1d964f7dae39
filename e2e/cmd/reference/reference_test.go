package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const root = "../../.."

func TestEachChartValueIsListedWithItsDefault(t *testing.T) {
	text, err := chartValues(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []string{
		"| `operationMode` | `managed` |",
		"| `nmi.port` | `2579` |",
		"| `nmi.uninstall` | `false` |",
		"| `nmi.secretNamespaces` | `[]` |",
		"| `nmi.resources.limits` | `{\"memory\":\"256Mi\"}` |",
		"| `azureIdentities.NAME.binding.selector` |  |",
		"| `mic.leaderElection.name` | `aad-pod-identity-mic` |",
	} {
		if !strings.Contains(string(text), row) {
			t.Errorf("no row begins with %s", row)
		}
	}
}

func TestAChartValueWithoutADescriptionIsAnError(t *testing.T) {
	var schema yaml.Node
	if err := yaml.Unmarshal([]byte(`{properties: {a: {description: One, properties: {b: {type: string}}}}}`), &schema); err != nil {
		t.Fatal(err)
	}
	err := valueRows("", schema.Content[0], nil, func([]string) {})
	if err == nil || !strings.Contains(err.Error(), "a.b") {
		t.Errorf("got %v, want an error that names a.b", err)
	}
}

func TestEachFieldOfACustomResourceIsListed(t *testing.T) {
	text, err := customResources(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"## AzureIdentity\n", "## AzureIdentityBinding\n", "## AzureAssignedIdentity\n", "## AzurePodIdentityException\n",
		"| `spec.clientPassword.name` | string |", "| `spec.podLabels` | map of string |", "| `spec.auxiliaryTenantIDs` | array of string |",
		"| `spec` | spec is missing: write azureIdentity and selector under it |",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Contains(string(text), "spec.azureIdentityRef.spec") {
		t.Error("the copies in an AzureAssignedIdentity are opened")
	}
}

func TestOnlyTheMarkedPartOfAPageIsReplaced(t *testing.T) {
	text, err := reasonSections("", []byte("before\n"+sectionsBegin+"OUTDATED\n"+sectionsEnd+"after\n"))
	if err != nil {
		t.Fatal(err)
	}
	s := string(text)
	if !strings.HasPrefix(s, "before\n"+sectionsBegin) || !strings.HasSuffix(s, sectionsEnd+"after\n") || strings.Contains(s, "OUTDATED") {
		t.Errorf("the hand-written part changed, or the generated part did not; the page begins with %.200q", s)
	}
	if !strings.Contains(s, "\n### `pod_not_labelled`\n\nHTTP status: 400 Bad Request.\n") {
		t.Error("there is no section for pod_not_labelled")
	}
	again, err := reasonSections("", text)
	if err != nil || string(again) != s {
		t.Errorf("a second run changes the page (%v)", err)
	}
	if _, err := reasonSections("", []byte("no marks")); err == nil {
		t.Error("a page without marks is accepted")
	}
}

func TestCheckFailsForAnOutdatedPageAndChangesNothing(t *testing.T) {
	dir := copyOfSources(t)
	if err := run(dir, false); err != nil {
		t.Fatal(err)
	}
	if err := run(dir, true); err != nil {
		t.Errorf("pages that were just written are not up to date: %v", err)
	}
	page := filepath.Join(dir, "docs/reference/crds.md")
	if err := os.WriteFile(page, []byte("edited\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := run(dir, true); err == nil || !strings.Contains(err.Error(), "docs/reference/crds.md") || !strings.Contains(err.Error(), "make generate") {
		t.Errorf("got %v, want an error that names the page and the remedy", err)
	}
	if text, _ := os.ReadFile(page); string(text) != "edited\n" {
		t.Error("the check changed the page")
	}
}

// copyOfSources is a folder with what the pages are made from.
func copyOfSources(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "deploy"), os.DirFS(filepath.Join(root, "deploy"))); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "docs/reference"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "docs/troubleshooting.md"), []byte(sectionsBegin+sectionsEnd), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}
