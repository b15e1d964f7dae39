package cluster

import (
	"fmt"
	"io"
	"os"
	"strings"
)

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
