package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// cgroupMount is one mounted cgroup hierarchy.
type cgroupMount struct {
	path string
	v2   bool
}

// cgroupMounts lists the host's cgroup hierarchies. A host that has only cgroup v2 has one hierarchy. A host with
// cgroup v1 has several for its controllers, and perhaps a v2 hierarchy.
func cgroupMounts() ([]cgroupMount, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("listing mounts: %w", err)
	}
	var found []cgroupMount
	for _, m := range mounts {
		// A hierarchy may be mounted a second time in another folder. Only the usual folder counts.
		if strings.HasPrefix(m.Mountpoint, "/sys/fs/cgroup") {
			found = append(found, cgroupMount{path: m.Mountpoint, v2: m.FSType == "cgroup2"})
		}
	}
	if len(found) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted below /sys/fs/cgroup")
	}
	return found, nil
}

// createCgroups makes, in each hierarchy, the cgroup below which a node's kubelet creates the cgroups of its pods.
func createCgroups(name string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		dir := filepath.Join(m.path, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("making cgroup %s: %w", dir, err)
		}
		if m.v2 {
			// A cgroup has only the controllers that its parent delegates.
			for _, d := range []string{m.path, dir} {
				delegateControllers(d)
			}
			continue
		}
		// A new v1 cpuset is empty, and no process can run in an empty one.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(m.path, file))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, file), value, 0o644)
			}
			if err != nil {
				return fmt.Errorf("copying %s of the root cgroup to cgroup %s: %w", file, dir, err)
			}
		}
	}
	return nil
}

// delegateControllers delegates all controllers of the cgroup dir to its child cgroups. It writes each controller
// separately: a controller that is in use elsewhere must not prevent the delegation of the others. Errors are ignored,
// because the kubelet reports clearly which controller is missing.
func delegateControllers(dir string) {
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, c := range strings.Fields(string(controllers)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0o644)
	}
}

// removeCgroups removes the cgroups that match name, a pattern such as podid-node1 or podid-*. It first kills the
// processes in these cgroups: only pods of the cluster ever run there. A cgroup can be removed only a moment after its
// last process has ended, so removeCgroups retries for up to 5 s.
func removeCgroups(name string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	var last error
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		last = nil
		for _, m := range mounts {
			tops, err := filepath.Glob(filepath.Join(m.path, name))
			if err != nil {
				return err
			}
			for _, top := range tops {
				if err := removeCgroup(top); err != nil {
					last = err
				}
			}
		}
		if last == nil {
			return nil
		}
	}
	return last
}

func removeCgroup(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- { // children first
		procs, _ := os.ReadFile(filepath.Join(dirs[i], "cgroup.procs"))
		for _, field := range strings.Fields(string(procs)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		if err := unix.Rmdir(dirs[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing cgroup %s: %w", dirs[i], err)
		}
	}
	return nil
}
