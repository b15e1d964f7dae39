package cluster

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
)

// kubernetesVersion is the version that binaries/go.mod requires. The programs report it.
const kubernetesVersion = "v1.37.2"

const countPrefix = "building Kubernetes: "

// multiCall is the file name of the program that contains all of kubernetesPrograms (see binaries/main.go). Each of
// these names is a symbolic link to the file.
const multiCall = "kubernetes"

var kubernetesPrograms = []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl", "helm"}

// ensureKubernetes returns the folder with the programs of Kubernetes and helm. It builds them once for each content of
// go.mod and main.go in the folder binaries.
func ensureKubernetes(ctx context.Context, progress func(string)) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	e2e, err := e2eDir()
	if err != nil {
		return "", err
	}
	module := filepath.Join(e2e, "cluster", "binaries")
	var source []string
	for _, file := range []string{"go.mod", "main.go"} {
		text, err := os.ReadFile(filepath.Join(module, file))
		if err != nil {
			return "", fmt.Errorf("building Kubernetes: reading the source of its programs: %w", err)
		}
		source = append(source, string(text))
	}
	if !strings.Contains(source[0], "k8s.io/kubernetes "+kubernetesVersion+"\n") {
		return "", fmt.Errorf("%s/go.mod does not require k8s.io/kubernetes %s, the version in kubernetesVersion of package e2e/cluster; set both to the same version", module, kubernetesVersion)
	}
	dir := filepath.Join(cache, "kubernetes-"+kubernetesVersion+"-"+keyOf(append(source, runtime.GOARCH)...))
	return dir, buildOnce(dir, func(dest string) error {
		progress("building Kubernetes " + kubernetesVersion + " and helm from source; the first time takes about ten minutes")
		if err := buildWithProgress(ctx, progress, module, filepath.Join(dest, multiCall)); err != nil {
			return err
		}
		for _, program := range kubernetesPrograms {
			if err := os.Symlink(multiCall, filepath.Join(dest, program)); err != nil {
				return err
			}
		}
		return nil
	})
}

func kubernetesLdflags() string {
	// Without these flags every program reports version v0.0.0, and kubectl warns about a version skew.
	parts := strings.Split(strings.TrimPrefix(kubernetesVersion, "v"), ".")
	flags := "-s -w"
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags += fmt.Sprintf(" -X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=%[3]s -X %[1]s.gitMinor=%[4]s", pkg, kubernetesVersion, parts[0], parts[1])
	}
	return flags
}

// buildWithProgress reports how many packages go build has compiled, out of all packages of the program. go build does
// not print the packages that are in its cache, so the count may not reach the total.
func buildWithProgress(ctx context.Context, progress func(string), module, program string) error {
	lock, err := lockCompiler()
	if err != nil {
		return err
	}
	defer lock.Close()
	deps, err := run(goCommand(ctx, module, "list", "-deps", "."))
	if err != nil {
		return fmt.Errorf("listing the packages of Kubernetes: %w", err)
	}
	total := strings.Count(deps, "\n")

	cmd := goCommand(ctx, module, "build", "-v", "-ldflags", kubernetesLdflags(), "-o", program, ".")
	out, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("building Kubernetes: %w", err)
	}
	var compiled atomic.Int64
	finished := make(chan struct{})
	go func() {
		start := time.Now()
		ticker := time.NewTicker(20 * time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-finished:
				return
			case <-ticker.C:
				progress(fmt.Sprintf(countPrefix+"%d of at most %d packages compiled after %s", compiled.Load(), total, time.Since(start).Round(time.Second)))
			}
		}
	}()
	output := readBuildOutput(out, &compiled)
	err = cmd.Wait()
	close(finished)
	if err != nil {
		return fmt.Errorf("building Kubernetes: %w%s", err, indented(lastLines(output, 15)))
	}
	return nil
}

// readBuildOutput counts the lines that are package names. It ignores empty lines and lines about downloads. It returns
// all other lines, which contain the errors of the build.
func readBuildOutput(r io.Reader, compiled *atomic.Int64) string {
	var rest strings.Builder
	for lines := bufio.NewScanner(r); lines.Scan(); {
		line := lines.Text()
		if line == "" || strings.HasPrefix(line, "go: downloading") {
			continue
		}
		if strings.ContainsAny(line, " :#") {
			rest.WriteString(line + "\n")
		} else {
			compiled.Add(1)
		}
	}
	return rest.String()
}

// IsCount reports whether a progress line only updates the count of compiled packages. A terminal can overwrite such a
// line with the next one.
func IsCount(line string) bool { return strings.HasPrefix(line, countPrefix) }
