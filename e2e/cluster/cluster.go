package cluster

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Options of a new cluster. The zero value is a good one.
type Options struct {
	// Progress receives one line of text for each step.
	Progress func(line string)
	// LogDir keeps the logs of all processes. By default they are in the run folder and go with it.
	LogDir string
	// Program is the built cluster program; it is built when this is empty.
	Program string
	// ProviderIDs are the nodes' spec.providerID, by node name. By default they are instances of one scale set.
	ProviderIDs map[string]string
	// Wait is how long to wait for another cluster on this machine to end, such as that of a test of another package.
	Wait time.Duration
	// WithoutAzure leaves the stand-in Azure out.
	WithoutAzure bool
}

// Cluster is a running cluster.
type Cluster struct {
	bin    Binaries
	logDir string
	say    func(string)

	// Of the owner only; a cluster that was merely opened has none of them.
	supervisor *exec.Cmd
	pipe       *os.File
	ended      chan struct{} // closed when the supervisor has ended
}

// Start builds what is missing and starts a cluster. It belongs to this process: it ends with Stop, or when the
// process ends in whatever way, unless Detach is called.
func Start(ctx context.Context, opts Options) (*Cluster, error) {
	say := opts.Progress
	if say == nil {
		say = func(string) {}
	}
	if err := RequireRoot(); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(opts.Wait)
	if err := awaitOther(ctx, deadline); err != nil {
		return nil, err
	}
	cfg, err := prepareStart(ctx, opts, say)
	if err != nil {
		return nil, err
	}
	c := &Cluster{bin: cfg.Binaries, logDir: cfg.LogDir, say: say}
	err = c.launch(ctx, cfg)
	for errors.Is(err, ErrRunning) && time.Now().Before(deadline) {
		// Another one that waited too was faster.
		if err := awaitOther(ctx, deadline); err != nil {
			return nil, err
		}
		err = c.launch(ctx, cfg)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// awaitOther returns once no other cluster runs, and ErrRunning if one still does at the deadline.
func awaitOther(ctx context.Context, deadline time.Time) error {
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for {
		s, err := running()
		if errors.Is(err, ErrNotRunning) {
			return nil
		}
		if err != nil {
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

func prepareStart(ctx context.Context, opts Options, say func(string)) (*superviseConfig, error) {
	cfg := &superviseConfig{Program: opts.Program, LogDir: opts.LogDir, ProviderIDs: map[string]string{}}
	var err error
	if cfg.Binaries, err = EnsureBinaries(ctx, say); err != nil {
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
			return nil, fmt.Errorf("a provider ID is given for node %q, which does not exist", name)
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

// launch runs the supervisor and waits until it says that the cluster is ready.
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

	// Not tied to ctx: the supervisor ends in order, when its pipe is closed.
	c.supervisor = exec.Command(cfg.Program, "supervise")
	c.supervisor.ExtraFiles = []*os.File{ownerR, eventsW} // descriptors 3 and 4
	c.supervisor.Dir = "/"
	// A session of its own: an interrupt typed at the terminal is for the owner, who then decides.
	c.supervisor.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.supervisor.Start(); err != nil {
		ownerW.Close()
		return fmt.Errorf("starting the cluster's supervisor: %w", err)
	}
	c.pipe, c.ended = ownerW, make(chan struct{})
	go func() {
		_ = c.supervisor.Wait() // what went wrong comes as an event
		close(c.ended)
	}()
	eventsW.Close()

	// Without this, an owner that is told to stop would wait for the start to end.
	stopWatching := context.AfterFunc(ctx, func() { c.pipe.Close() })
	defer stopWatching()
	line, err := json.Marshal(cfg)
	if err == nil {
		_, err = ownerW.Write(append(line, '\n'))
	}
	if err == nil {
		err = c.follow(eventsR)
	}
	if err != nil {
		return errors.Join(err, c.release())
	}
	return ctx.Err()
}

func (c *Cluster) follow(events io.Reader) error {
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
			c.say(fmt.Sprintf("%5.1f s  %s", time.Since(start).Seconds(), e.Step))
		}
	}
	return fmt.Errorf("starting the cluster: its supervisor ended%s", logTail(filepath.Join(c.logDir, "supervisor.log")))
}

// release lets the supervisor take everything down, and waits for it.
func (c *Cluster) release() error {
	c.pipe.Close()
	select {
	case <-c.ended:
		return nil
	case <-time.After(30 * time.Second):
		return fmt.Errorf("the cluster's supervisor (process %d) did not end within 30 s", c.supervisor.Process.Pid)
	}
}

// Open returns the cluster that runs on this machine, whoever started it.
func Open() (*Cluster, error) {
	s, err := running()
	if err != nil {
		return nil, err
	}
	if !s.Ready {
		return nil, errors.New("the cluster is still starting")
	}
	return &Cluster{bin: s.Binaries, logDir: s.LogDir, say: func(string) {}}, nil
}

func running() (*state, error) {
	s, err := readState()
	if err != nil {
		return nil, err
	}
	if s == nil || !s.Supervisor.alive() {
		return nil, ErrNotRunning
	}
	return s, nil
}

// Detach lets the cluster run on when this process ends.
func (c *Cluster) Detach() error {
	if _, err := c.pipe.Write([]byte{detachByte}); err != nil {
		return fmt.Errorf("detaching from the cluster: %w", err)
	}
	return nil
}

// Stop takes the cluster down and returns when nothing of it is left.
func (c *Cluster) Stop() error {
	err := Down()
	if c.pipe != nil {
		err = errors.Join(err, c.release())
	}
	return err
}

// Down takes down the cluster that runs on this machine, or what a killed one has left. It is no error if there is
// nothing to do.
func Down() error {
	if err := RequireRoot(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := running()
	if err == nil {
		if err := control(ctx, "/stop"); err != nil && s.Supervisor.alive() {
			// Its children end with it; the rest is cleaned up below.
			if killErr := s.Supervisor.kill(syscall.SIGKILL); killErr != nil {
				return errors.Join(err, killErr)
			}
		}
		if err := s.Supervisor.waitGone(10 * time.Second); err != nil {
			return err
		}
	} else if !errors.Is(err, ErrNotRunning) {
		return err
	}
	lock, err := lockRun()
	if err != nil {
		return err
	}
	defer lock.Close()
	return cleanUp()
}

// Kubeconfig is the path of the admin's kubeconfig. Its address is reached only from inside the cluster's namespaces.
func (c *Cluster) Kubeconfig() string { return adminConfig }

// LogDir holds the logs of all processes of the cluster.
func (c *Cluster) LogDir() string { return c.logDir }

// Nodes are the names of the nodes.
func (c *Cluster) Nodes() []string {
	var names []string
	for _, n := range nodeSpecs {
		names = append(names, n.Name)
	}
	return names
}

// DialContext connects from inside the control plane's namespace: with it as rest.Config.Dial, a client-go client in
// the test process reaches the API server.
func (c *Cluster) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return DialFrom(netnsPath(controlPlaneNetns), nil)(ctx, network, address)
}

// KubectlCommand is kubectl as admin, ready to run.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) (*exec.Cmd, error) {
	return c.adminCommand(ctx, c.bin.kube("kubectl"), args...)
}

// HelmCommand is helm as admin, ready to run.
func (c *Cluster) HelmCommand(ctx context.Context, args ...string) (*exec.Cmd, error) {
	return c.adminCommand(ctx, c.bin.Helm, args...)
}

func (c *Cluster) adminCommand(ctx context.Context, program string, args ...string) (*exec.Cmd, error) {
	cmd, err := inNetns(ctx, controlPlaneNetns, program, args...)
	if err != nil {
		return nil, err
	}
	cmd.Env = append(os.Environ(), adminEnv()...)
	return cmd, nil
}

// Kubectl runs kubectl as admin and returns what it printed.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.kubectl(ctx, nil, args...)
}

// Apply creates or changes the objects of a YAML text.
func (c *Cluster) Apply(ctx context.Context, yaml string) error {
	_, err := c.kubectl(ctx, strings.NewReader(yaml), "apply", "-f", "-")
	return err
}

func (c *Cluster) kubectl(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	cmd, err := c.KubectlCommand(ctx, args...)
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w%s", strings.Join(args, " "), err, indented(lastLines(stderr.String(), 12)))
	}
	return stdout.String(), nil
}

// StopAPIServer kills the API server; clients find its port closed.
func (c *Cluster) StopAPIServer(ctx context.Context) error { return control(ctx, "/apiserver/stop") }

// StartAPIServer starts it again and returns when it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error { return control(ctx, "/apiserver/start") }

// RestartNode switches a node off and on again, and returns when it is ready. Its pods are restarted.
func (c *Cluster) RestartNode(ctx context.Context, name string) error {
	return control(ctx, "/nodes/"+name+"/restart")
}
