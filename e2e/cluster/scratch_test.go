package cluster

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

func TestScratchRemovesFoldersOfKilledPrograms(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	ended := exec.Command("true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(os.TempDir(), "podidentity-demo-"+strconv.Itoa(ended.Process.Pid)+"-1")
	others := filepath.Join(os.TempDir(), "podidentity-bench-"+strconv.Itoa(ended.Process.Pid)+"-1")
	for _, dir := range []string{left, others} {
		if err := os.MkdirAll(filepath.Join(dir, "etcd"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	first, err := Scratch("demo")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Scratch("demo"); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]bool{left: false, others: true, first: true} {
		if _, err := os.Stat(dir); (err == nil) != want {
			t.Errorf("after Scratch, folder %s exists although it must not, or does not exist although it must (error %v)", dir, err)
		}
	}
}
