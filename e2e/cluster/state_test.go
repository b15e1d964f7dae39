package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// useRunFolder makes the package use an empty run folder of the test.
func useRunFolder(t *testing.T) {
	oldDir, oldFile := runDir, stateFile
	t.Cleanup(func() { runDir, stateFile = oldDir, oldFile })
	runDir = t.TempDir()
	stateFile = filepath.Join(runDir, "state.json")
}

func TestDamagedStateWithoutSupervisorIsNoState(t *testing.T) {
	for name, text := range map[string]string{"empty": "", "cut": `{"bootID": "x`, "of another type": `[]`} {
		t.Run(name, func(t *testing.T) {
			useRunFolder(t)
			if err := os.WriteFile(stateFile, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(); !errors.Is(err, ErrNotRunning) {
				t.Errorf("Open: error %v, want ErrNotRunning", err)
			}
			if err := awaitOtherCluster(t.Context(), time.Now()); err != nil {
				t.Errorf("waiting for another cluster: %v", err)
			}
			if err := killRecorded(); err != nil {
				t.Errorf("killing the recorded processes: %v", err)
			}
		})
	}
}

func TestDamagedStateOfARunningClusterIsReportedWithTheRemedy(t *testing.T) {
	useRunFolder(t)
	if err := os.WriteFile(stateFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	lock, err := lockRun()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if _, err := Open(); !errors.Is(err, errDamagedState) || !strings.Contains(err.Error(), downCommand) {
		t.Errorf("Open: error %v, want errDamagedState and the command that removes the cluster", err)
	}
	if err := awaitOtherCluster(t.Context(), time.Now()); !errors.Is(err, ErrRunning) {
		t.Errorf("waiting for another cluster: error %v, want ErrRunning", err)
	}
	if err := RemoveLeftovers(); !errors.Is(err, ErrRunning) {
		t.Errorf("RemoveLeftovers: error %v, want ErrRunning", err)
	}
	if _, err := os.Stat(stateFile); err != nil {
		t.Errorf("the state of the running cluster was removed: %v", err)
	}
}

func TestNoRunFolderIsCreatedToSeeThatNoClusterRuns(t *testing.T) {
	useRunFolder(t)
	runDir = filepath.Join(runDir, "absent")
	if locked, err := runLocked(); locked || err != nil {
		t.Errorf("runLocked: %v, error %v, want false", locked, err)
	}
	if _, err := os.Stat(runDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the run folder exists (error %v)", err)
	}
}
