package links

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
)

const (
	// pollInterval bounds the interval in which a link was created, on a node on which nothing else happens.
	pollInterval = time.Second
	// saveInterval is the highest time between two writes of the file. A write also updates savedTable.Current.
	saveInterval = 10 * time.Second
	retryTime    = time.Second
)

// Run keeps the table up to date until ctx ends.
func (t *Table) Run(ctx context.Context) {
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.failure = errNotRead
		t.net.close()
	}()
	stop := context.AfterFunc(ctx, t.net.interrupt)
	defer stop()
	var w writer
	failed := false
	for first := true; ctx.Err() == nil; {
		if err := t.ensureStarted(first); err != nil {
			if !failed {
				t.cfg.Log.Error("cannot watch the network links of the node; until this works, no pod gets tokens by its address alone", zap.Error(err))
			}
			failed = true
			t.report(err)
			w = writer{}
			sleep(ctx, retryTime)
			continue
		}
		first, failed = false, false
		t.saveIfDue(&w, false)
		t.net.wait(pollInterval)
	}
	t.saveIfDue(&w, true)
}

// writer is the state of saveIfDue.
type writer struct {
	saved time.Duration // since the boot; 0 if never
	err   error         // of the last write
}

// saveIfDue processes the events, and saves the table if that is due.
func (t *Table) saveIfDue(w *writer, due bool) {
	t.mu.Lock()
	err := t.processEvents()
	since := t.clock.sinceBoot() - w.saved
	if err != nil || !due && w.saved != 0 && since < saveInterval && (!t.dirty || since < pollInterval) {
		t.mu.Unlock()
		return
	}
	content := t.snapshot(t.clock.boot)
	t.dirty, w.saved = false, t.clock.sinceBoot()
	t.mu.Unlock()
	t.report(nil)
	w.err = t.save(content, w.err)
}

func (t *Table) report(err error) {
	if t.cfg.OnState != nil {
		t.cfg.OnState(err)
	}
}

// save writes the file. It logs the first of several failures in a row.
func (t *Table) save(m savedTable, previous error) error {
	if m.Boot == "" {
		return nil
	}
	err := m.save(t.cfg.File)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("writing the table of network links to %s, the folder of --state-dir: %w", filepath.Dir(t.cfg.File), err)
	if previous == nil {
		t.cfg.Log.Error("cannot remember the network links of the node for the next start of NMI; pods that start while NMI does not run may wait some seconds for their first token; make the folder of --state-dir writable", zap.Error(err))
	}
	return err
}

// ensureStarted subscribes to the changes of the network and reads its state, if that has not been done or the subscription
// is broken. The first call also reads the file.
func (t *Table) ensureStarted(first bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.failure == nil {
		return nil
	}
	if !first {
		t.cfg.Log.Warn("events of the network links of the node were lost; NMI reads all links again", zap.Error(t.failure))
	}
	before := t.clock.sinceBoot()
	now, err := t.net.start()
	if err != nil {
		t.failure = err
		return err
	}
	var remembered *savedTable
	if first {
		remembered, err = readMemory(t.cfg.File, t.clock.boot, t.clock.sinceBoot())
		switch {
		case err == nil:
			t.current = remembered.Current
		case !errors.Is(err, fs.ErrNotExist):
			t.cfg.Log.Warn("the remembered table of network links is not usable; each link may have been created at any time since the boot of the node", zap.Error(err))
		}
	}
	t.read(now, remembered)
	t.current, t.failure = before, nil
	if t.cfg.OnChange != nil {
		t.cfg.OnChange()
	}
	return nil
}

// Remove removes the file.
func Remove(file string) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
