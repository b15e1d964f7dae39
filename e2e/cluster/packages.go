package cluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// debianPackages are unpacked into the cache folder and run from there. They are not installed: an installed etcd or
// containerd would start a service on the host.
var debianPackages = []string{"etcd-server", "containerd", "runc", "containernetworking-plugins"}

// hostTools are programs of the host that the tests, the demo and the benchmarks need: to send requests, and to show or
// change the network of nodes and pods. pkg is the Debian package to install if the program is missing.
var hostTools = []struct{ program, pkg string }{
	{"curl", "curl"},
	{"ip", "iproute2"},
	{"iptables-save", "iptables"},
}

// ensurePackages returns the folder with the unpacked packages. It downloads them once for each Debian release,
// architecture and list of packages.
func ensurePackages(ctx context.Context, progress func(string)) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	release, err := osRelease()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "debian-"+keyOf(release, runtime.GOARCH, strings.Join(debianPackages, " ")))
	return dir, buildOnce(dir, func(dest string) error {
		progress("downloading " + strings.Join(debianPackages, ", ") + " from Debian (unpacked into " + cache + ", not installed)")
		debs, err := os.MkdirTemp(cache, "debs-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(debs)
		if err := apt(ctx, progress, debs, append([]string{"download"}, debianPackages...)...); err != nil {
			return err
		}
		files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
		if err != nil {
			return err
		}
		for _, file := range files {
			if _, err := run(exec.CommandContext(ctx, "dpkg-deb", "-x", file, dest)); err != nil {
				return err
			}
		}
		return nil
	})
}

func ensureHostTools(ctx context.Context, progress func(string)) error {
	var missing []string
	for _, tool := range hostTools {
		if _, err := findHostTool(tool.program); err != nil {
			missing = append(missing, tool.pkg)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	progress("installing Debian packages that are missing: " + strings.Join(missing, ", "))
	return apt(ctx, progress, "/", append([]string{"install", "-y", "--no-install-recommends"}, missing...)...)
}

// findHostTool returns the path of a program of the host. It searches PATH and the sbin folders, because a PATH without
// the sbin folders is common.
func findHostTool(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no executable program %q in PATH or in an sbin folder of this host: %w", program, err)
}

// apt runs apt-get. A new host has no package lists, or old ones: after a failure apt updates them and retries once.
func apt(ctx context.Context, progress func(string), dir string, args ...string) error {
	try := func(args ...string) error {
		// apt-get's unprivileged user for downloads could not write below a private cache folder.
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "-o", "APT::Sandbox::User=root"}, args...)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		_, err := run(cmd)
		return err
	}
	if err := try(args...); err == nil || errors.Is(err, exec.ErrNotFound) || ctx.Err() != nil {
		return err
	}
	progress("updating Debian's package lists (apt-get update)")
	// The update also fails if a package source is unreachable that is not needed here. So its error counts only if the
	// second attempt fails.
	updateErr := try("update")
	if err := try(args...); err != nil {
		return errors.Join(err, updateErr)
	}
	return nil
}

// NodeModules installs the npm packages of e2e/folder/package-lock.json into the cache, once for each content of that
// file and of package.json, and returns the value of NODE_PATH for them. npm checks the hash of each package, and does
// not run the packages' scripts.
func NodeModules(ctx context.Context, progress func(string), folder string) (string, error) {
	if progress == nil {
		progress = func(string) {}
	}
	e2e, err := e2eDir()
	if err != nil {
		return "", err
	}
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	files := map[string][]byte{}
	for _, name := range []string{".npmrc", "package.json", "package-lock.json"} {
		if files[name], err = os.ReadFile(filepath.Join(e2e, folder, name)); err != nil {
			return "", fmt.Errorf("installing npm packages: %w", err)
		}
	}
	dir := filepath.Join(cache, "npm-"+filepath.Base(folder)+"-"+keyOf(string(files["package.json"]), string(files["package-lock.json"])))
	return filepath.Join(dir, "node_modules"), buildOnce(dir, func(dest string) error {
		progress("installing the npm packages of e2e/" + folder + " into " + cache)
		for name, content := range files {
			if err := os.WriteFile(filepath.Join(dest, name), content, 0o644); err != nil {
				return err
			}
		}
		cmd := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error")
		cmd.Dir = dest
		_, err := run(cmd)
		if errors.Is(err, exec.ErrNotFound) {
			return fmt.Errorf("%w; `make prerequisites` installs node and npm", err)
		}
		return err
	})
}

// run runs a program that prints little and returns its standard output. An error contains the last lines that the
// program printed.
func run(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("running %s: %w%s", shortCommand(cmd), err, indented(lastLines(stderr.String()+stdout.String(), 12)))
	}
	return stdout.String(), nil
}

func shortCommand(cmd *exec.Cmd) string {
	text := filepath.Base(cmd.Path)
	if len(cmd.Args) > 1 {
		text += " " + strings.Join(cmd.Args[1:], " ")
	}
	if len(text) > 200 {
		text = text[:200] + "…"
	}
	return text
}

func osRelease() (string, error) {
	data, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", fmt.Errorf("reading the Debian release: %w", err)
	}
	values := map[string]string{}
	for _, line := range strings.Split(string(data), "\n") {
		if key, value, ok := strings.Cut(line, "="); ok {
			values[key] = strings.Trim(value, `"`)
		}
	}
	return values["ID"] + values["VERSION_ID"], nil
}

func keyOf(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:6])
}

// buildOnce calls build to fill the folder dir unless dir exists. An interrupted build leaves nothing under the final
// name. Of two programs that build the same folder, one waits for the other.
func buildOnce(dir string, build func(dest string) error) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	lock, err := lockFile(dir + ".lock")
	if err != nil {
		return err
	}
	defer lock.Close()
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	partial := dir + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return err
	}
	if err := os.MkdirAll(partial, 0o755); err != nil {
		return err
	}
	if err := build(partial); err != nil {
		return errors.Join(err, os.RemoveAll(partial))
	}
	return os.Rename(partial, dir)
}

// lockFile waits until no other program holds the lock on the file at path, and returns the locked file. Closing the
// file releases the lock.
func lockFile(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		file.Close()
		return nil, fmt.Errorf("locking %s against simultaneous builds: %w", path, err)
	}
	return file, nil
}
