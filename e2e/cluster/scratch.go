package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Scratch makes a folder for the files of this program, which removes it when it ends. What programs left that were
// killed before they could is removed now. A name is that of all folders of one purpose, without a hyphen.
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
