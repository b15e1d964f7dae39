package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Scratch creates a folder for temporary files of this program, which must remove it when it ends. It first removes the
// folders of programs that were killed before they could. The name identifies the purpose, and has no hyphen.
func Scratch(name string) (string, error) {
	prefix := "podidentity-" + name + "-"
	old, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
	if err != nil {
		return "", err
	}
	for _, dir := range old {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), prefix), "-")
		if _, err := os.Stat("/proc/" + pid); os.IsNotExist(err) {
			if err := os.RemoveAll(dir); err != nil {
				return "", err
			}
		}
	}
	return os.MkdirTemp("", fmt.Sprintf("%s%d-", prefix, os.Getpid()))
}
