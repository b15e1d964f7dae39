package cluster

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestOnlyLogsOfAClusterAreRemovedFromTheLogFolder(t *testing.T) {
	dir := t.TempDir()
	others := []string{"kube-notes.log", "node.log", "node1.log", "node3-kubelet.log", "nodejs.log", "supervisor.txt"}
	for _, name := range slices.Concat(others, logNames()[1:]) { // without the first, which is not an error
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeOldLogs(dir); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range left {
		got = append(got, f.Name())
	}
	if !slices.Equal(got, others) {
		t.Errorf("the folder has the files %v, want those that are no logs of a cluster: %v", got, others)
	}
}
