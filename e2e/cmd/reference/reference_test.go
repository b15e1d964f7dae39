package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"

	"github.com/podidentity/podidentity/internal/metric"
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
	for _, b := range []string{"{type: string}", `{description: " "}`} {
		var schema yaml.Node
		if err := yaml.Unmarshal([]byte(`{properties: {a: {description: One, properties: {b: `+b+`}}}}`), &schema); err != nil {
			t.Fatal(err)
		}
		err := valueRows("", schema.Content[0], nil, func([]string) {})
		if err == nil || !strings.Contains(err.Error(), "a.b") {
			t.Errorf("%s: got %v, want an error that names a.b", b, err)
		}
	}
}

func TestAFlagWithoutADescriptionIsAnError(t *testing.T) {
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.Int("port", 80, "`port` to listen on")
	flags.Bool("events", true, " ")
	_, _, err := flagRows(flags, nil)
	if err == nil || !strings.Contains(err.Error(), "--events") {
		t.Errorf("got %v, want an error that names --events", err)
	}
}

func TestAMetricWithoutADescriptionIsAnError(t *testing.T) {
	_, err := metricRows([]metric.Definition{{Name: "a_total", Help: "Counts."}, {Name: "b", Help: " ", Deprecated: "use a_total"}})
	if err == nil || !strings.Contains(err.Error(), "metric b ") {
		t.Errorf("got %v, want an error that names b", err)
	}
}

func TestAFieldWithoutADescriptionIsAnError(t *testing.T) {
	inner := map[string]apiextensions.JSONSchemaProps{"b": {Type: "string", Description: "\n"}}
	_, err := fieldRows("spec", apiextensions.JSONSchemaProps{
		Properties: map[string]apiextensions.JSONSchemaProps{"a": {Description: "One.", Properties: inner}},
	})
	if err == nil || !strings.Contains(err.Error(), "spec.a.b") {
		t.Errorf("got %v, want an error that names spec.a.b", err)
	}
}

func TestOnlyTheDefaultThatIsTheHostNameIsDescribed(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.String("leader-election-instance", host, "the name of this MIC")
	flags.String("log-format", host, "a default that happens to be the host name")
	for name, want := range map[string]string{"leader-election-instance": "the host's name", "log-format": code(host)} {
		if got := flagDefault(flags.Lookup(name)); got != want {
			t.Errorf("--%s: got the default %q, want %q", name, got, want)
		}
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
		t.Error("the page lists the fields of the copies of other objects in an AzureAssignedIdentity")
	}
}

func TestDeprecatedFlagsAreListedApart(t *testing.T) {
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.Int("port", 80, "`port` to listen on")
	flags.Bool("events", true, "report Events")
	flags.String("name", "", "the `name`")
	flags.Bool("hold", false, "")
	flags.String("old", "", "")
	_ = flags.MarkHidden("hold")
	_ = flags.MarkDeprecated("old", "use --name")
	current, deprecated, err := flagRows(flags, map[string]string{"port": "nmi.port"})
	if err != nil {
		t.Fatal(err)
	}
	want := [][]string{
		{"`--events`", "`true`", "", "report Events"},
		{"`--name NAME`", "", "", "the name"},
		{"`--port PORT`", "`80`", "`nmi.port`", "port to listen on"},
	}
	if diff := cmp.Diff(want, current); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([][]string{{"`--old`", "use --name"}}, deprecated); diff != "" {
		t.Error(diff)
	}
}

func TestDefaultsFromTheEnvironmentAreNamesOfVariables(t *testing.T) {
	for _, name := range append(fromEnvironment, "FORCENAMESPACED") {
		t.Setenv(name, "true")
	}
	text, err := nmiFlags(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []string{"| `--node NAME` | `$NODE_NAME` |", "| `--force-namespaced` | `false` |"} {
		if !strings.Contains(string(text), row) {
			t.Errorf("no row begins with %s", row)
		}
	}
}

func TestFlagsAreListedWithTheChartValuesThatSetThem(t *testing.T) {
	for template, want := range map[string]map[string]string{
		"nmi-daemonset.yaml": {
			"nmi-port": "nmi.port", "http-probe-port": "nmi.probePort", "nmi-listen-address": "nmi.listenAddress", // in the argument
			"tenant-id": "nmi.tenantID", "custom-user-agent": "customUserAgent", // of the block "with"
			"ca-bundle": "nmi.caBundle", "kubelet-config": "nmi.kubeletConfig", // in a condition that is a variable
			"audit-level": "nmi.auditLevel", "operation-mode": "operationMode", "assignment-wait": "nmi.assignmentWait",
			"node": "", "kubeconfig": "", // not from a value
		},
		"mic-deployment.yaml": {
			"http-probe-port": "mic.probePort", "immutable-user-msis": "mic.immutableUserMSIs", "leader-election-instance": "mic.leaderElection.instance",
			"cloudconfig": "mic.cloudConfig", "leader-election-namespace": "mic.leaderElection.namespace", // from a helper
			"ca-bundle": "mic.caBundle", "namespace": "",
		},
	} {
		got, err := valuesOfFlags(root, template)
		if err != nil {
			t.Fatal(err)
		}
		for flag, value := range want {
			if got[flag] != value {
				t.Errorf("%s: --%s is set by %q, want %q", template, flag, got[flag], value)
			}
		}
	}
}

func TestLabelsAreListedWithTheirValues(t *testing.T) {
	rows, err := metricRows([]metric.Definition{
		{Name: "a_total", Help: "Counts.", Type: metric.Counter, Labels: []string{"x", "y"}, Values: map[string][]string{"y": {"1", "2"}}},
		{Name: "b", Help: "Is.", Type: metric.Gauge, Deprecated: "use a_total"},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := [][]string{
		{"`a_total`", "counter", "`x`, `y` (1, 2)", "Counts."},
		{"`b`", "gauge", "", "Is. Deprecated: use a_total."},
	}
	if diff := cmp.Diff(want, rows); diff != "" {
		t.Error(diff)
	}
}

func TestTheDiagramLeavesOutImportsThatFollowFromOthers(t *testing.T) {
	packages := map[string]goPackage{
		"cmd/a":      {imports: []string{"a", "a/b", "internal/x"}},
		"a":          {imports: []string{"a/b", "c"}},
		"a/b":        {imports: []string{"c", "internal/x"}},
		"c":          {},
		"internal/x": {},
	}
	want := "flowchart TD\n  a[a]\n  a --> a_b\n  a_b[a/b]\n  a_b --> c\n  c[c]\n  cmd_a[cmd/a]\n  cmd_a --> a\n"
	if diff := cmp.Diff(want, importDiagram(packages)); diff != "" {
		t.Error(diff)
	}
}

func TestPackagesOfTheModuleAreRead(t *testing.T) {
	packages, err := readPackages(root)
	if err != nil {
		t.Fatal(err)
	}
	p := packages["identity"]
	if !strings.HasPrefix(p.comment, "Package identity ") || !slices.Contains(p.imports, "api/v1") {
		t.Errorf("package identity was read as %+v, want its comment and its import of api/v1", p)
	}
	for name := range packages {
		if strings.HasPrefix(name, "e2e") || strings.HasSuffix(name, "test") {
			t.Errorf("readPackages returned %s, which is not a package of the product", name)
		}
	}
}

func TestOnlyTheMarkedPartOfAPageIsReplaced(t *testing.T) {
	begin := generatedBegin("package identity")
	text, err := reasonSections("", []byte("before\n"+begin+"OUTDATED\n"+generatedEnd+"after\n"))
	if err != nil {
		t.Fatal(err)
	}
	s := string(text)
	if !strings.HasPrefix(s, "before\n"+begin) || !strings.HasSuffix(s, generatedEnd+"after\n") || strings.Contains(s, "OUTDATED") {
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

// copyOfSources returns a new root folder for run. It has a copy of the chart, and the pages of which only a part is
// generated.
func copyOfSources(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "deploy"), os.DirFS(filepath.Join(root, "deploy"))); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "docs/reference"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, source := range map[string]string{"troubleshooting": "package identity", "architecture": "the packages"} {
		if err := os.WriteFile(filepath.Join(dir, "docs", name+".md"), []byte(generatedBegin(source)+generatedEnd), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
