package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
)

// kubernetesVersion is what binaries/go.mod requires; the programs report it.
const kubernetesVersion = "v1.36.3"

const countPrefix = "building Kubernetes: "

var kubernetesPrograms = []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl"}

// ensureKubernetes returns the folder with the Kubernetes programs, building them from their Go module the first time.
// The module in binaries/ imports nothing (so it must never be tidied); it only selects versions.
func ensureKubernetes(ctx context.Context, say func(string)) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	e2e, err := e2eDir()
	if err != nil {
		return "", err
	}
	wrapper := filepath.Join(e2e, "cluster", "binaries")
	mod, err := os.ReadFile(filepath.Join(wrapper, "go.mod"))
	if err != nil {
		return "", fmt.Errorf("reading the versions of Kubernetes: %w", err)
	}
	if !strings.Contains(string(mod), "require k8s.io/kubernetes "+kubernetesVersion+"\n") {
		return "", fmt.Errorf("%s/go.mod does not require Kubernetes %s", wrapper, kubernetesVersion)
	}
	dir := filepath.Join(cache, "kubernetes-"+kubernetesVersion+"-"+keyOf(string(mod), runtime.GOARCH))
	return dir, buildOnce(dir, func(dest string) error {
		say("building Kubernetes " + kubernetesVersion + " from source; the first time takes about ten minutes")
		packages := make([]string, len(kubernetesPrograms))
		for i, p := range kubernetesPrograms {
			packages[i] = "k8s.io/kubernetes/cmd/" + p
		}
		return buildWithProgress(ctx, say, wrapper, dest, packages)
	})
}

func kubernetesLdflags() string {
	// Without the stamp every program calls itself v0.0.0 and kubectl warns about the difference of versions.
	parts := strings.Split(strings.TrimPrefix(kubernetesVersion, "v"), ".")
	flags := "-s -w"
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags += fmt.Sprintf(" -X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=%[3]s -X %[1]s.gitMinor=%[4]s", pkg, kubernetesVersion, parts[0], parts[1])
	}
	return flags
}

// buildWithProgress counts the packages that go build names as it compiles them against all that the programs consist
// of. Those that Go's build cache holds are never named, so the count may end early.
func buildWithProgress(ctx context.Context, say func(string), module, dest string, packages []string) error {
	list := goCommand(ctx, module, append([]string{"list", "-deps"}, packages...)...)
	deps, err := run(list)
	if err != nil {
		return fmt.Errorf("listing the packages of Kubernetes: %w", err)
	}
	total := strings.Count(deps, "\n")

	args := append([]string{"build", "-v", "-trimpath", "-ldflags", kubernetesLdflags(), "-o", dest + "/"}, packages...)
	cmd := goCommand(ctx, module, args...)
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
				say(fmt.Sprintf(countPrefix+"%d of at most %d packages compiled, %s", compiled.Load(), total, time.Since(start).Round(time.Second)))
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

// readBuildOutput counts package names and returns the other lines: those are errors.
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

// goCommand runs the Go toolchain in a module. Programs are linked statically: images hold nothing else.
func goCommand(ctx context.Context, module string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	return cmd
}

// ensureHelm returns the helm program, built from the version that the e2e module selects.
func ensureHelm(ctx context.Context, say func(string)) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	e2e, err := e2eDir()
	if err != nil {
		return "", err
	}
	version, err := requiredVersion(filepath.Join(e2e, "go.mod"), "helm.sh/helm/v4")
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "helm-"+version+"-"+runtime.GOARCH)
	return filepath.Join(dir, "helm"), buildOnce(dir, func(dest string) error {
		say("building helm " + version + " (once, a few minutes)")
		_, err := run(goCommand(ctx, e2e, "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dest, "helm"), "helm.sh/helm/v4/cmd/helm"))
		return err
	})
}

func requiredVersion(modFile, module string) (string, error) {
	data, err := os.ReadFile(modFile)
	if err != nil {
		return "", err
	}
	for _, line := range strings.Split(string(data), "\n") {
		fields := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "require "))
		if len(fields) >= 2 && fields[0] == module {
			return fields[1], nil
		}
	}
	return "", fmt.Errorf("%s does not require %s", modFile, module)
}

// buildProgram builds one of the project's own programs into the cache. It is built each time: with a warm build
// cache that takes less than a second, and nothing stale is ever run.
func buildProgram(ctx context.Context, module, pkg, name string) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "programs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	// Two clusters that start at the same time build the same programs: the second waits, and finds them up to date.
	lock, err := lockFile(filepath.Join(dir, ".lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close()
	path := filepath.Join(dir, name)
	if _, err := run(goCommand(ctx, module, "build", "-trimpath", "-ldflags", "-s -w", "-o", path, pkg)); err != nil {
		return "", fmt.Errorf("building %s: %w", name, err)
	}
	return path, nil
}

// Binaries are the programs of the cluster, all in the cache folder.
type Binaries struct {
	Debian     string // root of the unpacked Debian packages
	Kubernetes string // folder
	Helm       string
}

// EnsureBinaries builds or fetches what the machine lacks.
func EnsureBinaries(ctx context.Context, say func(string)) (Binaries, error) {
	if say == nil {
		say = func(string) {}
	}
	if _, err := exec.LookPath("go"); err != nil {
		return Binaries{}, errors.New("the Go toolchain is needed to build the cluster's programs, and there is no `go` in PATH")
	}
	var b Binaries
	var err error
	if err = ensureHostTools(ctx, say); err != nil {
		return b, err
	}
	if b.Debian, err = ensurePackages(ctx, say); err != nil {
		return b, err
	}
	if b.Kubernetes, err = ensureKubernetes(ctx, say); err != nil {
		return b, err
	}
	b.Helm, err = ensureHelm(ctx, say)
	return b, err
}

func (b Binaries) kube(program string) string    { return filepath.Join(b.Kubernetes, program) }
func (b Binaries) debian(program string) string  { return filepath.Join(b.Debian, "usr/bin", program) }
func (b Binaries) debianS(program string) string { return filepath.Join(b.Debian, "usr/sbin", program) }
func (b Binaries) cni() string                   { return filepath.Join(b.Debian, "usr/lib/cni") }

// IsCount tells lines that only count on from the line before; a terminal can show them in one place.
func IsCount(line string) bool { return strings.HasPrefix(line, countPrefix) }
