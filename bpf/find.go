package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxDepth bounds the search for the cgroup of a pod. The kubelet puts it at the second to the fourth level, deeper if its
// --cgroup-root is deep.
const maxDepth = 10

// FindPodsCgroup returns the path of the cgroup of all pods of the node. It searches the cgroup v2 hierarchy below mount,
// which is usually /sys/fs/cgroup, for the cgroup of the pod with the UID. This works with each cgroup driver, with each
// --cgroup-root of the kubelet, and if the hierarchy also has the cgroups of other nodes. The error is ErrUnsupported if
// there is none.
func FindPodsCgroup(mount, podUID string) (string, error) {
	hierarchy, err := findHierarchy(mount)
	if err != nil {
		return "", err
	}
	var pod string
	err = filepath.WalkDir(hierarchy, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // deleted meanwhile
		case err != nil:
			return err
		case !d.IsDir():
			return nil
		}
		if uid, ok := podUIDOf(d.Name()); ok {
			if uid == podUID {
				pod = path
				return fs.SkipAll
			}
			return fs.SkipDir
		}
		if strings.Count(strings.TrimPrefix(path, hierarchy), "/") >= maxDepth {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("searching %s for the cgroup of pod %s: %w", hierarchy, podUID, err)
	}
	if pod == "" {
		return "", fmt.Errorf("%w: %s has no cgroup of the pod of NMI (UID %s); NMI needs the cgroups of the node, not those of its container: mount them from the node, or set --pods-cgroup", ErrUnsupported, hierarchy, podUID)
	}
	root := filepath.Dir(pod)
	if isQoSFolder(filepath.Base(root)) {
		root = filepath.Dir(root)
	}
	return root, nil
}

// findHierarchy returns where the cgroup v2 hierarchy is mounted: at mount itself, or in its folder unified if the node
// also uses cgroup v1.
func findHierarchy(mount string) (string, error) {
	for _, path := range []string{mount, filepath.Join(mount, "unified")} {
		if isV2, err := isCgroupV2(path); err == nil && isV2 {
			return path, nil
		}
	}
	if _, err := os.Stat(mount); err != nil {
		return "", fmt.Errorf("%w: no cgroups are mounted: %w; mount cgroup v2 there, or give --capture=iptables", ErrUnsupported, err)
	}
	return "", fmt.Errorf("%w: neither %s nor its folder unified is a cgroup v2 hierarchy; a node that has cgroup v1 alone cannot identify processes of pods; mount cgroup v2, or give --capture=iptables", ErrUnsupported, mount)
}

func isCgroupV2(path string) (bool, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return false, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	return stat.Type == unix.CGROUP2_SUPER_MAGIC, nil
}
