package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// client is one way in which a program that nobody here wrote asks for a token, and what it makes of the answers. Where
// a library decides by an error's type whether to go on, the type is part of what NMI has to bring about.
type client struct {
	library    string
	credential string // subcommand of its program
	names      string // flag that names the identity, env, or nothing
	probes     int    // requests before the first with the header, as far as the program notes them
	refused    string // what it makes of a 400
	chained    string // what a chain makes of that
	throttled  string // what it makes of 429 without end
}

const (
	gotToken = "token"
	gotNext  = "next credential"
	keepsOn  = "still tries"
	noChain  = ""

	// azidentity's two errors: at the first a chain ends, at the second it goes on.
	stops      = "AuthenticationFailedError 400"
	unassigned = "credentialUnavailableError 400"
	busyGo     = "AuthenticationFailedError 429"
	// In JavaScript likewise. The aggregate is a chain's own, all of whose members were tried.
	unavailable = "CredentialUnavailableError 400"
	aggregate   = "AggregateAuthenticationError 400"
)

var clients = []client{
	{"azidentity 1.15.0", "managed", "", 0, unassigned, gotNext, busyGo},
	{"azidentity 1.15.0", "managed", "client-id", 0, stops, stops, busyGo},
	{"azidentity 1.15.0", "managed", "object-id", 0, stops, stops, busyGo},
	{"azidentity 1.15.0", "managed", "resource-id", 0, stops, stops, busyGo},
	{"azidentity 1.15.0", "default", "", 1, unassigned, gotNext, busyGo},
	{"azidentity 1.15.0", "default", "env", 1, stops, stops, busyGo},
	{"adal 0.9.24", "adal", "", 0, "tokenRefreshError 400", noChain, keepsOn},
	{"adal 0.9.24", "adal", "client-id", 0, "tokenRefreshError 400", noChain, keepsOn},
	{"adal 0.9.24", "adal", "resource-id", 0, "tokenRefreshError 400", noChain, keepsOn},
	{"@azure/identity 4.14.1", "managed", "", 0, unavailable, gotNext, "CredentialUnavailableError 429"},
	{"@azure/identity 4.14.1", "managed", "client-id", 0, unavailable, gotNext, "CredentialUnavailableError 429"},
	{"@azure/identity 4.14.1", "managed", "object-id", 0, unavailable, gotNext, "CredentialUnavailableError 429"},
	{"@azure/identity 4.14.1", "managed", "resource-id", 0, unavailable, gotNext, "CredentialUnavailableError 429"},
	{"@azure/identity 4.14.1", "default", "", 1, aggregate, aggregate, "AggregateAuthenticationError 429"},
	{"@azure/identity 4.14.1", "default", "env", 1, aggregate, aggregate, "AggregateAuthenticationError 429"},
	{"@azure/identity 2.1.0", "managed", "", 1, unavailable, gotNext, "AuthenticationError 429"},
	{"@azure/identity 2.1.0", "managed", "client-id", 1, unavailable, gotNext, "AuthenticationError 429"},
	{"@azure/identity 2.1.0", "managed", "resource-id", 1, unavailable, gotNext, "AuthenticationError 429"},
	{"@azure/identity 2.1.0", "default", "", 1, aggregate, aggregate, "AuthenticationError 429"},
	{"curl", "curl", "", 0, "HTTP 400", noChain, keepsOn},
	{"curl", "curl", "client-id", 0, "HTTP 400", noChain, keepsOn},
}

// question is what a client is to ask, from where, and for how long.
type question struct {
	pod      string
	identity azure.Identity // whose token it expects; it says so if it is one that names identities
	resource string
	chain    bool
	patience time.Duration
}

// reply is how that went, with the time that the library took.
type reply struct {
	outcome  string // in the words of the table
	text     string // of the error
	took     time.Duration
	statuses []int
}

// laboratory runs clients in the network namespaces of pods.
type laboratory struct {
	*space
	goclient string
	node     string
	script   string
	modules  map[string]string // NODE_PATH by library
	netns    map[string]*os.File
}

func newLaboratory(t *testing.T) *laboratory {
	t.Helper()
	l := &laboratory{space: newSpace(t), modules: map[string]string{}, netns: map[string]*os.File{}}
	repo, err := cluster.RepoDir()
	must(t, err)
	l.script = filepath.Join(repo, "e2e", "clients", "client.js")
	l.goclient, _, err = cluster.BuildClient(t.Context())
	must(t, err)
	install := func(folder string) string {
		modules, err := cluster.NodeModules(t.Context(), func(line string) { fmt.Println("e2e:", line) }, folder)
		must(t, err)
		return modules
	}
	l.modules["@azure/identity 4.14.1"] = install("clients/js4")
	l.modules["@azure/identity 2.1.0"] = install("clients/js2")
	// Both are run by the one version: Debian's own is too old for the newer library.
	node, err := filepath.Glob(filepath.Join(install("clients/node"), "node-linux-*", "bin", "node"))
	must(t, err)
	if len(node) != 1 {
		t.Fatalf("npm has no Node.js for this machine: there is %v, want one program", node)
	}
	l.node = node[0]
	return l
}

// lab starts a pod whose network clients are to run in.
func (l *laboratory) lab(pod, label, node string) {
	l.t.Helper()
	l.pod(pod, label, node)
	netns, err := world.PodNetns(l.t.Context(), l.name, pod)
	must(l.t, err)
	l.netns[pod] = netns
	l.t.Cleanup(func() { netns.Close() })
}

// command is the client with an environment of nothing but what is said here: no proxy, no address of an endpoint, no
// command-line tools that a chain might find.
func (l *laboratory) command(ctx context.Context, c client, q question) *exec.Cmd {
	env := []string{"PATH=/nonexistent", "HOME=/nonexistent"}
	args := []string{c.credential, "--resource", q.resource}
	switch c.names {
	case "env":
		env = append(env, "AZURE_CLIENT_ID="+q.identity.ClientID)
	case "client-id":
		args = append(args, "--client-id", q.identity.ClientID)
	case "object-id":
		args = append(args, "--object-id", q.identity.ObjectID)
	case "resource-id":
		args = append(args, "--resource-id", q.identity.ResourceID)
	}
	if q.chain {
		args = append(args, "--chain")
	}
	switch modules := l.modules[c.library]; {
	case c.library == "curl":
		url := "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + q.resource
		if c.names != "" {
			url += "&client_id=" + q.identity.ClientID
		}
		args = []string{"curl", "-sv", "--retry", "20", "-H", "Metadata: true", url}
	case modules != "":
		args = append([]string{l.node, l.script}, args...)
		env = append(env, "NODE_PATH="+modules)
	default:
		args = append([]string{l.goclient}, args...)
	}
	if program, err := exec.LookPath(args[0]); err == nil {
		args[0] = program
	}
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/proc/self/fd/3", "--"}, args...)...)
	cmd.ExtraFiles = []*os.File{l.netns[q.pod]}
	cmd.Env = env
	return cmd
}

// run waits for the client's end, and ends it where its patience is longer than ours. What the client receives can be
// read from told meanwhile.
func (l *laboratory) run(c client, q question, told *diary) reply {
	ctx, cancel := context.WithTimeout(context.Background(), q.patience)
	defer cancel()
	cmd := l.command(ctx, c, q)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, told
	start := time.Now()
	err := cmd.Run()
	r := reply{took: time.Since(start), statuses: told.statuses()}
	if ctx.Err() != nil {
		r.outcome = keepsOn
		return r
	}
	got, readErr := l.read(c, out.Bytes(), r.statuses)
	switch {
	case readErr != nil:
		r.outcome, r.text = "failed", fmt.Sprintf("%v, %v: %s%s", err, readErr, out.String(), told)
		return r
	case got.DurationMS > 0:
		r.took = time.Duration(got.DurationMS * float64(time.Millisecond))
	}
	r.outcome, r.text = judge(got, r, q)
	return r
}

// said is the line that a client prints.
type said struct {
	OK          bool
	Token       string
	ExpiresOn   int64 `json:"expires_on"`
	Kind, Error string
	DurationMS  float64 `json:"duration_ms"`
}

func (l *laboratory) read(c client, out []byte, statuses []int) (said, error) {
	var s said
	if c.library != "curl" {
		return s, json.Unmarshal(out, &s)
	}
	var body map[string]string
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); { // one for each try
		body = nil
		if err := d.Decode(&body); err != nil {
			return s, err
		}
	}
	if len(statuses) == 0 {
		return s, fmt.Errorf("no answer")
	}
	s.OK, s.Token, s.Kind, s.Error = statuses[len(statuses)-1] == 200, body["access_token"], "HTTP", body["error_description"]
	s.ExpiresOn, _ = strconv.ParseInt(body["expires_on"], 10, 64)
	return s, nil
}

// judge puts it in the words of the table. A token is only one if it is the right one.
func judge(got said, r reply, q question) (outcome, text string) {
	if !got.OK {
		last := 0
		if len(r.statuses) > 0 {
			last = r.statuses[len(r.statuses)-1]
		}
		return fmt.Sprintf("%s %d", got.Kind, last), got.Error
	}
	if got.Token == "of the next credential" {
		return gotNext, ""
	}
	claims, err := cloud.Verify(got.Token)
	if err != nil {
		return "bad token", err.Error()
	}
	if claims.AppID != q.identity.ClientID || claims.ObjectID != q.identity.ObjectID || claims.Audience != q.resource || claims.TenantID != cluster.TenantID {
		return "wrong token", fmt.Sprintf("of appid %s, oid %s for %s; want %+v for %s", claims.AppID, claims.ObjectID, claims.Audience, q.identity, q.resource)
	}
	// Some count from when they began to ask, which is on the safe side.
	if off := time.Duration(claims.Expires.Unix()-got.ExpiresOn) * time.Second; off < -2*time.Second || off > r.took+2*time.Second {
		return "wrong expiry", fmt.Sprintf("the token expires at %d, the library thinks at %d", claims.Expires.Unix(), got.ExpiresOn)
	}
	return gotToken, ""
}

// diary is what a client tells on standard error while it runs.
type diary struct {
	client client
	mu     sync.Mutex
	text   bytes.Buffer
}

func (d *diary) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.Write(p)
}

func (d *diary) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.String()
}

// The same of curl -v as of the others.
var (
	askLine    = regexp.MustCompile(`(?m)^(?:asking$|> GET )`)
	statusLine = regexp.MustCompile(`(?m)^(?:answer|< HTTP/1\.1) (\d{3})`)
)

// waits reports whether the client has asked for the token and has no answer yet.
func (d *diary) waits() bool {
	return len(d.statuses()) == d.client.probes && len(askLine.FindAllString(d.String(), -1)) == d.client.probes+1
}

// statuses are those of the answers so far.
func (d *diary) statuses() []int {
	var all []int
	for _, match := range statusLine.FindAllStringSubmatch(d.String(), -1) {
		n, _ := strconv.Atoi(match[1])
		all = append(all, n)
	}
	return all
}

// experiment is one question put to many clients, each with what is expected of it.
type experiment struct {
	name     string
	ask      func(c client) (q question, want string, applies bool)
	atOnce   int // how many clients run at the same time; 0: all
	switches map[string]string
	during   func(told []*diary)
	further  func(c client, r reply) string // what else is wrong
}

// perform runs it and returns the cells of the table's column.
func (l *laboratory) perform(e experiment) map[client]string {
	l.t.Helper()
	fault(l.t, e.switches)
	limit := e.atOnce
	if limit == 0 {
		limit = len(clients)
	}
	turns := make(chan struct{}, limit)
	var wait sync.WaitGroup
	defer wait.Wait() // also where during gives up: what goes on then is the test's
	var mu sync.Mutex
	var all []*diary
	cells := map[client]string{}
	for _, c := range clients {
		q, want, applies := e.ask(c)
		if !applies {
			continue
		}
		told := &diary{client: c}
		all = append(all, told)
		wait.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			r := l.run(c, q, told)
			mu.Lock()
			defer mu.Unlock()
			cells[c] = fmt.Sprintf("%s, %.2f s, %d×", r.outcome, r.took.Seconds(), len(r.statuses))
			problem := ""
			if r.outcome != want {
				problem = "want " + want
			} else if e.further != nil {
				problem = e.further(c, r)
			}
			if problem != "" {
				l.t.Errorf("%s: %s %s %s: got %s, answers %v; %s\n%s", e.name, c.library, c.credential, c.names, cells[c], r.statuses, problem, r.text)
			}
		})
	}
	if e.during != nil {
		e.during(all)
	}
	wait.Wait()
	return cells
}

// cores is how many clients run at the same time where it is not the point that they do.
func cores() int { return 2 * runtime.NumCPU() }

// printTable shows the matrix as Markdown.
func printTable(t *testing.T, columns []string, cells map[string]map[client]string) {
	var b strings.Builder
	b.WriteString("\n| client | identity by | " + strings.Join(columns, " | ") + " |\n" + strings.Repeat("|---", len(columns)+2) + "|\n")
	for _, c := range clients {
		fmt.Fprintf(&b, "| %s `%s` | %s |", c.library, c.credential, c.names)
		for _, column := range columns {
			cell := cells[column][c]
			if cell == "" {
				cell = "–"
			}
			fmt.Fprintf(&b, " %s |", cell)
		}
		b.WriteString("\n")
	}
	t.Log(b.String())
}
