package main

import (
	"os"
	"strings"
	"testing"
)

func TestEachPrintedCommandNamesItsCluster(t *testing.T) {
	for _, standard := range []bool{false, true} {
		for instance, want := range map[string]string{"": "bin/cluster ", "2": "PODIDENTITY_CLUSTER=2 bin/cluster "} {
			text := nextSteps(instance, standard)
			if n := strings.Count(text, "bin/cluster"); n < 4 || strings.Count(text, want) != n {
				t.Errorf("instance %q, standard %v: not each command begins with %q:\n%s", instance, standard, want, text)
			}
			if instance == "" && strings.Contains(text, "PODIDENTITY_CLUSTER") {
				t.Errorf("standard %v: PODIDENTITY_CLUSTER is named although it is not set:\n%s", standard, text)
			}
		}
	}
}

func TestTheHintsReferToASectionThatExists(t *testing.T) {
	page, err := os.ReadFile("../../../docs/try-it.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(nextSteps("", false), `docs/try-it.md from the section "`)
	section, _, found := strings.Cut(section, `"`)
	if !found || !strings.Contains(string(page), "\n## "+section+"\n") {
		t.Errorf("docs/try-it.md has no section %q", section)
	}
}
