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

// superviseConfig is the first line that the owner writes into the supervisor's pipe.
type superviseConfig struct {
	Binaries    Binaries
	Program     string
	LogDir      string
	Images      []string          // archives to import into each node
	ProviderIDs map[string]string // by node
	Hosts       string            // for each node's /etc/hosts
	Azure       json.RawMessage   `json:",omitempty"` // configuration of the stand-in; none without it
}

// event is one line that the supervisor sends to its owner while it starts.
type event struct {
	Step    string `json:"step,omitempty"`
	Ready   bool   `json:"ready,omitempty"`
	Error   string `json:"error,omitempty"`
	Running bool   `json:"running,omitempty"` // the error is ErrRunning
}

// detachByte on the owner's pipe lets the cluster outlive the owner.
const detachByte = 'D'

// supervisor owns the cluster: every process of it is its child, and its end is the cluster's end.
//
// It is a program of its own, because what ends with SIGKILL cannot clean up after itself. The owner, a test or
// `cluster up`, holds the writing end of a pipe and nobody else does. When the owner ends, in whatever way, the kernel
// closes the pipe, and the supervisor takes everything down. Should the supervisor be killed, its children die by
// their parent-death signal; cgroups, namespaces and files stay for the next start or stop to remove.
type supervisor struct {
	cfg    superviseConfig
	cp     *controlPlane
	nodes  []*node
	azure  *process
	events *json.Encoder

	ops sync.Mutex // one order of the control socket at a time

	mu    sync.Mutex // guards state
	state state
}

// Supervise runs a cluster until its owner, or somebody over the control socket, ends it. owner and events are the
// pipes from and to the program that started it.
func Supervise(owner, events *os.File) error {
	lines := bufio.NewReader(owner)
	line, err := lines.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("the supervisor is only run by the cluster itself: reading its configuration: %w", err)
	}
	s := &supervisor{events: json.NewEncoder(events)}
	if err := json.Unmarshal(line, &s.cfg); err != nil {
		return fmt.Errorf("reading the supervisor's configuration: %w", err)
	}
	// A reader that went away is noticed on the other pipe.
	signal.Ignore(syscall.SIGPIPE, syscall.SIGHUP)
	ctx, end := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer end()
	go func() {
		for {
			switch b, err := lines.ReadByte(); {
			case err != nil:
				log.Printf("the owner is gone (%v)", err)
				end()
				return
			case b == detachByte:
				log.Print("detached from the owner")
				return
			}
		}
	}()
	err = s.run(ctx, end)
	if err != nil {
		log.Printf("error: %v", err)
		_ = s.events.Encode(event{Error: err.Error(), Running: errors.Is(err, ErrRunning)})
	}
	return err
}

// run starts the cluster, serves the control socket until the context ends, and takes everything down.
func (s *supervisor) run(ctx context.Context, end func()) error {
	lock, err := lockRun()
	if err != nil {
		return err
	}
	if err := errors.Join(cleanUp(), lock.Close()); err != nil {
		return err
	}
	// Again, because cleanUp removed the folder with the lock on it.
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
		err = fmt.Errorf("the start was cut off: %w", context.Canceled)
	}
	began := time.Now()
	stopErr := s.stop()
	log.Printf("everything is down after %s (%v)", time.Since(began).Round(time.Millisecond), stopErr)
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
	// A folder that is used again holds logs of the cluster before.
	for _, pattern := range []string{"supervisor", "etcd", "kube-*", "azure", "node*"} {
		old, _ := filepath.Glob(filepath.Join(s.cfg.LogDir, pattern+".log"))
		for _, file := range old {
			if err := os.Remove(file); err != nil {
				return nil, err
			}
		}
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
	s.cp = &controlPlane{bin: s.cfg.Binaries, netns: netnsPath(controlPlaneNetns), dir: runDir, pki: pkiDir, logDir: s.cfg.LogDir, spawn: spawn, onStart: s.record}
	for _, spec := range nodeSpecs {
		s.nodes = append(s.nodes, &node{nodeSpec: spec, bin: s.cfg.Binaries, program: s.cfg.Program, providerID: s.cfg.ProviderIDs[spec.Name],
			logDir: s.cfg.LogDir, hosts: s.cfg.Hosts, spawn: spawn, onStart: s.record})
	}
	return s.listen(end)
}

// start brings everything up, in parallel where nothing speaks against it: containerd is there and has its images by
// the time the API server answers.
func (s *supervisor) start(ctx context.Context) error {
	s.step("making namespaces and certificates")
	if err := makeNetwork(); err != nil {
		return err
	}
	if err := writePKI(pkiDir); err != nil {
		return err
	}
	api, err := newAPIClient(pkiDir, netnsPath(controlPlaneNetns))
	if err != nil {
		return err
	}
	s.cp.api = api

	apiReady := make(chan struct{})
	// The first error ends the others.
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
	if err := n.join(); err != nil {
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
	if err := waitFor(ctx, "the fake Azure", 15*time.Second, []*process{s.azure}, polled(azureReady)); err != nil {
		return err
	}
	s.step("the stand-in Azure runs")
	return nil
}

// record writes a new process down at once, so that it is found should the supervisor be killed.
func (s *supervisor) record(name string, p *process) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	log.Printf("%s is process %d", name, p.PID)
	s.state.Processes[name] = p.processID
	return s.state.write()
}

// logTo sends everything the supervisor prints to a file, a panic too. It holds none of its owner's outputs: a test
// run would wait for whoever does.
func logTo(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("opening the supervisor's log: %w", err)
	}
	defer f.Close()
	for _, fd := range []int{1, 2} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("opening the supervisor's log: %w", err)
		}
	}
	return nil
}

func (s *supervisor) step(what string) {
	log.Print(what)
	_ = s.events.Encode(event{Step: what})
}

// stop takes everything down, also what start did not finish. One part that does not end keeps no other from ending.
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
