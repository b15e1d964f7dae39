package cluster

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// logNames returns the names of all log files of a cluster.
func logNames() []string {
	names := []string{"supervisor.log", "etcd.log", "kube-apiserver.log", "kube-controller-manager.log", "kube-scheduler.log", "azure.log"}
	for _, n := range nodeSpecs {
		for _, part := range []string{"init", "containerd", "kubelet"} {
			names = append(names, n.Name+"-"+part+".log")
		}
	}
	return names
}

// removeOldLogs removes the logs of an earlier cluster from dir. The folder may be the user's, so all other files stay.
func removeOldLogs(dir string) error {
	for _, name := range logNames() {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing an old log: %w", err)
		}
	}
	return nil
}

// lastLines returns the last n lines of a text, where programs print why they failed. It cuts each line after 400
// bytes.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	for i, l := range lines {
		if len(l) > 400 {
			lines[i] = l[:400] + "…"
		}
	}
	return strings.Join(lines, "\n")
}

func indented(text string) string {
	if text == "" {
		return ""
	}
	return "\n    " + strings.ReplaceAll(text, "\n", "\n    ")
}

// logTail returns the end of a log file, formatted to be appended to an error.
func logTail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > 16<<10 {
		_, _ = f.Seek(-16<<10, io.SeekEnd)
	}
	data, _ := io.ReadAll(f)
	if len(data) == 0 {
		return fmt.Sprintf(" (%s is empty)", path)
	}
	return fmt.Sprintf("\n  the last lines of %s:%s", path, indented(lastLines(string(data), 12)))
}
