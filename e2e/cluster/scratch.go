package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Scratch creates a folder for temporary files of this program and returns its path. The program must remove the folder
// when it ends. A killed program leaves its folder. So Scratch first removes each folder of an earlier call with the
// same name, if no process has the PID of the program that made the call.
//
// name identifies the purpose. It must not contain a hyphen: Scratch("a") would take the b in the name of a folder of
// Scratch("a-b") for the PID of a program that has ended, and would remove the folder.
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
