package azure

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// faults are the switches of one service. The zero value is not the default: see
// defaultFaults.
type faults struct {
	latency       time.Duration
	throttle      int // number of token requests that will be throttled; -1: all
	retryAfter    int // seconds; 0: no Retry-After header
	status        int // 0: off
	statusCount   int // number of requests that will get the status; 0: all
	hang, drop    bool
	everything    bool // latency, hang, drop and status apply to all requests, not only to token requests
	plainErrors   bool
	tokenLifetime time.Duration
	limits        bool // enforce the rate limits; IMDS only
	cache         bool // cache tokens; IMDS only
}

func defaultFaults(service string) faults {
	f := faults{everything: true, cache: true, tokenLifetime: time.Hour}
	if service == serviceIMDS {
		f.tokenLifetime = 24 * time.Hour
	}
	return f
}

// switchKind is a switch for a field of T: its name, and how it is read and set.
type switchKind[T any] struct {
	name     string
	imdsOnly bool
	values   string // the valid values, for error messages
	get      func(*T) string
	set      func(*T, string) error
}

var switchKinds = []switchKind[faults]{
	durationSwitch("latency", 0, func(f *faults) *time.Duration { return &f.latency }),
	intSwitch("throttle", "-1 (all), 0 (off) or a number of token requests", -1, 1<<30, func(f *faults) *int { return &f.throttle }),
	intSwitch("retry-after", "seconds, 0 to 3600 (0: no header)", 0, 3600, func(f *faults) *int { return &f.retryAfter }),
	{
		name: "status", values: "0 (off) or an HTTP status from 400 to 599",
		get: func(f *faults) string { return strconv.Itoa(f.status) },
		set: func(f *faults, v string) error {
			n, err := strconv.Atoi(v)
			if err != nil || n != 0 && (n < 400 || n > 599) {
				return errBadSwitchValue
			}
			f.status = n
			return nil
		},
	},
	intSwitch("status-count", "0 (all) or a number of requests", 0, 1<<30, func(f *faults) *int { return &f.statusCount }),
	boolSwitch("hang", func(f *faults) *bool { return &f.hang }),
	boolSwitch("drop", func(f *faults) *bool { return &f.drop }),
	choiceSwitch("faults-on", "all", "token", func(f *faults) *bool { return &f.everything }),
	choiceSwitch("error-body", "text", "json", func(f *faults) *bool { return &f.plainErrors }),
	durationSwitch("token-lifetime", time.Second, func(f *faults) *time.Duration { return &f.tokenLifetime }),
	onlyIMDS(boolSwitch("limits", func(f *faults) *bool { return &f.limits })),
	onlyIMDS(boolSwitch("cache", func(f *faults) *bool { return &f.cache })),
}

const errBadSwitchValue refusal = "bad value"

func onlyIMDS(k switchKind[faults]) switchKind[faults] {
	k.imdsOnly = true
	return k
}

func durationSwitch[T any](name string, least time.Duration, field func(*T) *time.Duration) switchKind[T] {
	return switchKind[T]{
		name: name, values: "a duration such as 200ms or 24h, at least " + least.String(),
		get: func(f *T) string { return field(f).String() },
		set: func(f *T, v string) error {
			d, err := time.ParseDuration(v)
			if err != nil || d < least {
				return errBadSwitchValue
			}
			*field(f) = d
			return nil
		},
	}
}

func intSwitch[T any](name, values string, low, high int, field func(*T) *int) switchKind[T] {
	return switchKind[T]{
		name: name, values: values,
		get: func(f *T) string { return strconv.Itoa(*field(f)) },
		set: func(f *T, v string) error {
			n, err := strconv.Atoi(v)
			if err != nil || n < low || n > high {
				return errBadSwitchValue
			}
			*field(f) = n
			return nil
		},
	}
}

func boolSwitch[T any](name string, field func(*T) *bool) switchKind[T] {
	return choiceSwitch(name, "true", "false", field)
}

func choiceSwitch[T any](name, yes, no string, field func(*T) *bool) switchKind[T] {
	return switchKind[T]{
		name: name, values: yes + " or " + no,
		get: func(f *T) string {
			if *field(f) {
				return yes
			}
			return no
		},
		set: func(f *T, v string) error {
			if v != yes && v != no {
				return errBadSwitchValue
			}
			*field(f) = v == yes
			return nil
		},
	}
}

// oneOfSwitch is a switch whose values are words.
func oneOfSwitch[T any, V ~string](name string, field func(*T) *V, words ...V) switchKind[T] {
	values := make([]string, len(words))
	for i, w := range words {
		values[i] = string(w)
	}
	return switchKind[T]{
		name: name, values: strings.Join(values, ", "),
		get: func(f *T) string { return string(*field(f)) },
		set: func(f *T, v string) error {
			if !slices.Contains(values, v) {
				return errBadSwitchValue
			}
			*field(f) = V(v)
			return nil
		},
	}
}

// switches has the faults of the fake IMDS and of the fake Entra ID, and sets the
// settings of the fake ARM.
type switches struct {
	arm *ARM
	mu  sync.Mutex
	of  map[string]*faults // by service
}

func newSwitches(arm *ARM) *switches {
	s := &switches{arm: arm, of: map[string]*faults{}}
	for _, service := range services {
		f := defaultFaults(service)
		s.of[service] = &f
	}
	return s
}

// set applies all changes or, if one is invalid, none. "reset=all" is applied
// first.
func (s *switches) set(changes map[string]string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next, settings := map[string]faults{}, s.arm.Settings()
	for service, f := range s.of {
		next[service] = *f
	}
	if v, ok := changes["reset"]; ok {
		if v != "all" {
			return fmt.Errorf("switch reset=%s: unknown value; the only valid value is all", v)
		}
		for _, service := range services {
			next[service] = defaultFaults(service)
		}
		settings = DefaultARMSettings()
	}
	for _, key := range slices.Sorted(maps.Keys(changes)) {
		if key == "reset" {
			continue
		}
		if kind, ok := findARMSwitch(key); ok {
			if err := kind.set(&settings, changes[key]); err != nil {
				return fmt.Errorf("switch %s=%s: %w; valid: %s", key, changes[key], err, kind.values)
			}
			continue
		}
		service, kind, ok := findSwitch(key)
		if !ok {
			return fmt.Errorf("unknown switch %q; the switches are: %s", key, strings.Join(switchNames(), ", "))
		}
		f := next[service]
		if err := kind.set(&f, changes[key]); err != nil {
			return fmt.Errorf("switch %s=%s: %w; valid: %s", key, changes[key], err, kind.values)
		}
		next[service] = f
	}
	for service, f := range next {
		*s.of[service] = f
	}
	s.arm.Change(func(have *ARMSettings) { *have = settings })
	return nil
}

func findSwitch(key string) (string, switchKind[faults], bool) {
	service, name, _ := strings.Cut(key, ".")
	for _, k := range switchKinds {
		if k.name == name && slices.Contains(services, service) && (service == serviceIMDS || !k.imdsOnly) {
			return service, k, true
		}
	}
	return "", switchKind[faults]{}, false
}

func switchNames() []string {
	names := []string{"reset"}
	for _, service := range services {
		for _, k := range switchKinds {
			if service == serviceIMDS || !k.imdsOnly {
				names = append(names, service+"."+k.name)
			}
		}
	}
	for _, k := range armSwitches {
		names = append(names, serviceARM+"."+k.name)
	}
	return names
}

// all returns every switch with its value.
func (s *switches) all() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]string{}
	for service, f := range s.of {
		for _, k := range switchKinds {
			if service == serviceIMDS || !k.imdsOnly {
				out[service+"."+k.name] = k.get(f)
			}
		}
	}
	settings := s.arm.Settings()
	for _, k := range armSwitches {
		out[serviceARM+"."+k.name] = k.get(&settings)
	}
	return out
}

// consume returns the switches that apply to one request. throttle applies only if
// neither hang nor drop does, and status only if none of hang, drop and throttle does. If
// throttle or status applies and has a count, consume decreases the count. If throttle
// applies, the result has the status 429.
func (s *switches) consume(service string, isToken bool) faults {
	s.mu.Lock()
	defer s.mu.Unlock()
	live := s.of[service]
	f := *live
	if !isToken && !f.everything {
		f.latency, f.hang, f.drop, f.status = 0, false, false, 0
	}
	if f.hang || f.drop {
		return f
	}
	if isToken && f.throttle != 0 {
		if live.throttle > 0 {
			live.throttle--
		}
		f.status = 429
		return f
	}
	if f.status != 0 && live.statusCount > 0 {
		if live.statusCount--; live.statusCount == 0 {
			live.status = 0
		}
	}
	return f
}
