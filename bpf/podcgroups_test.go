package bpf

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	testUID       = "0d46a1b2-1111-4abc-8000-00000000cafe"
	testStaticUID = "0123456789abcdef0123456789abcdef"
)

var (
	testContainer   = strings.Repeat("ab", 32)
	testUnderscores = strings.ReplaceAll(testUID, "-", "_")
)

func TestTheOwnerIsThePodWhoseFolderIsNextToTheRoot(t *testing.T) {
	for _, c := range []struct {
		path string // of the process's cgroup, below the cgroup of all pods
		want Owner  // the zero value means none
	}{
		{"burstable/pod" + testUID + "/" + testContainer, Owner{testUID, testContainer}},
		{"besteffort/pod" + testUID, Owner{testUID, ""}},
		{"pod" + testUID + "/" + testContainer, Owner{testUID, testContainer}},
		{"pod" + testUID + "/crio-" + testContainer, Owner{testUID, testContainer}},
		{"kubepods-burstable.slice/kubepods-burstable-pod" + testUnderscores + ".slice/cri-containerd-" + testContainer + ".scope", Owner{testUID, testContainer}},
		{"kubepods-pod" + testUnderscores + ".slice/crio-" + testContainer + ".scope", Owner{testUID, testContainer}},
		{"kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + testUnderscores + ".slice", Owner{testUID, ""}},
		{"burstable/pod" + testStaticUID + "/" + testContainer, Owner{testStaticUID, testContainer}},
		// Cgroups that a container creates below its own belong to the container, whatever their names are.
		{"burstable/pod" + testUID + "/" + testContainer + "/pod11111111-1111-4abc-8000-000000000000/x", Owner{testUID, testContainer}},
		{"burstable/pod" + testUID + "/made-by-the-pod", Owner{testUID, ""}},
		// Not of a pod.
		{"burstable", Owner{}},
		{"kubepods-burstable.slice", Owner{}},
		{"burstable/x/pod" + testUID, Owner{}},
		{"burstable/burstable/pod" + testUID, Owner{}},
		{"burstable/podx" + testUID, Owner{}},
		{"system.slice/kubelet.service", Owner{}},
	} {
		root := t.TempDir()
		if err := os.MkdirAll(filepath.Join(root, c.path), 0o755); err != nil {
			t.Fatal(err)
		}
		var levels [3]uint64
		path := root
		for i, folder := range strings.Split(c.path, "/") {
			path = filepath.Join(path, folder)
			id, err := cgroupID(path)
			if err != nil {
				t.Fatal(err)
			}
			if i < len(levels) {
				levels[i] = id
			}
		}
		got, err := (&podCgroups{root: root}).owner(levels)
		if got != c.want || (c.want == Owner{}) != errors.Is(err, ErrNoOwner) {
			t.Errorf("%s: %+v, %v; want %+v", c.path, got, err, c.want)
		}
	}
}

func TestAPodThatStartsLaterIsFound(t *testing.T) {
	root := t.TempDir()
	pods := &podCgroups{root: root}
	if _, err := pods.owner([3]uint64{1, 2, 3}); !errors.Is(err, ErrNoOwner) {
		t.Fatalf("an unknown cgroup: %v; want ErrNoOwner", err)
	}
	pod := filepath.Join(root, "pod"+testUID)
	for i, container := range []string{testContainer, strings.Repeat("cd", 32)} {
		path := filepath.Join(pod, container)
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		podID, _ := cgroupID(pod)
		containerID, _ := cgroupID(path)
		got, err := pods.owner([3]uint64{podID, containerID, 0})
		if want := (Owner{testUID, container}); err != nil || got != want {
			t.Errorf("container %d: %+v, %v; want %+v", i, got, err, want)
		}
	}
}
