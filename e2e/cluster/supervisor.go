package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// superviseConfig is the supervisor's configuration: the first line that its owner writes into the pipe.
type superviseConfig struct {
	Binaries    Binaries
	Program     string
	LogDir      string
	Images      []string          // archives to import into each node
	ProviderIDs map[string]string // by node
	Hosts       string            // for each node's /etc/hosts
	Azure       json.RawMessage   `json:",omitempty"` // configuration of the fake Azure, if it runs
}

// event is one line that the supervisor sends to its owner while it starts.
type event struct {
	Step    string `json:"step,omitempty"`
	Ready   bool   `json:"ready,omitempty"`
	Error   string `json:"error,omitempty"`
	Running bool   `json:"running,omitempty"` // the error is ErrRunning
}

// detachByte in the owner's pipe makes the cluster continue to run when the owner ends.
const detachByte = 'D'

// supervisor runs the cluster: every process of the cluster is a descendant of it, and the cluster ends with it.
//
// It is a separate program, because a process that is killed by SIGKILL cannot clean up after itself. Only the owner,
// such as a test or `cluster up`, has the write end of a pipe. When the owner ends for any reason, the kernel closes
// the pipe, and the supervisor stops the cluster, unless the owner has detached. If the supervisor itself is killed,
// the kernel kills its children with their parent-death signal; cgroups, namespaces and files remain until the next
// start or stop removes them.
type supervisor struct {
	cfg    superviseConfig
	cp     *controlPlane
	nodes  []*node
	azure  *process
	events *json.Encoder

	requests sync.Mutex // held while a request of the control socket is executed

	mu    sync.Mutex // guards state
	state state
}

// Supervise runs a cluster. It stops the cluster and returns when the owner, without having detached, ends or closes
// its pipe. It does the same after POST /stop on the control socket, and after SIGINT or SIGTERM. The parameter owner
// is the pipe from the owner, and events is the pipe to the owner.
func Supervise(owner, events *os.File) error {
	lines := bufio.NewReader(owner)
	line, err := lines.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("reading the supervisor's configuration (only the cluster itself starts a supervisor): %w", err)
	}
	s := &supervisor{events: json.NewEncoder(events)}
	if err := json.Unmarshal(line, &s.cfg); err != nil {
		return fmt.Errorf("reading the supervisor's configuration: %w", err)
	}
	// The supervisor notices the end of the owner by the pipe, not by these signals.
	signal.Ignore(syscall.SIGPIPE, syscall.SIGHUP)
	ctx, end := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer end()
	go func() {
		for {
			switch b, err := lines.ReadByte(); {
			case err != nil:
				log.Printf("the owner has ended or closed its pipe (%v): stopping the cluster", err)
				end()
				return
			case b == detachByte:
				log.Print("the owner has detached: the cluster continues to run when the owner ends")
				return
			}
		}
	}()
	err = s.run(ctx, end)
	if err != nil {
		log.Printf("the supervisor ends with an error: %v", err)
		_ = s.events.Encode(event{Error: err.Error(), Running: errors.Is(err, ErrRunning)})
	}
	return err
}

// run starts the cluster, serves the control socket until the context ends, and stops the cluster.
func (s *supervisor) run(ctx context.Context, end func()) error {
	lock, err := lockRun()
	if err != nil {
		return err
	}
	if err := errors.Join(cleanUp(), lock.Close()); err != nil {
		return err
	}
	// Again, because cleanUp removed the locked folder.
	if lock, err = lockRun(); err != nil {
		return err
	}
	defer lock.Close()
	control, err := s.prepare(end)
	if err == nil {
		err = s.start(ctx)
	}
	if err == nil {
		s.step("ready")
		_ = s.events.Encode(event{Ready: true})
		<-ctx.Done()
	} else if ctx.Err() != nil {
		err = fmt.Errorf("the start was interrupted: %w", context.Canceled)
	}
	began := time.Now()
	stopErr := s.stop()
	log.Printf("stopping the cluster took %s (error: %v)", time.Since(began).Round(time.Millisecond), stopErr)
	if control != nil {
		control.finish(stopErr)
	}
	return errors.Join(err, stopErr)
}

func (s *supervisor) prepare(end func()) (*controlServer, error) {
	for _, dir := range []string{s.cfg.LogDir, azureDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := removeOldLogs(s.cfg.LogDir); err != nil {
		return nil, err
	}
	if err := logTo(filepath.Join(s.cfg.LogDir, "supervisor.log")); err != nil {
		return nil, err
	}
	self, err := identify(os.Getpid())
	if err != nil {
		return nil, err
	}
	s.state = state{BootID: bootID(), Supervisor: self, Started: time.Now(), Processes: map[string]processID{}, Binaries: s.cfg.Binaries, LogDir: s.cfg.LogDir}
	if err := s.state.write(); err != nil {
		return nil, err
	}
	spawn := newSpawner()
	s.cp = &controlPlane{bin: s.cfg.Binaries, netns: netnsPath(ControlPlaneNetns), dir: runDir, pki: pkiDir, logDir: s.cfg.LogDir, spawn: spawn, onStart: s.record}
	for _, spec := range nodeSpecs {
		s.nodes = append(s.nodes, &node{nodeSpec: spec, bin: s.cfg.Binaries, program: s.cfg.Program, providerID: s.cfg.ProviderIDs[spec.Name],
			logDir: s.cfg.LogDir, hosts: s.cfg.Hosts, spawn: spawn, onStart: s.record})
	}
	return s.serveControl(end)
}

// start starts all processes, in parallel where possible: each node starts containerd and imports its images while the
// API server starts.
func (s *supervisor) start(ctx context.Context) error {
	s.step("creating namespaces and certificates")
	if err := makeNetwork(); err != nil {
		return err
	}
	if err := writePKI(pkiDir); err != nil {
		return err
	}
	api, err := newAPIClient(pkiDir, netnsPath(ControlPlaneNetns))
	if err != nil {
		return err
	}
	s.cp.api = api

	apiReady := make(chan struct{})
	// The first error cancels the context of all functions of the group.
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		s.step("starting etcd and the API server")
		err := s.cp.start(ctx, func() { close(apiReady); s.step("the API server is ready") })
		if err == nil {
			s.step("pods can be created")
		}
		return err
	})
	group.Go(func() error { return s.startAzure(ctx) })
	for _, n := range s.nodes {
		group.Go(func() error { return s.startNode(ctx, n, apiReady) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Ready = true
	return s.state.write()
}

func (s *supervisor) startNode(ctx context.Context, n *node, apiReady <-chan struct{}) error {
	if err := n.boot(ctx); err != nil {
		return err
	}
	if err := importImages(ctx, s.cfg.Binaries, n.Name, s.cfg.Images); err != nil {
		return err
	}
	s.step("containerd runs on " + n.Name)
	select {
	case <-apiReady:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := n.startKubelet(); err != nil {
		return err
	}
	if err := n.awaitReady(ctx, s.cp.api); err != nil {
		return err
	}
	s.step(n.Name + " is ready")
	return nil
}

func (s *supervisor) restartNode(ctx context.Context, name string) error {
	i := slices.IndexFunc(s.nodes, func(n *node) bool { return n.Name == name })
	if i < 0 {
		return fmt.Errorf("there is no node %q", name)
	}
	n := s.nodes[i]
	if err := n.init.stop(); err != nil {
		return err
	}
	ready := make(chan struct{})
	close(ready)
	return s.startNode(ctx, n, ready)
}

func (s *supervisor) startAzure(ctx context.Context) error {
	if s.cfg.Azure == nil {
		return nil
	}
	if err := os.WriteFile(azureConfig, s.cfg.Azure, 0o600); err != nil {
		return err
	}
	cmd, err := inNetns(context.WithoutCancel(ctx), azureNetns, s.cfg.Program, "azure", "serve", "--config", azureConfig)
	if err != nil {
		return err
	}
	s.azure, err = s.cp.spawn.start("azure", filepath.Join(s.cfg.LogDir, "azure.log"), cmd)
	if err != nil {
		return err
	}
	if err := s.record("azure", s.azure); err != nil {
		return err
	}
	if err := waitFor(ctx, "the fake Azure", startLimit, []*process{s.azure}, polled(azureReady)); err != nil {
		return err
	}
	s.step("the fake Azure runs")
	return nil
}

// record saves the ID of a new process at once, so that cleanUp finds it if the supervisor is killed.
func (s *supervisor) record(name string, p *process) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	log.Printf("%s is process %d", name, p.PID)
	s.state.Processes[name] = p.processID
	return s.state.write()
}

// logTo redirects standard output and error, including the text of a panic, to the file at path. launch does not give
// the supervisor the owner's standard output and error, because `go test` would wait until the supervisor closes them.
func logTo(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("opening the supervisor's log: %w", err)
	}
	defer f.Close()
	for _, fd := range []int{1, 2} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("redirecting the supervisor's output to %s: %w", path, err)
		}
	}
	return nil
}

func (s *supervisor) step(what string) {
	log.Print(what)
	_ = s.events.Encode(event{Step: what})
}

// stop stops all processes, also those of an incomplete start, and cleans up.
func (s *supervisor) stop() error {
	var group errgroup.Group
	for _, n := range s.nodes {
		group.Go(n.init.stop)
	}
	if s.cp != nil {
		group.Go(s.cp.stop)
	}
	group.Go(s.azure.stop)
	return errors.Join(group.Wait(), cleanUp())
}
