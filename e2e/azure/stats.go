package azure

import (
	"maps"
	"sync"
	"time"
)

// Load has counts of requests and their concurrency.
type Load struct {
	Requests       int `json:"requests"`
	InFlight       int `json:"in_flight"`
	MaxConcurrency int `json:"max_concurrency"`
	MaxPerSecond   int `json:"max_per_second"` // maximum number of arrivals within any one second
}

// Source has the counts of one source address.
type Source struct {
	Node        string `json:"node"`
	FromPod     bool   `json:"from_pod"`
	Connections int    `json:"connections"`
	Requests    int    `json:"requests"`
}

// ServiceStats are the counts of one service since its start or the last reset of the log.
type ServiceStats struct {
	All                 Load              `json:"all"`
	Token               Load              `json:"token"`         // token requests
	TokenByNode         map[string]Load   `json:"token_by_node"` // "": the source address belongs to no node
	ByClass             map[string]int    `json:"by_class"`
	ByStatus            map[int]int       `json:"by_status"`     // 0: no response
	ByCredential        map[string]int    `json:"by_credential"` // completed token requests to Entra ID
	Connections         int               `json:"connections"`
	ConnectionsFromPods int               `json:"connections_from_pods"`
	RequestsFromPods    int               `json:"requests_from_pods"`
	Sources             map[string]Source `json:"sources"` // by address; "other": those after the first maxSources
}

// TokenStats count the tokens of one client ID.
type TokenStats struct {
	Answered int `json:"answered"` // responses with a token
	Minted   int `json:"minted"`   // responses with a new token, not one from the cache of IMDS
}

// Stats are all counts. IMDS.RequestsFromPods and IMDS.ConnectionsFromPods must
// stay 0 while NMI runs.
type Stats struct {
	Since      time.Time             `json:"since"`
	LogDropped int                   `json:"log_dropped"` // entries dropped from the log of IMDS and Entra ID
	IMDS       ServiceStats          `json:"imds"`
	Entra      ServiceStats          `json:"entra"`
	ARM        ARMStats              `json:"arm"`
	Tokens     map[string]TokenStats `json:"tokens"`
}

const maxSources = 10_000

// window has the arrivals of the last second.
type window struct{ arrivals []time.Time }

func (w *window) count(now time.Time) int {
	i := 0
	for i < len(w.arrivals) && now.Sub(w.arrivals[i]) >= time.Second {
		i++
	}
	w.arrivals = w.arrivals[i:]
	return len(w.arrivals)
}

func (w *window) add(now time.Time) int {
	n := w.count(now)
	w.arrivals = append(w.arrivals, now)
	return n + 1
}

// meter measures a Load.
type meter struct {
	Load
	window window
}

func (m *meter) begin(now time.Time) {
	m.Requests++
	m.InFlight++
	m.MaxConcurrency = max(m.MaxConcurrency, m.InFlight)
	m.MaxPerSecond = max(m.MaxPerSecond, m.window.add(now))
}

func (m *meter) reset() {
	m.Load = Load{InFlight: m.InFlight, MaxConcurrency: m.InFlight}
	m.window = window{}
}

// serviceMeters are the counts of one service.
type serviceMeters struct {
	all, token meter
	byNode     map[string]*meter
	stats      ServiceStats // the counts that no meter measures
}

// recorder writes the log and the counts. One lock guards both, so that a reset
// is atomic.
type recorder struct {
	now func() time.Time

	mu     sync.Mutex
	log    requestLog
	since  time.Time
	meters map[string]*serviceMeters
	tokens map[string]TokenStats
}

func newRecorder(now func() time.Time) *recorder {
	r := &recorder{now: now, log: requestLog{capacity: logCapacity}, meters: map[string]*serviceMeters{}}
	for _, s := range services {
		r.meters[s] = &serviceMeters{byNode: map[string]*meter{}}
	}
	r.reset()
	return r
}

// reset empties the log and sets the counts to 0, except that InFlight and
// MaxConcurrency still include the requests in progress.
func (r *recorder) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log.reset()
	r.since = r.now()
	r.tokens = map[string]TokenStats{}
	for _, m := range r.meters {
		m.all.reset()
		m.token.reset()
		for _, n := range m.byNode {
			n.reset()
		}
		m.stats = ServiceStats{ByClass: map[string]int{}, ByStatus: map[int]int{}, ByCredential: map[string]int{}, Sources: map[string]Source{}}
	}
}

func (m *serviceMeters) source(c caller, change func(*Source)) {
	key := c.source.String()
	s, ok := m.stats.Sources[key]
	if !ok && len(m.stats.Sources) >= maxSources {
		key, c = "other", caller{}
		s = m.stats.Sources[key]
	}
	s.Node, s.FromPod = c.node, c.fromPod
	change(&s)
	m.stats.Sources[key] = s
}

// connection counts an accepted TCP connection. It also logs a connection to IMDS that
// does not come from an address of a node itself.
func (r *recorder) connection(service string, c caller) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.meters[service]
	m.stats.Connections++
	m.source(c, func(s *Source) { s.Connections++ })
	if c.fromPod {
		m.stats.ConnectionsFromPods++
	}
	if service == serviceIMDS && (c.fromPod || c.node == "") {
		r.log.add(Entry{
			Time: r.now(), Kind: KindConnection, Service: service,
			Node: c.node, Source: c.source.String(), FromPod: c.fromPod,
		})
	}
}

// begin counts a request when it arrives. The caller must call end after the
// request.
func (r *recorder) begin(service, class string, c caller) (end func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now, m := r.now(), r.meters[service]
	m.stats.ByClass[class]++
	m.source(c, func(s *Source) { s.Requests++ })
	if c.fromPod {
		m.stats.RequestsFromPods++
	}
	running := []*meter{&m.all}
	if class == classToken {
		node, ok := m.byNode[c.node]
		if !ok {
			node = &meter{}
			m.byNode[c.node] = node
		}
		running = append(running, &m.token, node)
	}
	for _, one := range running {
		one.begin(now)
	}
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, one := range running {
			one.InFlight--
		}
	}
}

// finish logs a request and counts its outcome.
func (r *recorder) finish(e Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log.add(e)
	r.meters[e.Service].stats.ByStatus[e.Status]++
	if e.Service == serviceEntra && e.Class == classToken {
		r.meters[e.Service].stats.ByCredential[e.Credential]++
	}
	if e.TokenID != "" {
		t := r.tokens[e.ClientID]
		t.Answered++
		if !e.Cached {
			t.Minted++
		}
		r.tokens[e.ClientID] = t
	}
}

func (r *recorder) entries(since int) []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.since(since)
}

func (r *recorder) stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Stats{
		Since: r.since, LogDropped: r.log.dropped, Tokens: maps.Clone(r.tokens),
		IMDS: r.meters[serviceIMDS].snapshot(), Entra: r.meters[serviceEntra].snapshot(),
	}
}

func (m *serviceMeters) snapshot() ServiceStats {
	s := m.stats
	s.All, s.Token = m.all.Load, m.token.Load
	s.TokenByNode = map[string]Load{}
	for node, one := range m.byNode {
		s.TokenByNode[node] = one.Load
	}
	s.ByClass, s.ByStatus = maps.Clone(s.ByClass), maps.Clone(s.ByStatus)
	s.ByCredential, s.Sources = maps.Clone(s.ByCredential), maps.Clone(s.Sources)
	return s
}
