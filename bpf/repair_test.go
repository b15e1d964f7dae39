package bpf

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// wantRepaired checks what the next Sync repairs, and that the one after it finds nothing to repair.
func (n *testNode) wantRepaired(want ...string) {
	n.t.Helper()
	for _, want := range [][]string{want, nil} {
		if got, err := n.capture.Sync(context.Background()); err != nil || !slices.Equal(got, want) {
			n.t.Errorf("repaired %q, %v; want %q", got, err, want)
		}
	}
}

// attached returns how many programs are attached to a hook of the cgroup of all pods.
func (n *testNode) attached(h hook) int {
	n.t.Helper()
	folder, err := os.Open(n.cgroup)
	if err != nil {
		n.t.Fatal(err)
	}
	defer folder.Close()
	result, err := link.QueryPrograms(link.QueryOptions{Target: int(folder.Fd()), Attach: h.attach})
	if err != nil {
		n.t.Fatal(err)
	}
	return len(result.Programs)
}

func TestWhatAnotherProgramRemovedIsRepaired(t *testing.T) {
	onNode(t, func(n *testNode) {
		n.install(nil)
		n.wantRepaired()
		for _, h := range hooks() {
			path := linkPath(n.pins, h)
			l, err := link.LoadPinnedLink(path, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := l.Detach(); err != nil {
				t.Fatal(err)
			}
			l.Close()
			n.wantRepaired("bpf " + h.name)

			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			n.wantRepaired("bpf " + h.name)
			// The kernel removes an eBPF link a moment after its last pin.
			for deadline := time.Now().Add(10 * time.Second); n.attached(h) != 1 && time.Now().Before(deadline); {
				time.Sleep(10 * time.Millisecond)
			}
			if got := n.attached(h); got != 1 {
				t.Errorf("%d programs are attached to %s; want one", got, h.name)
			}
		}
		settings := n.capture.loaded.Maps[programsMapSettings]
		if err := settings.Put(uint32(0), programsCaptureSettings{}); err != nil {
			t.Fatal(err)
		}
		n.wantRepaired("bpf settings")
		if err := n.capture.loaded.Maps[programsMapExemptPods].Put(uint64(1), uint8(1)); err != nil {
			t.Fatal(err)
		}
		n.wantRepaired("bpf exempt pods")
		n.want("pod", podCgroupName+"/"+testContainer, "connect", "nmi "+testUID+" "+testContainer)
	})
}

// The cgroup of all pods has another ID if the kubelet creates it again.
func TestANewCgroupOfAllPodsIsCaptured(t *testing.T) {
	onNode(t, func(n *testNode) {
		n.install(nil)
		removeCgroups(t, n.cgroup)
		if _, err := n.capture.Sync(context.Background()); err == nil {
			t.Error("Sync without the cgroup of all pods: no error")
		}
		n.makeCgroup("")
		repaired, err := n.capture.Sync(context.Background())
		if err != nil || len(repaired) != len(hooks())+1 {
			t.Errorf("repaired %q, %v; want the settings and all hooks", repaired, err)
		}
		n.want("pod", podCgroupName+"/"+testContainer, "connect", "nmi "+testUID+" "+testContainer)
	})
}

func TestASecondNMIReplacesTheProgramsOfTheFirst(t *testing.T) {
	onNode(t, func(n *testNode) {
		n.install(nil)
		for range 2 {
			n.capture.Close()
			n.want("pod", podCgroupName, "connect", "the kernel has no record of the pod that opened this connection: the capture by cgroup is not installed")
			n.capture = n.newCapture(nil)
			if err := n.capture.Install(context.Background()); err != nil {
				t.Fatal(err)
			}
			n.wantRepaired()
			n.want("pod", podCgroupName, "connect", "nmi "+testUID)
		}
		for _, h := range hooks() {
			if got := n.attached(h); got != 1 {
				t.Errorf("%d programs are attached to %s; want one", got, h.name)
			}
		}
	})
}

func TestExemptPodsOfTheHostNetworkReachTheMetadataService(t *testing.T) {
	onNode(t, func(n *testNode) {
		n.install(func(c *Config) { c.CaptureHostNetwork = true })
		exempt := func(uids ...string) {
			t.Helper()
			if err := n.capture.SetExemptPods(context.Background(), uids); err != nil {
				t.Fatal(err)
			}
		}
		n.want("", podCgroupName, "connect", "nmi "+testUID)
		n.want("", podCgroupName, "udp sendto", "EPERM")
		exempt(testUID, "another pod")
		n.want("", podCgroupName+"/"+testContainer, "connect", "azure")
		n.want("", "pod"+testStaticUID, "connect", "nmi "+testStaticUID)
		n.want("pod", podCgroupName, "connect", "nmi "+testUID)
		n.want("pod", podCgroupName, "ping", "EPERM")
		exempt()
		n.want("", podCgroupName, "ping", "EPERM")
		n.want("", podCgroupName, "connect", "nmi "+testUID)
	})
}

// The kubelet creates the cgroup of a pod after NMI knows the pod, and deletes it before NMI forgets the pod.
func TestAnExemptPodMayGetItsCgroupLater(t *testing.T) {
	onNode(t, func(n *testNode) {
		n.install(func(c *Config) { c.CaptureHostNetwork = true })
		if err := n.capture.SetExemptPods(context.Background(), []string{testUID}); err != nil {
			t.Fatal(err)
		}
		n.want("", podCgroupName, "connect", "nmi "+testUID)
		n.wantRepaired()
		n.want("", podCgroupName, "connect", "azure")
		removeCgroups(t, filepath.Join(n.cgroup, podCgroupName))
		n.wantRepaired()
		n.wantRepaired()
	})
}

func TestProcessesOutsideTheCgroupOfAllPodsAreNotCaptured(t *testing.T) {
	onNode(t, func(n *testNode) {
		n.install(func(c *Config) { c.CaptureHostNetwork = true })
		out, err := n.clientAt("", filepath.Dir(n.cgroup), "connect").Output()
		if err != nil || string(out) != "azure" {
			t.Errorf("a process of the node: %q, %v; want azure", out, err)
		}
	})
}

// Another program's eBPF link at the same hook stays in force. Its program refuses each connect to another server.
func TestProgramsOfOthersStay(t *testing.T) {
	onNode(t, func(n *testNode) {
		program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
			Instructions: asm.Instructions{
				asm.LoadMem(asm.R2, asm.R1, 24, asm.Word), // user_port
				asm.Mov.Imm(asm.R0, 1),
				asm.JNE.Imm(asm.R2, 81<<8, "end"),
				asm.Mov.Imm(asm.R0, 0),
				asm.Return().WithSymbol("end"),
			}})
		if err != nil {
			t.Fatal(err)
		}
		l, err := link.AttachCgroup(link.CgroupOptions{Path: n.cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: program})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		n.install(nil)
		n.want("pod", podCgroupName, "other port of the server", "EPERM")
		n.want("pod", podCgroupName, "connect", "nmi "+testUID)
		if err := Uninstall(context.Background(), n.pins); err != nil {
			t.Fatal(err)
		}
		n.want("pod", podCgroupName, "other port of the server", "EPERM")
		if got := n.attached(hook{attach: ebpf.AttachCGroupInet4Connect}); got != 1 {
			t.Errorf("%d programs are attached to connect4 after Uninstall; want that of the other program", got)
		}
	})
}

func TestUninstallLeavesNothing(t *testing.T) {
	onNode(t, func(n *testNode) {
		ctx := context.Background()
		if err := Uninstall(ctx, n.pins); err != nil {
			t.Errorf("uninstalling where nothing is installed: %v", err)
		}
		n.install(nil)
		n.want("pod", podCgroupName, "connect", "nmi "+testUID)
		for range 2 {
			if err := Uninstall(ctx, n.pins); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(n.pins); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the folder of the pins after Uninstall: %v; want that it does not exist", err)
			}
			for _, h := range hooks() {
				if got := n.attached(h); got != 0 {
					t.Errorf("%d programs are attached to %s after Uninstall", got, h.name)
				}
			}
			n.want("pod", podCgroupName, "connect", "azure")
		}
	})
}

func TestANodeThatCannotRunTheProgramsIsReported(t *testing.T) {
	onNode(t, func(n *testNode) {
		valid := Config{PodsCgroup: n.cgroup, PinDir: n.pins, Metadata: testMetadata, Listen: testListen}
		for _, c := range []struct {
			name   string
			change func(*Config)
			want   string
		}{
			{"no cgroup", func(c *Config) { c.PodsCgroup = "/nonexistent" }, "/nonexistent"},
			{"not a cgroup", func(c *Config) { c.PodsCgroup = "/proc" }, "is not a cgroup of version 2"},
			{"no bpffs", func(c *Config) { c.PinDir = "/tmp/podidentity" }, "mount bpffs on the node"},
			{"no folder", func(c *Config) { c.PinDir = "/nonexistent/podidentity" }, "mount bpffs on the node"},
		} {
			cfg := valid
			c.change(&cfg)
			if _, err := New(cfg); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v; want ErrUnsupported with %q", c.name, err, c.want)
			}
		}
		for _, change := range []func(*Config){
			func(c *Config) { c.Listen = testMetadata },
			func(c *Config) { c.Listen = netip.AddrPort{} },
			func(c *Config) { c.Metadata = netip.AddrPort{} },
		} {
			cfg := valid
			change(&cfg)
			if _, err := New(cfg); err == nil || errors.Is(err, ErrUnsupported) {
				t.Errorf("%+v: %v; want an error of the configuration", cfg, err)
			}
		}
		if _, err := os.Stat(n.pins); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the folder of the pins after New: %v; want that it does not exist", err)
		}
	})
}

// A tool that cleans bpffs detaches the programs. Sync attaches them again, to the maps that NMI has open.
func TestRemovedPinsAreRepaired(t *testing.T) {
	onNode(t, func(n *testNode) {
		n.install(nil)
		if err := os.RemoveAll(n.pins); err != nil {
			t.Fatal(err)
		}
		want := []string{"bpf maps"}
		for _, h := range hooks() {
			want = append(want, "bpf "+h.name)
		}
		n.wantRepaired(want...)
		n.want("pod", podCgroupName, "connect", "nmi "+testUID)
		// The next NMI uses these maps.
		n.capture.Close()
		n.capture = n.newCapture(nil)
		if err := n.capture.Install(context.Background()); err != nil {
			t.Fatal(err)
		}
		n.wantRepaired()
		n.want("pod", podCgroupName, "connect", "nmi "+testUID)
	})
}

func TestTheCgroupOfAllPodsMustContainThePodOfNMI(t *testing.T) {
	onNode(t, func(n *testNode) {
		n.makeCgroup("burstable/pod" + testUID)
		for root, ok := range map[string]bool{n.cgroup: true, filepath.Join(n.cgroup, "burstable"): false, filepath.Join(n.cgroup, "burstable", "pod"+testUID): false, filepath.Dir(n.cgroup): false} {
			_, err := New(Config{PodsCgroup: root, PinDir: n.pins, Metadata: testMetadata, Listen: testListen, OwnPodUID: testUID})
			if ok != (err == nil) || !ok && !strings.Contains(err.Error(), "--pods-cgroup") {
				t.Errorf("%s: %v", root, err)
			}
		}
	})
}
