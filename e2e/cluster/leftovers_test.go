package cluster

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
)

// ownerVariable is the environment variable that makes the test program start a cluster and wait until a test kills it.
const ownerVariable = "PODIDENTITY_TEST_OWNS_CLUSTER"

func TestMain(m *testing.M) {
	if os.Getenv(firstThreadVariable) != "" {
		endFirstThread()
	}
	if os.Getenv(ownerVariable) == "" {
		os.Exit(m.Run())
	}
	_, err := Start(context.Background(), Options{Progress: func(line string) { fmt.Println(line) }})
	fmt.Println("started:", err)
	time.Sleep(time.Hour) // until the test kills it; select{} would be a deadlock error after the end of the supervisor
}

func TestKilledOwnerLeavesNothing(t *testing.T) {
	for _, when := range []struct{ name, line string }{
		{"while the cluster starts", "the API server is ready"},
		{"while the cluster runs", "started: <nil>"},
	} {
		t.Run(when.name, func(t *testing.T) {
			owner, output := startOwner(t)
			waitForLine(t, output, when.line)
			ids := recorded(t)
			if err := owner.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			for _, p := range ids {
				if err := p.waitGone(20 * time.Second); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("all processes ended %s after the owner was killed", time.Since(began).Round(time.Millisecond))
			checkNothingLeft(t, ids)
		})
	}
}

func TestDownRemovesWhatAKilledSupervisorLeft(t *testing.T) {
	owner, output := startOwner(t)
	defer owner.Process.Kill()
	waitForLine(t, output, "started: <nil>")
	ids := recorded(t)
	if err := ids["supervisor"].kill(); err != nil {
		t.Fatal(err)
	}
	for name, p := range ids {
		if err := p.waitGone(10 * time.Second); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for range 2 { // the second time there is nothing to do
		if err := Down(); err != nil {
			t.Fatal(err)
		}
		checkNothingLeft(t, ids)
	}
}

func startOwner(t *testing.T) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	owner := exec.Command(os.Args[0])
	owner.Env = append(os.Environ(), ownerVariable+"=1")
	owner.Stderr = os.Stderr
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = owner.Process.Kill(); _ = owner.Wait() })
	return owner, bufio.NewScanner(out)
}

func waitForLine(t *testing.T, lines *bufio.Scanner, want string) {
	t.Helper()
	for lines.Scan() {
		if strings.Contains(lines.Text(), want) {
			return
		}
		if strings.HasPrefix(lines.Text(), "started:") {
			break
		}
	}
	t.Fatalf("the owner printed %q instead of %q", lines.Text(), want)
}

// recorded returns the processes of the running cluster, including its supervisor.
func recorded(t *testing.T) map[string]processID {
	t.Helper()
	s, err := running()
	if err != nil {
		t.Fatal(err)
	}
	s.Processes["supervisor"] = s.Supervisor
	return s.Processes
}

func checkNothingLeft(t *testing.T, ids map[string]processID) {
	t.Helper()
	for name, p := range ids {
		if p.alive() {
			t.Errorf("process %d (%s) still runs", p.PID, name)
		}
	}
	if len(ids) < 5 {
		t.Errorf("only %d processes were recorded, want at least 5: %v", len(ids), ids)
	}
	if _, err := os.Stat(runDir); err == nil {
		t.Errorf("%s still exists", runDir)
	}
	for _, pattern := range []string{netnsPath(namePrefix + "*"), "/sys/fs/cgroup/" + namePrefix + "*", "/sys/fs/cgroup/*/" + namePrefix + "*"} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("%v still exists", left)
		}
	}
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if strings.HasPrefix(m.Mountpoint, runDir) || strings.Contains(m.Mountpoint, "/"+namePrefix) {
			t.Errorf("mount %s still exists", m.Mountpoint)
		}
	}
	checkNoPrograms(t)
}

// checkNoPrograms checks that no process runs a program of the cluster. It also finds processes that the supervisor
// does not record, such as shims and containers that run podclient.
func checkNoPrograms(t *testing.T) {
	t.Helper()
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, file := range files {
		exe, err := os.Readlink(file)
		if err == nil && (strings.HasPrefix(exe, cache+"/") || exe == "/podclient") {
			t.Errorf("a process still runs %s: %s", exe, file)
		}
	}
}
