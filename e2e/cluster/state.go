package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// state is what the supervisor records for other programs: those that use the cluster, and the one that cleans up after
// a killed supervisor.
type state struct {
	BootID     string               `json:"bootID"` // the PIDs are invalid after a reboot
	Supervisor processID            `json:"supervisor"`
	Started    time.Time            `json:"started"`
	Processes  map[string]processID `json:"processes"`
	Binaries   Binaries             `json:"binaries"`
	LogDir     string               `json:"logDir"`
	Ready      bool                 `json:"ready"`
}

func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
}

// errDamagedState is returned if the state is not valid JSON.
var errDamagedState = errors.New("the cluster's state is damaged")

// readState returns nil without an error if there is no state, or if it is from before the last boot. It returns
// errDamagedState if the state is not valid JSON.
func readState() (*state, error) {
	data, err := os.ReadFile(stateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the cluster's state: %w", err)
	}
	var s state
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("reading %s: %w: %w; remove the cluster with `%s`", stateFile, errDamagedState, err, downCommand)
	}
	if s.BootID != bootID() {
		return nil, nil
	}
	return &s, nil
}

// write replaces the file atomically: a reader never sees a part of it.
func (s *state) write() error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(stateFile+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(stateFile+".new", stateFile)
}

// ErrRunning is returned if another cluster with the same PODIDENTITY_CLUSTER runs: both would use the same names,
// network namespaces and cgroups.
var ErrRunning = fmt.Errorf("a cluster with PODIDENTITY_CLUSTER=%q is already running on this host", instance)

func errRunning(s *state) error {
	since := ""
	if s != nil {
		since = fmt.Sprintf(" since %s (supervisor process %d)", s.Started.Format(time.TimeOnly), s.Supervisor.PID)
	}
	return fmt.Errorf("%w%s; remove it with `%s`, or start another cluster beside it with another PODIDENTITY_CLUSTER", ErrRunning, since, downCommand)
}

// ErrNotRunning is returned by functions that need a running cluster.
var ErrNotRunning = fmt.Errorf("no cluster with PODIDENTITY_CLUSTER=%q is running on this host: start one with `%s`", instance, upCommand(instance))

// lockRun locks the run folder, so that only one cluster with this PODIDENTITY_CLUSTER runs at a time. It returns
// ErrRunning if another process holds the lock. The kernel releases the lock when the process that holds it ends for
// any reason.
func lockRun() (*os.File, error) {
	for {
		if err := os.MkdirAll(runDir, 0o755); err != nil {
			return nil, fmt.Errorf("making the run folder: %w", err)
		}
		dir, err := os.Open(runDir)
		if err != nil {
			return nil, fmt.Errorf("opening the run folder: %w", err)
		}
		if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			dir.Close()
			s, _ := readState() // nil, or the state of an earlier cluster, if the holder has just started
			return nil, errRunning(s)
		}
		// The previous holder may have removed the folder between Open and Flock.
		held, errHeld := dir.Stat()
		there, errThere := os.Stat(runDir)
		if errHeld == nil && errThere == nil && os.SameFile(held, there) {
			return dir, nil
		}
		dir.Close()
	}
}

// runLocked reports whether a process holds the lock of lockRun. Unlike lockRun it does not create the run folder.
func runLocked() (bool, error) {
	dir, err := os.Open(runDir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("opening the run folder: %w", err)
	}
	defer dir.Close()
	err = unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// cleanUp removes what is left of a cluster that stops, or whose supervisor was killed while the cluster ran or
// started. The caller holds the lock of lockRun, so no other cluster with this PODIDENTITY_CLUSTER runs. cleanUp is
// idempotent.
func cleanUp() error {
	if err := errors.Join(killRecorded(), removeCgroups(namePrefix+"*"), removeNetwork(), unmountBelow(runDir)); err != nil {
		return fmt.Errorf("cleaning up after the cluster: %w", err)
	}
	// Last, because a retry needs the state.
	if err := os.RemoveAll(runDir); err != nil {
		return fmt.Errorf("cleaning up after the cluster: %w", err)
	}
	return nil
}

// killRecorded kills the processes in the state. A damaged state is no error: the kernel has killed the processes with
// their supervisor, and cleanUp finds everything else by its name.
func killRecorded() error {
	s, err := readState()
	if errors.Is(err, errDamagedState) || err == nil && s == nil {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for name, p := range s.Processes {
		if err := p.kill(); err != nil {
			errs = append(errs, fmt.Errorf("killing %s: %w", name, err))
		}
	}
	for _, p := range s.Processes {
		errs = append(errs, p.waitGone(10*time.Second))
	}
	return errors.Join(errs...)
}

func unmountBelow(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range slices.Backward(mounts) { // the newest first
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

func mountsBelow(dir string) ([]*mountinfo.Info, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, dir+string(filepath.Separator)), false
	})
	if err != nil {
		return nil, fmt.Errorf("listing mounts: %w", err)
	}
	return mounts, nil
}
