package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Options are the options of a new cluster. The zero value is useful.
type Options struct {
	// Progress is called with one line of text for each step, possibly by several goroutines at once.
	Progress func(line string)
	// LogDir is the folder for the logs of all processes. The default is a folder in the run folder, which is removed
	// with the cluster.
	LogDir string
	// Program is the path of the built program e2e/cmd/cluster. If it is empty, Start builds the program.
	Program string
	// ProviderIDs are the nodes' spec.providerID, by node name. By default the nodes are instances of one scale set.
	ProviderIDs map[string]string
	// Wait is how long Start waits for another cluster with the same PODIDENTITY_CLUSTER to end, such as the cluster of
	// another package's tests.
	Wait time.Duration
	// WithoutAzure leaves out the fake Azure.
	WithoutAzure bool
}

// Cluster is a running cluster.
type Cluster struct {
	Admin
	NetworkNamespaces

	bin      Binaries
	logDir   string
	progress func(string)

	// The owner, the process that started the cluster, sets these fields. They are nil in a Cluster that Open returns.
	supervisor *exec.Cmd
	pipe       *os.File
	ended      chan struct{} // closed when the supervisor has ended
}

func newCluster(bin Binaries, logDir string, progress func(string)) *Cluster {
	admin := Admin{bin}
	return &Cluster{Admin: admin, NetworkNamespaces: newNetworkNamespaces(), bin: bin, logDir: logDir, progress: progress}
}

// Start builds what is missing and starts a cluster. The cluster belongs to this process: it ends with Stop, or when
// the process ends for any reason, unless Detach is called. Start returns ErrRunning if another cluster with the same
// PODIDENTITY_CLUSTER still runs after opts.Wait.
func Start(ctx context.Context, opts Options) (*Cluster, error) {
	progress := opts.Progress
	if progress == nil {
		progress = func(string) {}
	}
	if err := RequireRoot(); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(opts.Wait)
	if err := awaitOtherCluster(ctx, deadline); err != nil {
		return nil, err
	}
	cfg, err := prepareStart(ctx, opts, progress)
	if err != nil {
		return nil, err
	}
	c := newCluster(cfg.Binaries, cfg.LogDir, progress)
	err = c.launch(ctx, cfg)
	for errors.Is(err, ErrRunning) && time.Now().Before(deadline) {
		// Since awaitOtherCluster returned, another process has locked the run folder, to start or to remove a cluster.
		if err := awaitOtherCluster(ctx, deadline); err != nil {
			return nil, err
		}
		err = c.launch(ctx, cfg)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// awaitOtherCluster returns nil once no cluster with this PODIDENTITY_CLUSTER runs. It returns ErrRunning if one still
// runs at the deadline.
func awaitOtherCluster(ctx context.Context, deadline time.Time) error {
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for {
		s, err := running()
		if errors.Is(err, ErrNotRunning) {
			return nil
		}
		// A damaged state of a running cluster is no reason not to wait: a supervisor that starts removes it.
		if err != nil && !errors.Is(err, errDamagedState) {
			return err
		}
		if time.Now().After(deadline) {
			return errRunning(s)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

func prepareStart(ctx context.Context, opts Options, progress func(string)) (*superviseConfig, error) {
	cfg := &superviseConfig{Program: opts.Program, LogDir: opts.LogDir, ProviderIDs: map[string]string{}}
	var err error
	if cfg.Binaries, err = EnsureBinaries(ctx, progress); err != nil {
		return nil, err
	}
	if cfg.Program == "" {
		e2e, err := e2eDir()
		if err != nil {
			return nil, err
		}
		if cfg.Program, err = buildProgram(ctx, e2e, "./cmd/cluster", "cluster"); err != nil {
			return nil, err
		}
	}
	images, err := BuildBaseImages(ctx)
	if err != nil {
		return nil, err
	}
	for _, image := range images {
		cfg.Images = append(cfg.Images, image.Archive)
	}
	if cfg.LogDir == "" {
		cfg.LogDir = defaultLogDir
	} else if cfg.LogDir, err = filepath.Abs(cfg.LogDir); err != nil {
		return nil, err
	}
	for i, n := range nodeSpecs {
		if cfg.ProviderIDs[n.Name] = opts.ProviderIDs[n.Name]; cfg.ProviderIDs[n.Name] == "" {
			cfg.ProviderIDs[n.Name] = defaultProviderID(i)
		}
	}
	for name := range opts.ProviderIDs {
		if _, ok := cfg.ProviderIDs[name]; !ok {
			return nil, fmt.Errorf("Options.ProviderIDs has an ID for node %q, which does not exist", name)
		}
	}
	if !opts.WithoutAzure {
		cfg.Hosts = azureHosts()
		if cfg.Azure, err = azureConfigJSON(cfg.ProviderIDs); err != nil {
			return nil, err
		}
	}
	return cfg, nil
}

// launch runs the supervisor and waits until it reports that the cluster is ready.
func (c *Cluster) launch(ctx context.Context, cfg *superviseConfig) error {
	ownerR, ownerW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ownerR.Close()
	eventsR, eventsW, err := os.Pipe()
	if err != nil {
		ownerW.Close()
		return err
	}
	defer eventsR.Close()
	defer eventsW.Close()

	// CommandContext would kill the supervisor when ctx ends. Instead, the owner's pipe is closed (see below), and the
	// supervisor stops and removes the cluster.
	c.supervisor = exec.Command(cfg.Program, "supervise")
	c.supervisor.ExtraFiles = []*os.File{ownerR, eventsW} // descriptors 3 and 4
	c.supervisor.Dir = "/"
	// The supervisor has its own session, so that Ctrl-C at the terminal reaches only the owner. The owner decides
	// whether to stop the cluster.
	c.supervisor.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.supervisor.Start(); err != nil {
		ownerW.Close()
		return fmt.Errorf("starting the cluster's supervisor: %w", err)
	}
	c.pipe, c.ended = ownerW, make(chan struct{})
	go func() {
		_ = c.supervisor.Wait() // the supervisor reports its errors as events
		close(c.ended)
	}()
	eventsW.Close()

	// If ctx ends during the start, the closed pipe makes the supervisor interrupt the start. Without that, launch
	// would wait until the start has finished.
	stop := context.AfterFunc(ctx, func() { c.pipe.Close() })
	defer stop()
	line, err := json.Marshal(cfg)
	if err == nil {
		_, err = ownerW.Write(append(line, '\n'))
	}
	if err == nil {
		err = c.readEvents(eventsR)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return errors.Join(err, c.stopSupervisor())
	}
	return nil
}

// readEvents reports the supervisor's progress. It returns nil when the cluster is ready, and an error when the start
// has failed or the supervisor has ended.
func (c *Cluster) readEvents(events io.Reader) error {
	start := time.Now()
	for lines := bufio.NewScanner(events); lines.Scan(); {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("reading the supervisor's progress: %w", err)
		}
		switch {
		case e.Ready:
			return nil
		case e.Running:
			return fmt.Errorf("starting the cluster: %w%s", ErrRunning, strings.TrimPrefix(e.Error, ErrRunning.Error()))
		case e.Error != "":
			return fmt.Errorf("starting the cluster: %s", e.Error)
		case e.Step != "":
			c.progress(fmt.Sprintf("%5.1f s  %s", time.Since(start).Seconds(), e.Step))
		}
	}
	return fmt.Errorf("starting the cluster: the supervisor ended before the cluster was ready%s", logTail(filepath.Join(c.logDir, "supervisor.log")))
}

// stopSupervisor closes the owner's pipe, and waits up to 30 s for the supervisor to end. The closed pipe makes the
// supervisor stop the cluster, unless the owner has detached.
func (c *Cluster) stopSupervisor() error {
	c.pipe.Close()
	select {
	case <-c.ended:
		return nil
	case <-time.After(30 * time.Second):
		return fmt.Errorf("the cluster's supervisor (process %d) did not end within 30 s: remove the cluster with `%s`", c.supervisor.Process.Pid, downCommand)
	}
}

// Open returns the running cluster with this PODIDENTITY_CLUSTER, whichever process started it. It returns
// ErrNotRunning if there is none, and another error while the cluster starts or if PODIDENTITY_CLUSTER is invalid.
func Open() (*Cluster, error) {
	if err := checkInstance(instance); err != nil {
		return nil, err
	}
	s, err := running()
	if err != nil {
		return nil, err
	}
	if !s.Ready {
		return nil, fmt.Errorf("the cluster (supervisor process %d) is still starting: try again when it is ready", s.Supervisor.PID)
	}
	return newCluster(s.Binaries, s.LogDir, func(string) {}), nil
}

// running returns the state of the running cluster, and ErrNotRunning if none runs. It returns errDamagedState only if
// a process holds the lock of lockRun: otherwise no supervisor lives, and the state does not matter.
func running() (*state, error) {
	s, err := readState()
	if errors.Is(err, errDamagedState) {
		locked, lockErr := runLocked()
		if lockErr == nil && !locked {
			return nil, ErrNotRunning
		}
		return nil, errors.Join(err, lockErr)
	}
	if err != nil {
		return nil, err
	}
	if s == nil || !s.Supervisor.alive() {
		return nil, ErrNotRunning
	}
	return s, nil
}

// Detach lets the cluster continue to run when this process ends.
func (c *Cluster) Detach() error {
	if _, err := c.pipe.Write([]byte{detachByte}); err != nil {
		return fmt.Errorf("detaching from the cluster: %w", err)
	}
	return nil
}

// Stop stops the cluster and returns when nothing of it is left.
func (c *Cluster) Stop() error {
	err := Down()
	if c.pipe != nil {
		err = errors.Join(err, c.stopSupervisor())
	}
	return err
}

// Down stops the cluster with this PODIDENTITY_CLUSTER, if it runs, and removes what is left of it, also after its
// supervisor was killed. It returns nil if there is nothing to do.
func Down() error {
	if err := RequireRoot(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := running()
	switch {
	case err == nil:
		if err := control(ctx, "/stop"); err != nil && s.Supervisor.alive() {
			// The supervisor's children end with the supervisor. cleanUp removes the rest.
			if killErr := s.Supervisor.kill(); killErr != nil {
				return errors.Join(err, killErr)
			}
		}
		if err := s.Supervisor.waitGone(10 * time.Second); err != nil {
			return err
		}
	case errors.Is(err, errDamagedState):
		// The supervisor's PID is unknown. RemoveLeftovers returns an error if the supervisor does not stop.
		_ = control(ctx, "/stop")
	case !errors.Is(err, ErrNotRunning):
		return err
	}
	return RemoveLeftovers()
}

// RemoveLeftovers removes what is left of a cluster whose supervisor was killed. Unlike Down it does not stop a running
// cluster with this PODIDENTITY_CLUSTER, but returns ErrRunning.
func RemoveLeftovers() error {
	lock, err := lockRun()
	if err != nil {
		return fmt.Errorf("removing the cluster (if another process starts or removes it now, try again): %w", err)
	}
	defer lock.Close()
	return cleanUp()
}

// LogDir is the folder with the logs of all processes of the cluster.
func (c *Cluster) LogDir() string { return c.logDir }

// Nodes returns the names of the nodes.
func (c *Cluster) Nodes() []string {
	var names []string
	for _, n := range nodeSpecs {
		names = append(names, n.Name)
	}
	return names
}

// StopAPIServer kills the API server; connections to its port are then refused.
func (c *Cluster) StopAPIServer(ctx context.Context) error { return control(ctx, "/apiserver/stop") }

// StartAPIServer starts a stopped API server and returns when it is ready. It fails if the API server is running.
func (c *Cluster) StartAPIServer(ctx context.Context) error { return control(ctx, "/apiserver/start") }

// RestartNode stops and starts a node like a reboot, and returns when the node is ready. The kubelet restarts the
// node's pods; they may not run yet when RestartNode returns.
func (c *Cluster) RestartNode(ctx context.Context, name string) error {
	return control(ctx, "/nodes/"+name+"/restart")
}
