package cluster

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/mod/modfile"
)

func TestModulesSelectTheSameVersions(t *testing.T) {
	repo, err := RepoDir()
	if err != nil {
		t.Fatal(err)
	}
	selected := map[string]string{}
	for _, dir := range []string{"e2e/cluster/binaries", "e2e", "."} {
		file := filepath.Join(repo, dir, "go.mod")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		module, err := modfile.Parse(file, text, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, require := range module.Require {
			path, version := require.Mod.Path, require.Mod.Version
			if other, ok := selected[path]; ok && other != version {
				t.Errorf("%s requires %s %s, and another module requires %s: packages that use it are compiled twice; select one version with go get",
					file, path, version, other)
			}
			selected[path] = version
		}
	}
}
