package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Owner is the pod, and if it is known the container, whose process opened a connection.
type Owner struct {
	PodUID      string // for a static pod this is the UID in the annotation kubernetes.io/config.hash
	ContainerID string // "" if the name of the cgroup is not that of a container of containerd or CRI-O
}

// podFolder matches the name of a pod's cgroup. With the cgroup driver systemd the name repeats the names of the folders
// above, and has underscores instead of dashes: kubepods-burstable-pod<UID>.slice. The UID of a static pod has no dashes.
var podFolder = regexp.MustCompile(`^(?:[a-zA-Z0-9_]+-)*pod([0-9a-f]{8}(?:[-_]?[0-9a-f]{4}){3}[-_]?[0-9a-f]{12})(?:\.slice)?$`)

// containerFolder matches the name of a container's cgroup. With the cgroup driver systemd it is cri-containerd-<ID>.scope
// or crio-<ID>.scope, with cgroupfs <ID> or crio-<ID>.
var containerFolder = regexp.MustCompile(`^(?:cri-containerd-|crio-)?([0-9a-f]{64})(?:\.scope)?$`)

// podUIDOf returns the UID of the pod whose cgroup has the name.
func podUIDOf(name string) (uid string, ok bool) {
	match := podFolder.FindStringSubmatch(name)
	if match == nil {
		return "", false
	}
	return strings.ReplaceAll(match[1], "_", "-"), true
}

// containerIDOf returns the ID of the container whose cgroup has the name, or "".
func containerIDOf(name string) string {
	if match := containerFolder.FindStringSubmatch(name); match != nil {
		return match[1]
	}
	return ""
}

// isQoSFolder reports whether name is the folder of a quality of service class. Guaranteed pods have no such folder.
func isQoSFolder(name string) bool {
	name = strings.TrimSuffix(name, ".slice")
	name = name[strings.LastIndex(name, "-")+1:]
	return name == "burstable" || name == "besteffort"
}

// podCgroup is the cgroup of one pod.
type podCgroup struct {
	uid        string
	path       string
	containers map[uint64]string // container ID by cgroup ID
}

// podCgroups finds the pod that a cgroup belongs to. It reads the folders only when it is asked for an unknown cgroup.
type podCgroups struct {
	root string

	mu   sync.Mutex
	pods map[uint64]*podCgroup // by cgroup ID
}

// owner returns the pod with the cgroup IDs of one process: at the first, second and third level below the root.
func (p *podCgroups) owner(levels [3]uint64) (Owner, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pod, container := p.find(levels)
	if pod == nil {
		if err := p.read(); err != nil {
			return Owner{}, err
		}
		if pod, container = p.find(levels); pod == nil {
			return Owner{}, fmt.Errorf("%w: its cgroup is not, or no longer, that of a pod", ErrNoOwner)
		}
	}
	id, ok := pod.containers[container]
	if !ok && container != 0 {
		if err := pod.readContainers(); err != nil {
			return Owner{}, err
		}
		if id, ok = pod.containers[container]; !ok {
			pod.containers[container] = "" // deleted meanwhile; do not read the folder again for it
		}
	}
	return Owner{PodUID: pod.uid, ContainerID: id}, nil
}

// find returns the pod, and the ID of the cgroup one level below it.
func (p *podCgroups) find(levels [3]uint64) (pod *podCgroup, container uint64) {
	if pod = p.pods[levels[0]]; pod != nil {
		return pod, levels[1]
	}
	return p.pods[levels[1]], levels[2]
}

// ids returns the IDs of the cgroups of the pods.
func (p *podCgroups) ids(uids map[string]bool) (map[uint64]bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.read(); err != nil {
		return nil, err
	}
	found := map[uint64]bool{}
	for id, pod := range p.pods {
		if uids[pod.uid] {
			found[id] = true
		}
	}
	return found, nil
}

// read reads the folders of all pods. The caller holds p.mu.
func (p *podCgroups) read() error {
	pods := map[uint64]*podCgroup{}
	add := func(path, name string, id uint64) {
		uid, ok := podUIDOf(name)
		switch known := p.pods[id]; {
		case !ok:
		case known != nil:
			pods[id] = known
		default:
			pods[id] = &podCgroup{uid: uid, path: path}
		}
	}
	err := eachFolder(p.root, func(path, name string, id uint64) error {
		if isQoSFolder(name) {
			return eachFolder(path, func(path, name string, id uint64) error {
				add(path, name, id)
				return nil
			})
		}
		add(path, name, id)
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the cgroups of the pods: %w", err)
	}
	p.pods = pods
	return nil
}

func (p *podCgroup) readContainers() error {
	p.containers = map[uint64]string{}
	err := eachFolder(p.path, func(_, name string, id uint64) error {
		p.containers[id] = containerIDOf(name)
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the cgroups of the containers of pod %s: %w", p.uid, err)
	}
	return nil
}

// eachFolder calls do for each cgroup in dir, with its ID. It passes over what is deleted meanwhile.
func eachFolder(dir string, do func(path, name string, id uint64) error) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		path := filepath.Join(dir, entry.Name())
		id, err := cgroupID(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := do(path, entry.Name(), id); err != nil {
			return err
		}
	}
	return nil
}

// cgroupID returns the ID of a cgroup: the number of the inode of its folder.
func cgroupID(path string) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return stat.Ino, nil
}
