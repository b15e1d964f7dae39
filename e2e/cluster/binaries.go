package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sync/errgroup"
)

// goCommand returns a command that runs the Go toolchain in a module. Programs are linked statically (CGO_ENABLED=0),
// because most images contain no libraries. The Makefile has the same setting and the same flags: with different flags,
// Go would compile each package a second time.
func goCommand(ctx context.Context, module string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = module
	// A compiler that collects its garbage less often takes a quarter less processor time.
	cmd.Env = append([]string{"GOGC=200"}, os.Environ()...)
	cmd.Env = append(cmd.Env, "CGO_ENABLED=0", "GOFLAGS="+os.Getenv("GOFLAGS")+" -trimpath -gcflags=all=-dwarf=false")
	return cmd
}

// lockCompiler waits until no other program on this host compiles for a cluster. It returns the lock, which the caller
// closes. Two programs that compile at the same time would both compile the packages that they share.
func lockCompiler() (*os.File, error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	return lockFile(filepath.Join(cache, "compile.lock"))
}

// buildProgram builds one of the project's own programs into the cache and returns its path. It calls go build each
// time: with a warm build cache that takes less than a second, and an outdated program is never run.
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
	lock, err := lockCompiler()
	if err != nil {
		return "", err
	}
	defer lock.Close()
	path := filepath.Join(dir, name)
	if _, err := run(goCommand(ctx, module, "build", "-ldflags", "-s -w", "-o", path, pkg)); err != nil {
		return "", fmt.Errorf("building %s: %w", name, err)
	}
	return path, nil
}

// Binaries are the programs of the cluster, all in the cache folder.
type Binaries struct {
	Debian     string // root of the unpacked Debian packages
	Kubernetes string // folder with the programs of Kubernetes and helm
}

// EnsureBinaries builds or downloads the programs that are missing. Debian packages are downloaded while Kubernetes
// compiles.
func EnsureBinaries(ctx context.Context, progress func(string)) (Binaries, error) {
	if progress == nil {
		progress = func(string) {}
	}
	if _, err := exec.LookPath("go"); err != nil {
		return Binaries{}, errors.New("the Go toolchain is needed to build the cluster's programs, and there is no `go` in PATH")
	}
	var b Binaries
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		// One after the other, because only one apt-get can run at a time.
		err := ensureHostTools(ctx, progress)
		if err == nil {
			b.Debian, err = ensurePackages(ctx, progress)
		}
		return err
	})
	group.Go(func() (err error) {
		b.Kubernetes, err = ensureKubernetes(ctx, progress)
		return err
	})
	err := group.Wait()
	return b, err
}

// Helm is the path of the helm program that clusters use.
func (b Binaries) Helm() string { return b.kube("helm") }

func (b Binaries) kube(program string) string    { return filepath.Join(b.Kubernetes, program) }
func (b Binaries) debian(program string) string  { return filepath.Join(b.Debian, "usr/bin", program) }
func (b Binaries) debianS(program string) string { return filepath.Join(b.Debian, "usr/sbin", program) }
func (b Binaries) cni() string                   { return filepath.Join(b.Debian, "usr/lib/cni") }
