package mic

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/podidentity/podidentity/e2e/azure"
)

// sequence is a random sequence of steps in a simulation. The seed and the number of a step determine the random
// numbers of that step. So leaving out a step does not change the random numbers of the other steps.
type sequence struct {
	*simulation
	mu      sync.Mutex // of log
	log     []string   // what happened, line by line
	pending []scheduled
	crashes chan *process
	leader  *process // nil while there is none

	maxWatchDelay time.Duration // upper limit of the time until the controller receives a change
	restartDelay  time.Duration // from a crash to the start of the next controller
}

// scheduled is a function to run at some time.
type scheduled struct {
	at  time.Time
	run func()
}

// action is one kind of step. weight is its frequency relative to the other actions. run returns a description of what
// it did, or "" if the action was not possible.
type action struct {
	weight int
	run    func(*sequence, *rand.Rand) string
}

func newSequence(t testing.TB, seed uint64) *sequence {
	s := &sequence{simulation: newSimulation(t), crashes: make(chan *process, 16), maxWatchDelay: 2 * time.Second}
	s.seed = seed
	return s
}

func (s *sequence) logf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, formatTime(time.Now())+" "+fmt.Sprintf(format, args...))
}

// traceRequests adds the writes, the requests to ARM and the log of the controllers to the log of the sequence.
func (s *sequence) traceRequests() {
	s.newTrace = func(process string) func(request, string) {
		return func(r request, outcome string) {
			if r.isWrite || r.target == toARM {
				s.logf("      %s: %s: %s", process, r.description, outcome)
			}
		}
	}
	encoder := zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "m"})
	s.simulation.log = zap.New(zapcore.NewCore(encoder, zapcore.AddSync(logWriter{s}), zap.DebugLevel))
}

type logWriter struct{ *sequence }

func (l logWriter) Write(line []byte) (int, error) {
	l.logf("      log: %s", strings.TrimSpace(string(line)))
	return len(line), nil
}

// run performs one random action for each step, after a random pause.
func (s *sequence) run(steps []int) {
	total := 0
	for _, e := range actions {
		total += e.weight
	}
	for _, step := range steps {
		r := rand.New(rand.NewPCG(s.seed, uint64(step)))
		s.wait(randomPause(r))
		// An action that is not possible in the current state is replaced by another one. After ten attempts the step
		// does nothing.
		for range 10 {
			n := r.IntN(total)
			i := slices.IndexFunc(actions, func(e action) bool { n -= e.weight; return n < 0 })
			if text := actions[i].run(s, r); text != "" {
				s.logf("%2d %s", step, text)
				break
			}
		}
	}
}

func randomPause(r *rand.Rand) time.Duration {
	switch n := r.IntN(20); {
	case n < 5:
		return 0
	case n < 12:
		return randomDuration(r, 0, 1500*time.Millisecond)
	case n < 16:
		return randomDuration(r, 2*time.Second, 15*time.Second)
	case n < 19:
		return randomDuration(r, 15*time.Second, 150*time.Second)
	}
	return randomDuration(r, 3*time.Minute, 6*time.Minute)
}

func randomDuration(r *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(r.Int64N(int64(to-from))).Truncate(time.Millisecond)
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// schedule makes wait call do after d. If do is still pending when converge is called, converge calls it immediately.
func (s *sequence) schedule(d time.Duration, do func()) {
	s.pending = append(s.pending, scheduled{time.Now().Add(d), do})
	slices.SortStableFunc(s.pending, func(a, b scheduled) int { return a.at.Compare(b.at) })
}

// wait waits for d, runs the functions that are due and handles crashes.
func (s *sequence) wait(d time.Duration) {
	for end := time.Now().Add(d); ; {
		for len(s.pending) > 0 && !s.pending[0].at.After(time.Now()) {
			next := s.pending[0]
			s.pending = s.pending[1:]
			next.run()
		}
		until := end
		if len(s.pending) > 0 && s.pending[0].at.Before(until) {
			until = s.pending[0].at
		}
		select {
		case <-time.After(time.Until(until)):
			if !until.Before(end) {
				return
			}
		case p := <-s.crashes:
			s.handleCrash(p)
		}
	}
}

// handleCrash kills a process. If the process was the leader, handleCrash schedules the start of the next leader.
func (s *sequence) handleCrash(p *process) {
	p.kill()
	if s.leader == p {
		s.leader = nil
		s.schedule(s.restartDelay, s.startLeader)
	}
}

// startLeader starts a leader if there is none.
func (s *sequence) startLeader() {
	if s.leader == nil {
		s.leader = s.start()
		s.logf("   %s becomes the leader", s.leader.conn.name)
	}
}

// converge runs the scheduled functions and removes all faults, except that Azure still refuses the identities in
// s.refused. It waits a limited time until MIC has converged and, if it has, four more minutes. It returns how the state
// differs then from the desired one; nil if it does not differ.
func (s *sequence) converge() []string {
	for len(s.pending) > 0 {
		next := s.pending[0]
		s.pending = s.pending[1:]
		next.run()
	}
	if s.leader != nil {
		s.leader.conn.hook(nil, nil)
	}
	s.api.clearFaults()
	s.arm.ClearFaults("")
	for id := range s.refused {
		if _, defined := s.existing[id]; defined {
			requireNoError(s.t, s.arm.SetIdentityFault(azure.IdentityFault{Identity: id, Denied: true}))
		}
	}
	for _, m := range s.arm.Machines() {
		requireNoError(s.t, s.arm.SetProvisioningState(m.ID, ""))
	}
	s.startLeader()
	s.logf("   all faults are removed, except refused identities")
	var wrong []string
	for range maxMinutesToConverge {
		s.wait(time.Minute)
		if wrong = s.convergenceErrors(); len(wrong) == 0 {
			break
		}
	}
	if len(wrong) > 0 {
		return append([]string{fmt.Sprintf("not converged %d minutes after all faults were removed:", maxMinutesToConverge)}, wrong...)
	}
	s.logf("   converged")
	s.wait(4 * time.Minute)
	if wrong = s.convergenceErrors(); len(wrong) > 0 {
		return append([]string{"converged, but four minutes later there are differences again:"}, wrong...)
	}
	return nil
}

// maxMinutesToConverge is longer than every backoff of the controller.
const maxMinutesToConverge = 50

// outcome is the result of a sequence: the errors and the log.
type outcome struct {
	errors []string
	log    []string
}

func (o outcome) String() string {
	return strings.Join(o.log, "\n") + "\n\n" + strings.Join(o.errors, "\n")
}
