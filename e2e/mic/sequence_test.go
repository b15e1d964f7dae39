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

// story is a world to which things happen: steps, each of which depends on nothing but the seed, its number and how the
// cluster and Azure are at the time, so that a step that is left out does not make the others different ones.
type story struct {
	*world
	mu      sync.Mutex // of log
	log     []string
	pending []deferred
	crashes chan *process
	leader  *process // nil while there is none

	watchNeeds time.Duration // for a change to be known to the controller, at most
	restart    time.Duration // from a crash to the next start
}

// deferred is something that happens later by itself.
type deferred struct {
	at time.Time
	do func()
}

// event is one kind of step. do says what it did, or "" if there was nothing to do.
type event struct {
	weight int
	do     func(*story, *rand.Rand) string
}

func newStory(t testing.TB, seed uint64) *story {
	s := &story{world: newWorld(t), crashes: make(chan *process, 16), watchNeeds: 2 * time.Second}
	s.seed = seed
	return s
}

func (s *story) tell(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, clock(time.Now())+" "+fmt.Sprintf(format, args...))
}

// traced adds to the story what the controller sends and logs.
func (s *story) traced() {
	s.trace = func(process string) func(request, string) {
		return func(r request, outcome string) {
			if r.write || r.to == toARM {
				s.tell("      %s: %s: %s", process, r.what, outcome)
			}
		}
	}
	encoder := zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "m"})
	s.world.log = zap.New(zapcore.NewCore(encoder, zapcore.AddSync(logLines{s}), zap.DebugLevel))
}

type logLines struct{ *story }

func (l logLines) Write(line []byte) (int, error) {
	l.tell("      log: %s", strings.TrimSpace(string(line)))
	return len(line), nil
}

// play makes the steps with these numbers happen.
func (s *story) play(steps []int) {
	total := 0
	for _, e := range events {
		total += e.weight
	}
	for _, step := range steps {
		r := rand.New(rand.NewPCG(s.seed, uint64(step)))
		s.wait(randomPause(r))
		// What cannot happen at the moment is replaced by something that can.
		for range 10 {
			n := r.IntN(total)
			i := slices.IndexFunc(events, func(e event) bool { n -= e.weight; return n < 0 })
			if text := events[i].do(s, r); text != "" {
				s.tell("%2d %s", step, text)
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
		return random(r, 0, 1500*time.Millisecond)
	case n < 16:
		return random(r, 2*time.Second, 15*time.Second)
	case n < 19:
		return random(r, 15*time.Second, 150*time.Second)
	}
	return random(r, 3*time.Minute, 6*time.Minute)
}

func random(r *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(r.Int64N(int64(most-least))).Truncate(time.Millisecond)
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// later makes something happen after a while.
func (s *story) later(d time.Duration, do func()) {
	s.pending = append(s.pending, deferred{time.Now().Add(d), do})
	slices.SortStableFunc(s.pending, func(a, b deferred) int { return a.at.Compare(b.at) })
}

// wait lets time pass.
func (s *story) wait(d time.Duration) {
	for end := time.Now().Add(d); ; {
		for len(s.pending) > 0 && !s.pending[0].at.After(time.Now()) {
			next := s.pending[0]
			s.pending = s.pending[1:]
			next.do()
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
			s.crashed(p)
		}
	}
}

// crashed is what follows when a process has died by itself.
func (s *story) crashed(p *process) {
	p.kill()
	if s.leader == p {
		s.leader = nil
		s.later(s.restart, s.lead)
	}
}

// lead starts a leader if there is none.
func (s *story) lead() {
	if s.leader == nil {
		s.leader = s.start()
		s.tell("   %s leads", s.leader.line.name)
	}
}

// rest ends all faults, waits until nothing is wrong any more, and then some more, and says what was wrong in the end.
func (s *story) rest() []string {
	for len(s.pending) > 0 {
		next := s.pending[0]
		s.pending = s.pending[1:]
		next.do()
	}
	if s.leader != nil {
		s.leader.line.hook(nil, nil)
	}
	s.api.recover()
	s.arm.ClearFaults("")
	for id := range s.bad {
		if _, defined := s.defined[id]; defined {
			s.must(s.arm.SetIdentityFault(azure.IdentityFault{Identity: id, Denied: true}))
		}
	}
	for _, m := range s.arm.Machines() {
		s.must(s.arm.SetProvisioningState(m.ID, ""))
	}
	s.lead()
	s.tell("   all faults are over")
	var wrong []string
	for range mostMinutesToRest {
		s.wait(time.Minute)
		if wrong = s.wrongAtRest(); len(wrong) == 0 {
			break
		}
	}
	if len(wrong) > 0 {
		return append([]string{fmt.Sprintf("not at rest %d minutes after the last fault:", mostMinutesToRest)}, wrong...)
	}
	s.tell("   at rest")
	s.wait(4 * time.Minute)
	if wrong = s.wrongAtRest(); len(wrong) > 0 {
		return append([]string{"at rest, and some minutes later not any more:"}, wrong...)
	}
	return nil
}

// mostMinutesToRest is enough for every pause that the controller makes after a failure.
const mostMinutesToRest = 50

// outcome of a story: what was wrong, and all that happened.
type outcome struct {
	wrong []string
	log   []string
}

func (o outcome) String() string {
	return strings.Join(o.log, "\n") + "\n\n" + strings.Join(o.wrong, "\n")
}
